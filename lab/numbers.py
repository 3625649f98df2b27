"""Numbers that a user writes.

Python's int() and float() take more than anybody means: 1_0, " 10", full-width digits.
"""

import re

INTEGER = re.compile(r"-?[0-9]{1,400}")
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def integer(text: str) -> int:
    """ "-12" -> -12. Raises ValueError for whatever is not a minus sign, at most, and ASCII digits."""
    if not INTEGER.fullmatch(text):
        raise ValueError(f"not an integer: {text!r}")
    return int(text)


def number(text: str) -> float:
    """ "1.5", "1e-3" -> float. Raises ValueError for any other notation, and for nan, inf and 1e999."""
    value = float(text) if NUMBER.fullmatch(text) else float("inf")
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"not a number: {text!r}")
    return value
