"""Values on the command line: lists of names and of numbers, durations."""

import argparse

from lab.errors import LabError
from lab.numbers import integer, number


def items(text):
    """ "a, b" -> ["a", "b"]."""
    return [item for item in (part.strip() for part in text.split(",")) if item]


def names(text):
    """ "a,b" -> ["a", "b"]; raises LabError where there is none."""
    found = items(text)
    if not found:
        raise LabError(f"{text!r}: write names with commas, as in a,b")
    return found


def numbers(text):
    """ "1,8" -> [1, 8]; raises LabError for anything that is no positive integer."""
    try:
        found = [integer(item) for item in items(text)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise LabError(f"{text!r}: write positive integers with commas, as in 1,8")
    return found


def duration(text):
    """ "0.5" -> 0.5; ValueError, which argparse turns into its message, for anything negative or not
    finite."""
    value = number(text)
    if value < 0:
        raise ValueError(text)
    return value


def seconds(text: str) -> float:
    """A time limit as the command line has it."""
    try:
        value = number(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value
