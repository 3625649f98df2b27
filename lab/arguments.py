"""Values on the command line: lists of names and of numbers, durations."""

import argparse

from lab.errors import LabError
from lab.numbers import integer, number


def items(text):
    """Splits "a, b" into ["a", "b"]."""
    return [item for item in (part.strip() for part in text.split(",")) if item]


def names(text):
    """As items(). Raises LabError where there is none."""
    found = items(text)
    if not found:
        raise LabError(f"{text!r}: write names with commas, as in a,b")
    return found


def numbers(text):
    """Converts "1,8" to [1, 8]. Raises LabError for anything that is no positive integer."""
    try:
        found = [integer(item) for item in items(text)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise LabError(f"{text!r}: write positive integers with commas, as in 1,8")
    return found


def duration(text):
    """Converts "0.5" to 0.5. Raises ValueError, which argparse turns into its message, for a negative or
    infinite number."""
    value = number(text)
    if value < 0:
        raise ValueError(text)
    return value


def seconds(text: str) -> float:
    """A time limit in seconds, from the command line."""
    try:
        value = number(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def gibibytes(text: str) -> float:
    """An amount of memory in GiB, from the command line."""
    try:
        value = number(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB")
    return value
