"""How many threads of the CPU a run takes. Threads of one operation wait for each other, so beside
another job a thread for each core is ten times slower than one thread alone."""
import os

import torch

from training.terminal import tell


def idle(cores, load):
    """Cores that nobody uses; at least 1. load: jobs that run already."""
    return max(1, round(cores - load))


def choose(device):
    """On a CPU, leave the cores that are in use alone, unless OMP_NUM_THREADS says how many to
    take. The number changes results in their last digits alone."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0))
    threads = idle(cores, os.getloadavg()[0])
    torch.set_num_threads(threads)
    tell(f"{threads} of {cores} cores, by what is idle; OMP_NUM_THREADS sets another number")
