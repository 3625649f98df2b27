"""The helpers that a step of a kernel calls, from the folders `core` of both languages, with file and line.

The loop in which a kernel spends its time is often in such a helper: linear's in RowStream::multiply. A call
is resolved as a reader would do it: a function by its name, a method by the type in the nearest declaration
of its object above the call. A call that cannot be resolved so (the type is a template's parameter) is not
unfolded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from lab.report.twins import ROOT

DEEPEST = 3  # calls within calls
SHORTEST = 4  # lines: what is shorter says no more than its name
DEFINITION = re.compile(r"^( *)LAB_DEVICE(?:_ONCE|_CALL)?\s+(?:static )?.*?\b(\w+)\((?!\()")
STRUCT = re.compile(r"^(?:struct|class)\s+(?:alignas\([^)]*\)\s+)?(\w+)")
METHOD = re.compile(r"\b(\w+)\.(?:template )?(\w+)(?:<[^;()]*?>)?\(")
FUNCTION = re.compile(r"(?<![\w.>])(\w+)(?:<[^;()]*?>)?\(")


@dataclass(frozen=True)
class Helper:
    """A function: `first` is the number of its first line in `file` (relative to the checkout)."""

    name: str
    file: str
    first: int
    lines: tuple[str, ...]

    @property
    def code(self) -> str:
        return "\n".join(self.lines)


def helpers(language: str, file: str, first: int, count: int) -> list[Helper]:
    """The helpers that `count` lines of a file call, from line `first` on, and those that these call: each
    once, in the order of the calls."""
    found: list[Helper] = []
    _collect(language, file, first, count, DEEPEST, found)
    return found


def _collect(language, file, first, count, depth, found) -> None:
    lines = _lines(file)
    for number in range(first, min(first + count, len(lines) + 1)):
        for helper in _called(language, lines, number):
            if (
                helper in found
                or len(helper.lines) < SHORTEST
                or (helper.file, helper.first) == (file, first)
            ):
                continue
            found.append(helper)
            if depth > 1:  # its own first line would call itself
                _collect(language, helper.file, helper.first + 1, len(helper.lines) - 1, depth - 1, found)


def _called(language, lines, number):
    line = lines[number - 1].split("//" if language == "cuda" else "#")[0]
    functions, methods = _index(language)
    for call in METHOD.finditer(line):
        type_ = _type_of(call[1], lines, number)
        if (type_, call[2]) in methods:
            yield methods[(type_, call[2])]
    for call in FUNCTION.finditer(line):
        if call[1] in functions:
            yield functions[call[1]]


def _type_of(name, lines, number) -> str | None:
    """The type in the nearest declaration of a variable or parameter at or above a line, in the same function
    or struct."""
    declared = re.compile(rf"\b([A-Z]\w+)(?:<[^;()]*?>)?[&*]?\s+{name}\s*[(,;)={{]")
    for line in reversed(lines[:number]):
        found = declared.search(line)
        if found:
            return found[1]
        if line.startswith("}"):  # the end of the function or struct before
            return None
    return None


@functools.lru_cache(maxsize=None)
def _lines(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


@functools.lru_cache(maxsize=None)
def _index(language: str):
    """({name: Helper}, {(type, name): Helper}) of a language's folder core; of overloaded names the first."""
    functions, methods = {}, {}
    folder, endings = ("cuda_src", (".cuh", ".h")) if language == "cuda" else ("triton_kernels", (".py",))
    for path in sorted((ROOT / folder / "core").iterdir()):
        if path.suffix not in endings:
            continue
        file = str(path.relative_to(ROOT))
        for owner, name, first, end in (_cuda if language == "cuda" else _triton)(_lines(file)):
            helper = Helper(
                f"{owner}::{name}" if owner else name, file, first, tuple(_lines(file)[first - 1 : end])
            )
            (methods.setdefault((owner, name), helper) if owner else functions.setdefault(name, helper))
    return functions, methods


def _cuda(lines):
    """(struct or "", name, first line, last line) of each device function. Files have one format, so a body
    ends at a brace as far to the right as the function began."""
    struct = ""
    for number, line in enumerate(lines, 1):
        if STRUCT.match(line) and not line.rstrip().endswith(";"):
            struct = STRUCT.match(line)[1]
        elif line.startswith("};"):
            struct = ""
        found = DEFINITION.match(line)
        if found:
            indent, end = found[1], number
            closed = line.rstrip().endswith(("}", ";"))
            while not closed and end < len(lines):
                end += 1
                closed = lines[end - 1].startswith(indent + "}")
            yield (struct if indent else ""), found[2], number, end


def _triton(lines):
    for number, line in enumerate(lines, 1):
        found = re.match(r"def (\w+)\(", line)
        if found and lines[number - 2].startswith("@triton.jit"):
            end = number
            while end < len(lines) and (not lines[end] or lines[end][0] in " )"):
                end += 1
            while not lines[end - 1].strip():
                end -= 1
            yield "", found[1], number, end
