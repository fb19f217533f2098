"""Errors the user can fix: one line on stderr and an exit code, instead of a traceback."""
import os
import sys
from pathlib import Path

import torch.distributed as dist

AT_ONCE = "stopped at once; checkpoints already written are whole"


class Failure(Exception):
    """An error the user can fix. Its message is one line that names the file, flag or value, and
    says what to do."""


class NotFinite(Failure):
    """A gradient is not finite. Every rank raises it, in the same iteration."""


def usage(problems):
    """Report wrong flags: prints all problems, a list of sentences, on one line, and exits with
    code 2."""
    if os.environ.get("RANK", "0") == "0":
        line = " ".join("; ".join(problems).splitlines())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


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
    """Call main() and return what it returns. A Failure, a full disk or Ctrl-C ends in one line,
    printed by one rank, and exit code 1. Other errors of the first rank keep their traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        line = AT_ONCE
        first = first_to_fail()
    except Exception as error:
        line = " ".join(str(error).splitlines())
        first = first_to_fail()
        if "No space left" in line:         # by its text: safetensors has an error class of its own
            line += "; free some space, then --resume auto"
        elif first and not isinstance(error, Failure):
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        raise SystemExit(f"\n{Path(sys.argv[0]).name}: {line}")         # below a progress bar
    raise SystemExit(1)


def none_missing(names):
    """Check that a file had a value for every weight. Libraries fill the others with random
    numbers and go on.

    names: of the weights without a value. Raises ValueError if there are any.
    """
    names = sorted(names)
    if names:
        raise ValueError(f"no value there for {names[0]}")


def read_prompts(path, flag="--prompts"):
    """The prompts of a text file, one a line, as a list of strings. Raises Failure, with the number
    of the line, if the file is missing, empty, not UTF-8, or has blank lines."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except OSError as e:
        raise Failure(f"{flag} {path}: {e.strerror}; give a text file with one prompt a line")
    except UnicodeDecodeError as e:
        number = e.object[:e.start].count(b"\n") + 1
        raise Failure(f"{flag} {path}: line {number} is not UTF-8; save the file as UTF-8")
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise Failure(f"{flag} {path}: line {blank[0]} is blank; take blank lines out "
                      f"({len(blank)} in all)")
    if not lines:
        raise Failure(f"{flag} {path}: the file is empty; write one prompt a line")
    return [line.strip() for line in lines]
