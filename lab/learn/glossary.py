"""The glossary, which is a table of docs/ARCHITECTURE.md: `lab explain --glossary WORD`."""

from __future__ import annotations

import difflib
from pathlib import Path

from lab.errors import LabError

FILE = Path(__file__).resolve().parents[2] / "docs" / "ARCHITECTURE.md"


def entries() -> dict[str, str]:
    """{"role": meaning}: each word of the table on its own, also where a row has several ("use, role")."""
    table = FILE.read_text().split("## Glossary")[1].split("\n## ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|", 1)]
        if len(cells) < 2 or cells[0] == "word" or not cells[0].strip("-"):
            continue
        for word in cells[0].split(","):
            found[word.strip().lower()] = cells[1].strip().rstrip("|").strip()
    return found


def meaning(word: str) -> str:
    """What a word means here. Raises LabError, with near words, if the glossary has no such word."""
    known = entries()
    if word.lower() in known:
        return known[word.lower()]
    near = difflib.get_close_matches(word.lower(), known, 3)
    near += [other for other in known if word.lower() in other.split() and other not in near]
    said = f"did you mean {', '.join(near)}?" if near else "`lab explain --glossary` lists all words"
    raise LabError(f"the glossary has no word {word!r}: {said}")


def show(word: str) -> int:
    """Prints the meaning of a word, or of all words if it is empty. Returns the exit status."""
    for name, text in entries().items() if not word else [(word, meaning(word))]:
        print(f"{name}: {text}")
    return 0
