"""The lessons of the course, read from docs/course/*.md.

A lesson has the sections of SECTIONS. Two kinds of things in its text are filled in when it is shown:

  `FILE` from `TEXT` to `TEXT`   gets the numbers of the lines that hold these texts
  {{KIND FIELD key=value ...}}   becomes a figure of the published records: FIELD of the row of this kind that
                                 has these values. No lesson has a measured number of its own.

On a terminal, `![TITLE](FILE)` becomes the path of the drawing.

The last paragraph of the section Exercise says how it is checked: "Solve: NAME, NAME" (exercises of `lab
exercise`, in both languages), "Answer: {{...}}" (a number, within 10 %) or "Try: OP" (a kernel that `lab try`
accepts).
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.files import read_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "course"
RECORDS = ROOT / "reports" / "h100" / "records.jsonl"
SECTIONS = ("Read", "Predict", "Run", "Figures", "Exercise", "Hints", "Explanation")
PLACEHOLDER = re.compile(r"\{\{(\w+) (\w+)((?: [\w.]+=\S*?)*)\}\}")
READING = re.compile(r"`([\w./]+)` from `([^`]+)` to `([^`]+)`")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
GOAL = re.compile(r"^(Solve|Answer|Try): (.+)$", re.M)
CLOSE = 0.1  # of the right answer: how far an answer may be off


@dataclass(frozen=True)
class Lesson:
    number: int
    title: str
    about: str  # the lines above the first section: time, what it assumes, words of the glossary
    sections: dict[str, str]

    def shown(self, section: str) -> str:
        """A section with lines and figures filled in, without the line that says how it is checked."""
        text = GOAL.sub("", self.sections[section])
        text = IMAGE.sub(rf"Drawing: {FOLDER.relative_to(ROOT)}/\2 (\1)", text)
        return filled(READING.sub(where, text)).strip()

    @property
    def commands(self) -> list[str]:
        """What the section Run asks for: one command a line."""
        blocks = re.findall(r"```sh\n(.*?)```", self.sections["Run"], re.S)
        return [line for block in blocks for line in block.splitlines() if line.strip()]

    @property
    def words(self) -> list[str]:
        found = re.search(r"^Words: ([^([]+)", self.about, re.M)
        return [word.strip() for word in found[1].split(",")] if found else []

    @property
    def hints(self) -> list[str]:
        parts = re.split(r"^\d\. ", self.sections["Hints"], flags=re.M)[1:]
        return [" ".join(part.split()) for part in parts]

    @property
    def goal(self) -> tuple[str, str]:
        """("Solve", "barrier, bank_conflict"), ("Answer", a placeholder) or ("Try", an op)."""
        found = GOAL.search(self.sections["Exercise"])
        return found[1], found[2].strip()

    @property
    def exercises(self) -> list[str]:
        how, what = self.goal
        return [name.strip() for name in what.split(",")] if how == "Solve" else []

    def right(self, answer: float) -> bool:
        """Whether a number is the answer, within CLOSE. Times are in us, as in the records."""
        match = PLACEHOLDER.fullmatch(self.goal[1])
        want = value(*match.groups())
        return abs(answer - want) <= CLOSE * abs(want)


@functools.lru_cache(maxsize=1)
def all_lessons() -> dict[int, Lesson]:
    """The lessons by number. Raises LabError for a file that lacks a section."""
    found = {}
    for path in sorted(FOLDER.glob("[0-9]*.md")):
        head, *parts = re.split(r"^## ", read_text(path), flags=re.M)
        title = re.match(r"# (\d+)\. (.+)\n", head)
        sections = {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}
        if title is None or tuple(sections) != SECTIONS or not GOAL.search(sections["Exercise"]):
            raise LabError(f"{path} is no lesson: it needs a number, and the sections {', '.join(SECTIONS)}")
        number = int(title[1])
        found[number] = Lesson(number, title[2], head[title.end() :].strip(), sections)
    return found


def where(match: re.Match) -> str:
    """A match of READING as it is shown: `lab/ops/linear.py` lines 127-128."""
    first, last = lines(*match.groups())
    return f"`{match[1]}` lines {first}-{last}"


def lines(path: str, first: str, last: str) -> tuple[int, int]:
    """The numbers of the first line of a file that holds `first`, and of the next that holds `last`."""
    begin = 0
    for number, line in enumerate(read_text(ROOT / path).splitlines(), 1):
        if not begin and first in line:
            begin = number
        if begin and last in line:
            return begin, number
    raise LabError(f"{path} has no lines from {first!r} to {last!r}, which a lesson names")


# ---- figures -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def rows() -> list[dict]:
    return [json.loads(line) for line in read_text(RECORDS).splitlines()]


def holds(row: dict, key: str, wanted: str) -> bool:
    """Whether a row has a value: shape.n=4096 looks into `shape`, models=X into a list."""
    found = row
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, list):
        return wanted in found
    return ("" if found is None else str(found).lower()) == wanted.lower()


def value(kind: str, field: str, keys: str) -> float:
    """The number that a placeholder stands for. Raises LabError unless the rows that match agree on it.

    Where it does not say so, it means what was timed as a CUDA graph, with cold caches, and no rung of a
    ladder; of a rung, the size of the whole ladder.
    """
    wanted = dict(pair.split("=", 1) for pair in keys.split())
    usual = {
        "op": {"timer": "graph", "rung": "", "cache": "cold", "weight_format": "", "config.partial": ""},
        "model": {"timer": "graph"},
    }
    wanted = {**usual.get(kind, {}), **wanted}
    found = [r for r in rows() if r["kind"] == kind and all(holds(r, k, v) for k, v in wanted.items())]
    numbers = {r[field] for r in found if field in r}
    if len(numbers) != 1:
        raise LabError(f"{{{{{kind} {field}{keys}}}}}: {len(numbers)} different values in {RECORDS.name}")
    return float(numbers.pop())


def written(field: str, number: float) -> str:
    """A number of a record with its unit, which its field implies."""
    if field.startswith("us"):
        return f"{number / 1000:,.2f} ms" if number >= 1000 else f"{number:,.1f} us"
    if field.startswith("of_"):
        return f"{number:.0%}".replace("%", " %")
    if field == "bytes":
        return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
    return f"{number:,.0f} GB/s" if field == "gbps" else f"{number:,.0f}"


def filled(text: str) -> str:
    """The text with its placeholders replaced by figures."""
    return PLACEHOLDER.sub(lambda m: written(m[2], value(*m.groups())), text)
