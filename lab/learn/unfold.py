"""A kernel's code with the helpers that it calls, from the folders `core` of both languages, unfolded at the
place of the call.

The loop in which a kernel spends its time is often in such a helper: linear's in RowStream::multiply. A call
is resolved as a reader would do it: a function by its name, a method by the type in the nearest declaration
of its object above the call. If that type is a template's parameter of one letter, as attention's A, it is
each type of the included files that has all methods which the kernel calls on it. Another call is not
unfolded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from lab.report.twins import ROOT

DEEPEST = 3  # calls within calls
SHORTEST = 4  # lines: what is shorter says no more than its name
DEFINITION = re.compile(r"^( *)LAB_DEVICE(?:_ONCE|_CALL)?\s+(?:static )?.*?\b(\w+)\((?!\()")
LOOP = {
    "cuda": re.compile(r"^\s*(?:for|while) \("),
    "triton": re.compile(r"^\s*(?:for .* in (?:tl\.)?range\(|while )"),
}
UNROLLED = re.compile(r"^\s*LAB_UNROLL")  # above a loop over the elements that one lane has
STRUCT = re.compile(r"^(?:struct|class)\s+(?:alignas\([^)]*\)\s+)?(\w+)")
BASE = re.compile(r"^struct (\w+) : (?:public )?(\w+)", re.M)
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


@dataclass(frozen=True)
class Piece:
    """Consecutive lines of a file. `depth`: how many calls lead to them from the kernel. `helper`: whose code
    begins here, or None."""

    file: str
    first: int
    lines: tuple[str, ...]
    depth: int
    helper: Helper | None = None

    @property
    def code(self) -> str:
        return "\n".join(self.lines)


def pieces(
    language: str, file: str, first: int, count: int, which: str = "all", seen: set | None = None
) -> list[Piece]:
    """`count` lines of a file, from line `first` on, each call of a helper followed by the helper's code.

    which: "all" helpers, or those of "loops": that hold a loop which is not unrolled, or call one that does,
    or are called in one; or "none". seen: helpers that have been unfolded, each of which is unfolded once;
    new ones are added.
    """
    seen = set() if seen is None else seen
    return list(_pieces(language, file, first, count, which, seen, 0, None))


def _pieces(language, file, first, count, which, seen, depth, helper):
    lines, start = _lines(file), first
    last = min(first + count - 1, len(lines))
    number = first + (helper is not None)  # a helper's own first line would call itself
    while number <= last:
        end = _end_of_statement(lines, number, last)
        found = []
        for n in range(number, end + 1) if depth < DEEPEST and which != "none" else ():
            for called in _called(language, file, n):
                itself = (called.file, called.first) == (file, first)
                short = len(called.lines) < SHORTEST
                if called not in seen and not itself and not short:
                    if which == "all" or _loops(language, called) or _in_loop(language, lines, n):
                        seen.add(called)
                        found.append(called)
        if found:
            yield Piece(file, start, tuple(lines[start - 1 : end]), depth, helper)
            start, helper = end + 1, None
            for called in found:
                inner = called.file, called.first, len(called.lines)
                yield from _pieces(language, *inner, which, seen, depth + 1, called)
        number = end + 1
    if start <= last:
        yield Piece(file, start, tuple(lines[start - 1 : last]), depth, helper)


def _end_of_statement(lines, number, last):
    """The line at which the parentheses that a line opens are closed again."""
    still_open = 0
    for n in range(number, last + 1):
        still_open += lines[n - 1].count("(") - lines[n - 1].count(")")
        if still_open <= 0:
            return n
    return number


def _is_loop(language, lines, number) -> bool:
    """Is line `number` the head of a loop that is not unrolled?"""
    unrolled = number > 1 and UNROLLED.match(lines[number - 2])
    return bool(LOOP[language].match(lines[number - 1])) and not unrolled


def _in_loop(language, lines, number) -> bool:
    """Does a line stand in such a loop? Its head is less indented than its body: files have one format."""
    indent = _indent(lines[number - 1])
    for n in range(number - 1, 0, -1):
        if lines[n - 1].strip() and _indent(lines[n - 1]) < indent:
            indent = _indent(lines[n - 1])
            if _is_loop(language, lines, n):
                return True
        if indent == 0:
            break
    return False


def _indent(line) -> int:
    return len(line) - len(line.lstrip())


@functools.lru_cache(maxsize=None)
def _loops(language, helper, depth=DEEPEST) -> bool:
    """Does a helper hold a loop that is not unrolled, or call one that does?"""
    if any(_is_loop(language, helper.lines, n) for n in range(1, len(helper.lines) + 1)):
        return True
    return depth > 1 and any(
        _loops(language, called, depth - 1)
        for number in range(helper.first + 1, helper.first + len(helper.lines))
        for called in _called(language, helper.file, number)
        if called != helper
    )


def _called(language, file, number):
    """The helpers that a line of a file calls."""
    lines = _lines(file)
    line = lines[number - 1].split("//" if language == "cuda" else "#")[0]
    functions, methods = _index(language)
    for call in METHOD.finditer(line):
        type_ = _type_of(call[1], lines, number)
        if (type_, call[2]) in methods:
            yield methods[(type_, call[2])]
        elif language == "cuda" and type_ and len(type_) == 1:
            yield from _of_parameter(file, number, call[1], call[2])
    for call in FUNCTION.finditer(line):
        if call[1] in functions:
            yield functions[call[1]]


def _of_parameter(file, number, name, method):
    """The methods that `name.method` may be, if the type of `name` is a template's parameter."""
    lines = _lines(file)
    end = next((n for n in range(number, len(lines)) if lines[n].startswith("}")), len(lines))
    begin = next((n for n in range(number, 0, -1) if lines[n - 1].startswith(("}", "template"))), 1)
    called = {c[2] for line in lines[begin - 1 : end] for c in METHOD.finditer(line) if c[1] == name}
    within, (_, methods) = _included(file), _index("cuda")
    bases = dict(BASE.findall("\n".join(line for inner in sorted(within) for line in _lines(inner))))
    for owner in dict.fromkeys(owner for (owner, _), helper in methods.items() if helper.file in within):
        has = {m: methods.get((owner, m)) or methods.get((bases.get(owner), m)) for m in called}
        if all(has.values()):
            yield has[method]


@functools.lru_cache(maxsize=None)
def _included(file) -> frozenset[str]:
    """The files of core that a CUDA file includes, directly or not."""
    found, left = set(), [Path(file)]
    while left:
        path = left.pop()
        for name in re.findall(r'^#include "(?:core/)?(\w+\.cuh)"', "\n".join(_lines(str(path))), re.M):
            inner = Path("cuda_src/core", name)
            if str(inner) not in found and (ROOT / inner).is_file():
                found.add(str(inner))
                left.append(inner)
    return frozenset(found)


def _type_of(name, lines, number) -> str | None:
    """The type in the nearest declaration of a variable or parameter at or above a line, in the same function
    or struct."""
    declared = re.compile(rf"\b([A-Z]\w*)(?:<[^;()]*?>)?[&*]?\s+{name}\s*[(,;)={{]")
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
