"""Import this before the libraries, which take seconds: Ctrl-C in that time is then one line."""
import sys

plain_hook = sys.excepthook


def quiet_hook(kind, error, trace):
    """As Python's own, but for Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped before it began", file=sys.stderr)
    else:
        plain_hook(kind, error, trace)


sys.excepthook = quiet_hook
