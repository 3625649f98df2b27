"""The CUDA and the Triton file of an op or of a weight format, cut at their numbered steps, so that they can
stand side by side.

A step begins with a comment `// 2. Load: text` (CUDA) or `# 2. Load: text` (Triton); the comment lines right
below belong to its text. A file with several kernels repeats the steps: a step then has a chunk of code for
each of them. So may the file of a weight format, for 16-bit numbers and for float32. In the file of a ladder
the steps are its rungs (lab/rungs/); several rungs may be one kernel in several shapes.
"""

import re
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

from lab import rungs
from lab.errors import LabError, shown
from lab.report import style

ROOT = Path(__file__).resolve().parents[2]
STEP = re.compile(r"^\s*(?://|#) (\d+)\. ([\w ,+\-/]+):\s*(.*)$")
COMMENT = re.compile(r"^\s*(?://|#) ?(.*)$")
KERNEL = re.compile(r"\b(\w+_kernel)\s*\(")
NAME = re.compile(r"(ladder/|formats/)?\w{1,80}", re.ASCII)
# Names, operators, punctuation and spaces, which look like plain text: two thirds of the marked-up source.
PLAIN = re.compile(r'<span class="(?:n|nn|o|p|w|err|nb|bp)">([^<]*)</span>')
FOLDERS = {"cuda": ("cuda_src", ".cu"), "triton": ("triton_kernels", ".py")}
FORMATS = "formats"  # the folder of weight formats, in lab and in both languages


@dataclass
class Chunk:
    """Consecutive lines of a file. `first` is the number of the first line, counted from 1."""

    first: int
    lines: list
    kernel: str = ""
    text: str = ""  # the comment under the step's title
    below: str = ""  # the step that has the code, where this one has none of its own

    @property
    def code(self):
        return "\n".join(self.lines)

    def trimmed(self):
        """The chunk without blank lines at its ends."""
        lines, first = list(self.lines), self.first
        while lines and not lines[0].strip():
            lines.pop(0)
            first += 1
        while lines and not lines[-1].strip():
            lines.pop()
        return replace(self, first=first, lines=lines)


@dataclass
class Step:
    number: int
    title: str
    chunks: list = field(default_factory=list)  # one for each kernel of the file


@dataclass
class Source:
    """One language's file: what it says at its top, its steps by number, and the code around them."""

    language: str  # cuda | triton
    path: Path
    header: str
    steps: dict
    around: list
    count: int  # lines of the file

    @property
    def titles(self):
        return [f"{s.number}. {s.title}" for s in self.steps.values()]

    @property
    def name(self):
        folder = self.path.parent.name
        inner = f"{folder}/" if folder in ("ladder", FORMATS) else ""
        return f"{FOLDERS[self.language][0]}/{inner}{self.path.name}"


@dataclass
class Row:
    """A step, or a rung, of both files. `steps`: CUDA's and Triton's Step, or None where `missing` says
    why."""

    title: str
    steps: tuple
    missing: tuple
    intro: tuple = ()  # ((what, text), ...) to be said of both files
    drawing: str = ""  # of lab.report.drawings


def known_ops(root=ROOT):
    """Ops that have a file in either language and a contract, in the order a decode step runs them."""
    found = {p.stem for folder, ending in FOLDERS.values() for p in (root / folder).glob("*" + ending)}
    found &= {p.stem for p in (root / "lab" / "ops").glob("[!_]*.py")}
    return sorted(found, key=lambda n: (style.part_order(n), n))


def known_formats(root=ROOT):
    """The files of weight formats: those of lab/formats that have a CUDA file of the same name. A file has
    one format or several, as int4 has int4-g32 and int4-g128."""
    found = {p.stem for p in (root / "lab" / FORMATS).glob("[!_]*.py")}
    return sorted(found & {p.stem for p in (root / "cuda_src" / FORMATS).glob("*.cuh")})


def source(language, op, root=ROOT):
    """The file of an op, of a ladder ("ladder/linear") or of a weight format ("formats/int4") in a language.
    Raises LabError when it is not there."""
    folder, ending = FOLDERS[language]
    if language == "cuda" and op.startswith(f"{FORMATS}/"):
        ending = ".cuh"
    label = style.backend(language).label
    if not NAME.fullmatch(op):  # of a record, from anywhere: no path out of the project
        raise LabError(f"{shown(op, quotes=False)} has no {label} kernel: that is no name of an op")
    path = root / folder / (op + ending)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise LabError(f"{op} has no {label} kernel: {path} does not exist") from None
    return cut(language, path, lines)


