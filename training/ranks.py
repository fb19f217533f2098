"""The processes of a run: torchrun's ranks, what they tell each other, and how they are stopped.

Every function here also works without torchrun: then there is one rank and nothing to exchange.
"""
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from training.errors import AT_ONCE


def world():
    """(rank, number of ranks); (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def quiet():
    """Stop diffusers and transformers from printing warnings and progress bars. They still raise
    their errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()


def start(alone=False):
    """Join torchrun's process group, if there is one. Returns this process's device.

    alone: without torchrun, make a group of one rank. Sharding needs a group.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"      # gloo too: flags and offloaded tensors are on the host
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if dist.is_initialized():
        return device
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
        # a rank that fails right after this line would break the rendezvous of those still in it
        barrier()
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def barrier():
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """Rank 0's value, on every rank. Any object that pickles."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag):
    """Is the flag set on any of the ranks? The answer is the same on all of them."""
    if dist.is_initialized():
        flag = torch.tensor(float(flag))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gather_lists(values):
    """The lists of all ranks joined into one, on every rank."""
    lists = [values] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def goodbye(out):
    """Tell the user that a stopped run can go on. out: Output."""
    print(f"stopped; everything is in {out.path}; go on with --resume auto")


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a stop after the running iteration; a second signal ends the
    process at once.

    bool(stop): has any rank been asked to stop? All ranks must ask together.
    """

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked:
            # not by an exception: a library in the middle of a call may turn it into its own
            if world()[0] == 0:             # torchrun signals all ranks
                os.write(2, f"\n{Path(sys.argv[0]).name}: {AT_ONCE}\n".encode())
            os._exit(1)
        self.asked = True
        # os.write, because print fails if the signal came inside another print
        os.write(2, b"\nstopping after this iteration; once more to stop at once\n")

    def __bool__(self):
        self.asked = any_rank(self.asked)
        return self.asked
