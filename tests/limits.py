"""A limit of time for what would hang."""
import signal
from contextlib import contextmanager


@contextmanager
def within(seconds):
    """What takes longer fails."""
    def too_long(number, frame):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
