"""Compiled code, each line with the source line that it comes from.

`sass`, `ptx` and `ttgir` each yield (code, place or None). A place is a line of the kernel's own file and, if
that line called an inlined function, also the line in that function. None means that nothing is known about
this line of code.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from lab.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
CODE_COLUMNS = 72


class Place(NamedTuple):
    file: str
    line: int
    inner: str = ""  # file:line of the inlined function


@functools.lru_cache(maxsize=None)
def _lines(file):
    # A cubin has the path of the source at compile time. If the checkout was moved since, the file is in the
    # folder of the same name.
    for path in (Path(file), ROOT.joinpath(*Path(file).parts[-2:])):
        if path.is_file():
            return path.read_text(errors="replace").splitlines()
    return []


def source_of(place):
    """The text of a place's line, "" where the file is not here."""
    lines = _lines(place.file)
    return lines[place.line - 1].strip() if 0 < place.line <= len(lines) else ""


def _short(file, line):
    return f"{Path(file).name}:{line}"


def sass(text):
    noted = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
    chain, wanted = [], True
    for line in text.splitlines():
        found = noted.match(line)
        if found:  # the inlined calls of one instruction, innermost first
            chain = [] if wanted else chain
            wanted = False
            chain.append((found[1], int(found[2])))
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            first, wanted = not wanted, True
            yield line.strip(), _place(chain) if first else None
        elif re.match(r"\s*\.L_\w+:", line):
            yield line.strip(), None


def _place(chain):
    if not chain:
        return None
    file, line = chain[-1]
    return Place(file, line, _short(*chain[0]) if len(chain) > 1 else "")


def ptx(text):
    files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    noted = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?")
    by_name = {Path(name).name: name for name in files.values()}
    callers, place = {}, None
    for line in text.splitlines():
        found = noted.match(line)
        called_at = re.findall(r"@\[ ?(\S+?):(\d+):\d+", line) if found and not found[4] else []
        if called_at:  # Triton has the calls in a comment, the outermost last
            name, number = called_at[-1]
            place = Place(
                by_name.get(name, name), int(number), _short(files.get(int(found[1]), "?"), found[2])
            )
        elif found:
            numbers = [int(n) for n in found.groups() if n]
            inner = outer = tuple(numbers[:3])
            callers[inner] = tuple(numbers[3:])
            seen = set()
            while callers.get(outer) and outer not in seen:
                seen.add(outer)
                outer = callers[outer]
            within = _short(files.get(inner[0], "?"), inner[1]) if inner != outer else ""
            place = Place(files.get(outer[0], "?"), outer[1], within) if outer[1] else None  # line 0: no line
        elif re.match(r"\s*\.(file|section)\b", line):
            if ".section" in line:  # only debugging tables follow
                return
        elif line.strip() and not re.match(r"\s*(//|\$L__tmp)", line):
            yield line.rstrip(), place
            place = None


def ttgir_places(text):
    """Yields (code, place or None) for each line of TTGIR."""
    known = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))

    def resolve(what, depth=0):
        """The outermost file and line of a location, which may refer to others: a name, a fusion or a call
        site does."""
        found = re.match(r'"([^"]+)":(\d+):\d+', what)
        if found:
            return Place(found[1], int(found[2]))
        callsite = re.match(r"callsite\((#loc\d*) at (#loc\d*)\)", what)
        refers = [callsite[2]] if callsite else re.findall(r"#loc\d*", what)
        if not refers or depth > 50:
            return None
        return resolve(known.get(refers[0], ""), depth + 1)

    for line in text.splitlines():
        if re.match(r"#loc\d* = ", line) or not line.strip():
            continue
        found = re.search(r" loc\((#loc\d*)\)$", line)
        place = resolve(known.get(found[1], "")) if found else None
        yield re.sub(r" loc\((?:\"[^\"]*\"\()?#loc\d*\)?\)", "", line), place


def ttgir(text):
    before = None
    for code, place in ttgir_places(text):
        yield code, place if place != before else None
        before = place or before


KINDS = {"sass": sass, "ptx": ptx, "ttgir": ttgir}


def lines(kernel, kind):
    """The lines of a Kernel's listing. Raises LabError if its compiler has no such text."""
    text = kernel.texts[kind]
    if isinstance(text, LabError):
        raise text
    name = kernel.instance if kernel.backend == "cuda" else kernel.name
    yield f"---- {kernel.backend}: {name} for {kernel.arch}, {kind}"
    for code, place in KINDS[kind](text):
        if place is None:
            yield code
        else:
            inner = f" ({place.inner})" if place.inner else ""
            yield f"{code:{CODE_COLUMNS}} | {_short(place.file, place.line)}{inner}  {source_of(place)}"
