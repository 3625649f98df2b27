"""Numbers that a user types, in plain notation only.

Python's int() and float() accept more than that: 1_0, " 10", full-width digits.
"""

import re

INTEGER = re.compile(r"-?[0-9]{1,400}")
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def integer(text: str) -> int:
    """Converts "-12" to -12. Raises ValueError for anything but ASCII digits after an optional minus sign."""
    if not INTEGER.fullmatch(text):
        raise ValueError(f"not an integer: {text!r}")
    return int(text)


def number(text: str) -> float:
    """Converts "1.5" or "1e-3" to a float. Raises ValueError for any other notation, and for nan, inf and
    1e999."""
    value = float(text) if NUMBER.fullmatch(text) else float("inf")
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"not a number: {text!r}")
    return value