def cut(language, path, lines):
    """A Source from the lines of a file."""
    header, begin = _header(language, lines)
    steps, around, kernel, order = {}, [Chunk(begin + 1, [])], "", []
    chunk, ended, i = around[0], False, begin
    while i < len(lines):
        line = lines[i]
        found = STEP.match(line)
        if found:
            number, title, text = int(found[1]), found[2].strip(), [found[3]]
            i += 1
            while i < len(lines) and COMMENT.match(lines[i]) and not STEP.match(lines[i]):
                text.append(COMMENT.match(lines[i])[1])
                i += 1
            step = steps.setdefault(number, Step(number, title))
            if step.title != title:
                raise LabError(
                    f"{path}:{i}: step {number} is called {title!r} here and {step.title!r} before"
                )
            inside = line[0].isspace()  # else the step stands above its kernel, and ends with it
            chunk = Chunk(i + 1, [], kernel if inside else "", " ".join(t.strip() for t in text if t.strip()))
            step.chunks.append(chunk)
            order.append((f"{number}. {title}", chunk))
            ended = False
            continue
        if not ended and chunk not in around and _leaves(language, line) and (inside or chunk.kernel):
            closing = line.startswith("}")
            if closing:
                chunk.lines.append(line)
            chunk, ended = Chunk(i + 1 + closing, []), True
            around.append(chunk)
            if closing:
                i += 1
                continue
        defined = KERNEL.search(line)
        if defined and chunk in around:
            kernel = defined[1]
        elif defined:
            chunk.kernel = defined[1]
        chunk.lines.append(line)
        i += 1
    for (_, empty), (title, below) in reversed(list(zip(order, order[1:]))):
        if not any(line.strip() for line in empty.lines):
            empty.below = below.below or title
    around = [c.trimmed() for c in around if any(line.strip() for line in c.lines)]
    for step in steps.values():
        step.chunks = [c.trimmed() for c in step.chunks]
    return Source(language, path, header, dict(sorted(steps.items())), around, len(lines))


def _leaves(language, line):
    """Does this line end the function that a step stands in?"""
    if language == "cuda":
        return line.startswith("}")
    return bool(line.strip()) and not line[0].isspace() and line[0] not in ")#"


def _header(language, lines):
    """(text of the comment or docstring at the top, number of lines it takes)."""
    if language == "cuda":
        count = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
        return "\n".join(line[2:].removeprefix(" ") for line in lines[:count]), count
    text = "\n".join(lines)
    found = re.match(r'\s*"""(.*?)"""', text, re.S)
    return (found[1].strip("\n"), text[: found.end()].count("\n") + 1) if found else ("", 0)


def pair(op, root=ROOT):
    """(CUDA's Source, Triton's Source) of an op. Raises LabError naming the file that is missing."""
    return source("cuda", op, root), source("triton", op, root)


def rows(cuda, triton):
    """[Row] in order of the steps' numbers."""
    return [
        Row(
            f"{n}. {(cuda.steps.get(n) or triton.steps[n]).title}",
            (cuda.steps.get(n), triton.steps.get(n)),
            tuple(f"{style.backend(h.language).label} has no such step." for h in (cuda, triton)),
        )
        for n in sorted(cuda.steps.keys() | triton.steps.keys())
    ]


def ladder(name, root=ROOT):
    """(CUDA's Source, Triton's Source, [Row]) of a ladder, the lowest rung first.

    Raises LabError for an op without one.
    """
    climbed = rungs.rungs(name)
    cuda, triton = pair(f"ladder/{name}", root)

    def missing(file, rung):
        if rung.own_kernel:
            return f"The op itself: {FOLDERS[file.language][0]}/{rung.op}{file.path.suffix}."
        return (
            f"No such rung in {style.backend(file.language).label}: "
            f"{rung.absent.get(file.language, 'not written.')}"
        )

    def said(rung):
        texts = {
            "changes": rung.idea,
            "should gain": rung.gain,
            "may fall short": rung.otherwise,
            "needs": rung.needs,
        }
        return tuple((what, text) for what, text in texts.items() if text)

    return (
        cuda,
        triton,
        [
            Row(
                rung.title,
                tuple(h.steps.get(rung.number) for h in (cuda, triton)),
                tuple(missing(h, rung) for h in (cuda, triton)),
                said(rung),
                rung.drawing,
            )
            for rung in climbed
        ],
    )


def highlight(language, code):
    """Code as HTML with pygments' classes, or escaped plain text where pygments is not installed."""
    try:
        from pygments import highlight as color
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import CppLexer, PythonLexer
    except ImportError:
        return escape(code)
    lexer = CppLexer(stripnl=False) if language == "cuda" else PythonLexer(stripnl=False)
    return PLAIN.sub(r"\1", color(code, lexer, HtmlFormatter(nowrap=True)).rstrip("\n"))


def highlight_css():
    """(rules for the light page, rules for the dark page) of `highlight`'s classes; empty without
    pygments."""
    try:
        from pygments.formatters import HtmlFormatter
    except ImportError:
        return "", ""
    rules = (
        HtmlFormatter(style=name).get_style_defs("pre.code").splitlines()
        for name in ("default", "github-dark")
    )
    return tuple(
        "\n".join(r for r in one if r.startswith("pre.code .") and "linenos" not in r) for one in rules
    )
