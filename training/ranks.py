"""The processes of a run: torchrun's ranks, what they tell each other, and how they are stopped.

Every function here also works without torchrun: then there is one rank and nothing to exchange.
"""
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from training.errors import STOPPED_AT_ONCE, Failure, reason_of
from training.terminal import complain_at_once, tell, warn

MOST_WAIT = timedelta(hours=6)  # of ranks for each other: one alone embeds all prompts
ECHO = 2.0                      # seconds, see StopSignal
PATIENCE = 20                   # seconds that ranks wait for each other without a word
TORCHRUN = "start the ranks with torchrun --nproc-per-node RANKS, or leave WORLD_SIZE unset"


def world():
    """(rank, number of ranks); (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_rank_0():
    return world()[0] == 0


def number_of_ranks():
    """As the environment says, before the ranks have met. Raises ValueError, with the sentence for
    the user, for what torchrun would not set."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"WORLD_SIZE={given}: not a number of ranks; {TORCHRUN}")
    return int(given)


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
        meet(backend)
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def meet(backend):
    """Wait until all ranks are here, and make them a group. Raises Failure where they cannot
    meet."""
    ranks = number_of_ranks()
    patience = threading.Timer(PATIENCE, warn, [f"waiting for {ranks} ranks to meet; {TORCHRUN}"])
    patience.daemon = True
    patience.start()
    try:
        dist.init_process_group(backend, timeout=MOST_WAIT)
        # a rank that fails right after this line would break the rendezvous of those still in it
        barrier()
    except (RuntimeError, ValueError) as e:
        raise Failure(f"the {ranks} ranks of WORLD_SIZE cannot meet ({reason_of(e)}); "
                      f"{TORCHRUN}") from e
    finally:
        patience.cancel()


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


def tell_once(text):
    """One line on rank 0's standard output."""
    if is_rank_0():
        tell(text)


class StopSignal:
    """Turns Ctrl-C, SIGTERM and a closed terminal (SIGHUP) into a stop after the running
    iteration; a second Ctrl-C or SIGTERM ends the process at once. A batch system sends SIGTERM to
    every process of a job, and torchrun passes its own on: one that comes within ECHO seconds of
    the first is no second.

    torchrun passes the first on to all ranks, and kills those that are not gone 30 s later: its
    --shutdown-timeout SECONDS (torch 2.13) should be longer than an iteration and a checkpoint.
    """

    def __init__(self):
        self.asked = False
        self.asked_at = None                # when the first Ctrl-C or SIGTERM came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup has it ignored
            signal.signal(signal.SIGHUP, self.hang_up)

    def hang_up(self, number, frame):
        """A closed terminal may signal several times, and torchrun then sends SIGTERM: neither is
        a user who asks once more."""
        if not self.asked:
            complain_at_once("stopping after this iteration")
        self.asked = True

    def ask(self, number, frame):
        if self.asked_at is None:
            self.asked = True
            self.asked_at = time.monotonic()
            complain_at_once("stopping after this iteration; once more to stop at once")
            return
        if number == signal.SIGTERM and time.monotonic() - self.asked_at < ECHO:
            return
        # not by an exception: a library in the middle of a call may turn it into its own
        if is_rank_0():                 # torchrun signals all ranks
            complain_at_once(f"{Path(sys.argv[0]).name}: {STOPPED_AT_ONCE}")
        os._exit(1)

    def asked_of_any_rank(self):
        """Has any rank been asked to stop? All ranks must ask this together."""
        self.asked = any_rank(self.asked)
        return self.asked
