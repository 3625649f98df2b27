"""Names that a user types: looked up among the known ones, with a suggestion for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from lab.errors import LabError


def known(name: str, choices: Sequence[str], what: str) -> str:
    """Returns `name` if it is one of `choices`; otherwise raises a LabError that lists them."""
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise LabError(f"unknown {what} {name!r}: {hint}choose from {', '.join(choices)}")
