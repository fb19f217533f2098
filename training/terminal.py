"""What a run says: its messages reach the terminal through `tell`, `warn` or `complain`.

A terminal can be closed, and a file that stands for it can be on a full disk. What cannot be
written is then lost, and the run goes on.
"""
import os
import sys
from contextlib import suppress


def printable(text):
    """A text as one line that leaves the terminal as it is. A prompt, a path or a stranger's file
    may hold line feeds, or escapes that move the cursor or set the title."""
    line = "".join(" " if c.isspace() else c for c in str(text)).strip()
    return "".join(c if c.isprintable() else "?" for c in line)


def tell(text):
    """One line on standard output."""
    print(printable(text))


def complain(text):
    """One line on standard error."""
    print(printable(text), file=sys.stderr)


def warn(text):
    """One line on standard error, which the run goes on after."""
    complain(f"warning: {text}")


def complain_at_once(text):
    """The same from a signal's handler, where print fails if the signal came inside a print."""
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{printable(text)}\n".encode())


class Unbreakable:
    """A stream that takes every text, whether it can be written or not. Also a progress bar's."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def unbreakable_streams():
    """Make standard output and standard error unbreakable, also where the process was started
    without them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:                 # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Unbreakable):
            continue
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        with suppress(OSError, ValueError, AttributeError):
            stream.reconfigure(errors="backslashreplace")       # an ASCII terminal has no emoji
        setattr(sys, name, Unbreakable(stream))


def quiet_hub():
    """Stop the hub's library from telling of each retry."""
    from huggingface_hub import logging
    logging.set_verbosity(logging.CRITICAL)


def quiet():
    """Stop diffusers, transformers and the hub's library from printing warnings and progress bars.
    They still raise their errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
    quiet_hub()
