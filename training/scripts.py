"""What every script beside the training runs shares: the flags it is given, and the folder of its
results."""
import argparse
import math
from pathlib import Path

from training.errors import Failure, usage
from training.output import is_run


def parser_for(doc):
    """A parser that tells a script's docstring for --help, and an error of the flags in one
    line."""
    p = argparse.ArgumentParser(description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: usage([message])
    return p


def a_count(text):
    """An argparse type: a whole number above 0."""
    return whole_number(text, 1)


def zero_or_more(text):
    """An argparse type: a whole number, 0 or above."""
    return whole_number(text, 0)


def whole_number(text, least):
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if not least <= number < 2**63:             # torch takes no larger
        raise argparse.ArgumentTypeError(f"{text} must be {least} or above, and below 2^63")
    return number


def a_factor(text):
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0, and finite")
    return number


def folder_for(path, flag="--out"):
    """Make a folder for results -> Path. Raises Failure if it cannot be made, or is a training
    run's, whose results of the same names would be lost."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Failure(f"{flag} {path}: {e.strerror}; choose a directory that can be written")
    if is_run(path):
        raise Failure(f"{flag} {path} holds a training run; choose another directory")
    return path
