"""A mutant: one place of a source file, and what is written there instead."""

import re
from typing import NamedTuple


class Mutant(NamedTuple):
    """In `file` (from the project's root) the text `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str
    why: str
    op: str = ""  # `lab check --op` of it
    tests: str = ""  # what pytest runs besides; with "only", in its place
    dtype: str = ""  # of the check; all by default


def places(text: str, old: str) -> list[re.Match]:
    """Where `old` stands in `text`: as it is written if it is there once, else however either is broken into
    lines and indented."""
    exact = list(re.finditer(re.escape(old), text))
    if len(exact) == 1:
        return exact
    tokens = re.findall(r"\w+|[^\w\s]", old)
    pattern = r"\b" if tokens[0][0].isalnum() else ""
    for token, following in zip(tokens, [*tokens[1:], ""]):
        # Two words need space between them; all else may have some.
        two_words = re.fullmatch(r"\w+", token + following)
        pattern += re.escape(token) + ("" if not following else r"\s+" if two_words else r"\s*")
    return list(re.finditer(pattern + (r"\b" if tokens[-1][-1].isalnum() else ""), text))


def mutate(text: str, mutant: Mutant) -> str:
    """The text with the mutant in it. Raises AssertionError where its place is not there, or not once."""
    found = places(text, mutant.old)
    assert len(found) == 1, f"{mutant.file}: {len(found)} times in the file: {mutant.old!r}"
    return text[: found[0].start()] + mutant.new + text[found[0].end() :]
