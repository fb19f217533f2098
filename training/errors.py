"""Errors the user can fix: one line on stderr and an exit code, instead of a traceback.

`one_line` decides which errors are of that kind; all others keep their traceback.
"""
import errno
import os
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from training.terminal import complain, unbreakable_streams

STOPPED_AT_ONCE = "stopped at once; checkpoints already written are whole"


class Failure(Exception):
    """An error the user can fix. Its message is one line that names the file, flag or value, and
    says what to do."""


class NotFinite(Failure):
    """A gradient is not finite. Every rank raises it, in the same iteration."""


def usage(problems):
    """Report wrong flags: prints all problems, a list of sentences, on one line, and exits with
    code 2."""
    has_other_ranks = "WORLD_SIZE" in os.environ
    if not has_other_ranks or os.environ.get("RANK", "0") == "0":
        complain(f"{Path(sys.argv[0]).name}: error: {'; '.join(problems)}")
    raise SystemExit(2)


# ---------------------------------------------------------------------- which errors are one line

OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed",
                 "not enough memory")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "Socket closed", "Connection refused", "remote process exited", "connectFullMesh",
             "failed to recv", "Failed to recv")


def one_line(error):
    """The line that tells Ctrl-C or an error which the user can fix, or None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED_AT_ONCE
    if isinstance(error, Failure):
        return str(error)
    if is_out_of_memory(error):
        return (f"out of memory ({reason_of(error)}); give a smaller --batch-size (a larger "
                f"--accumulate makes up for it), --grad-checkpointing or --cpu-offload")
    if is_lost_peer(error):
        return ("another rank has ended, and this one cannot go on alone; start all of them again "
                "with --resume auto")
    number = number_of(error)
    if number is None:
        return None
    where = f"{error.filename}: " if getattr(error, "filename", None) else ""
    return (f"{where}{os.strerror(number)}; {cure_of(error)} and start again (a run: with "
            f"--resume auto)")


def reason_of(error):
    """An error's first line, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if number_of(error) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_lost_peer(error):
    """Whether a rank failed because another one is gone."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return any(text in str(error) for text in LOST_PEER)


def number_of(error):
    """The system's number of an error, or None. safetensors has an error class of its own, with the
    number in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def cure_of(error):
    """What to do about an error of the disk."""
    number = number_of(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make it writable"
    return "put that right"


# ------------------------------------------------------------------------------------- to the end

def first_to_fail():
    """True on the first rank that calls this, False on all others. When one rank fails, the
    collectives of the others fail as well, or they stop for the same reason: only the first one
    prints a message."""
    try:
        if not dist.is_initialized():
            return True
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:        # rank 0 kept the store, and has left with a message
        return False


def run_main(main):
    """Call main() and return what it returns. An error the user can fix, or Ctrl-C, ends in one
    line, printed by one rank, and exit code 1. Other errors of the first rank keep their
    traceback."""
    unbreakable_streams()
    try:
        result = main()
    except (Exception, KeyboardInterrupt) as error:
        line = one_line(error)
        if line is None and not dist.is_initialized():
            raise
        if first_to_fail():
            tell_failure(error, line)
        if dist.is_initialized():
            # not by way of destroy_process_group: NCCL's waits for the other ranks, and they may be
            # in the middle of a collective, waiting for this one
            sys.stdout.flush()
            os._exit(1)
        raise SystemExit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def tell_failure(error, line):
    """line: see one_line."""
    if line is None:
        traceback.print_exception(error)
        return
    print(file=sys.stderr)                                      # below a progress bar
    complain(f"{Path(sys.argv[0]).name}: {line}")


# ------------------------------------------------------------------------- what comes from outside

def none_missing(names):
    """Check that a file had a value for every weight. Libraries fill the others with random
    numbers and go on.

    names: of the weights without a value. Raises ValueError if there are any.
    """
    names = sorted(names)
    if names:
        raise ValueError(f"no value there for {names[0]}")


def first_not_finite(tensors):
    """The name of the first of these {name: tensor} that holds a NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            return name
    return None


def read_prompts(path, flag="--prompts"):
    """The prompts of a text file, one a line, as a list of strings. Raises Failure, with the number
    of the line, if the file is missing, empty, not UTF-8, or has blank lines."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except OSError as e:
        raise Failure(f"{flag} {path}: {e.strerror}; give a text file with one prompt a line")
    except UnicodeDecodeError as e:
        number = e.object[:e.start].count(b"\n") + 1
        raise Failure(f"{flag} {path}: line {number} is not UTF-8; save the file as UTF-8")
    if lines[-1] == "":                                         # below the last line feed
        lines.pop()
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise Failure(f"{flag} {path}: line {blank[0]} is blank; take blank lines out "
                      f"({len(blank)} in all)")
    if not lines:
        raise Failure(f"{flag} {path}: the file is empty; write one prompt a line")
    return [line.strip() for line in lines]
