"""One self-contained HTML page and one Markdown summary from the runs of a folder.

Every picture is embedded as a data URI; the dark page inverts it by CSS. jinja2 escapes every string of a
record. The page loads nothing from anywhere: its Content-Security-Policy forbids it.
"""

import base64
import itertools
import json
import math
import re
import textwrap
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from lab import declared, rungs
from lab.errors import LabError
from lab.harness import untuned
from lab.inspect.kernel import MIX
from lab.report import figures, heatmaps, ladder_figures, model_figures, op_figures, ops, style, twins

HERE = Path(__file__).parent
FAIRNESS = (
    "op backend dtype arch kernel configurations tried registers spill_bytes shared_bytes threads occupancy "
    "instructions code_lines shared_lines file_s kernel_s"
)
CARD = {
    "configurations": "configurations to choose from",
    "tried": "settings the tuner raced",
    "registers": "registers of a thread",
    "spill_bytes": "spilled bytes of a thread",
    "shared_bytes": "shared memory of a block (bytes)",
    "threads": "threads of a block",
    "occupancy": "theoretical occupancy",
    "instructions": "machine instructions",
    "code_lines": "lines of code",
    "shared_lines": "lines shared with other ops",
    "file_s": "nvcc, the whole file: every instantiation and architecture (s)",
    "kernel_s": "Triton, this kernel alone, in a process that has compiled before (s)",
}
COMPILED = {name: CARD[name] for name in ("file_s", "kernel_s")}
TABLE_ROWS = 1000  # of a table on the page: a browser takes seconds for ten thousand
NUMERIC, LONG = ' class="num"', ' class="long"'
# Classes of instructions that say little of how a kernel treats memory: one row of the mix.
UPKEEP = ("integer and address", "constant and register move", "control flow and fence", "other")


@dataclass
class Picture:
    figure: figures.Figure
    file: str  # path below the output folder
    png: bytes

    @property
    def uri(self):
        return _uri(self.png)

    @property
    def size(self):
        """(width, height) in CSS pixels; a PNG's header holds them at bytes 16 to 24."""
        return tuple(int.from_bytes(self.png[at : at + 4], "big") // 2 for at in (16, 20))


@dataclass
class Section:
    id: str
    title: str
    intro: str = ""
    pictures: list = field(default_factory=list)
    tables: list = field(default_factory=list)  # (title, frame, open)
    twins: list = field(default_factory=list)  # of side_by_side()


@dataclass
class View:
    """One run as the template sees it."""

    run: object
    slug: str
    tiles: list
    facts: list
    sections: list

    @property
    def pictures(self):
        return [p for s in self.sections for p in s.pictures]


def view(run, slug, folder, with_twins, progress):
    """Draws all pictures of a run. `folder` is where their files will lie, `progress(name)` is called before
    each."""
    taken = set()

    def drawn(found):
        pictures = []
        for figure in filter(None, found):
            name = slug_of(figure.name, taken)
            progress(name)
            pictures.append(Picture(figure, f"{folder}/{name}.png", figures.png(figure, run.emulated)))
        return pictures

    f = ops.focus(run)
    sections = [Section("machine", "What was run, on what", pictures=drawn([model_figures.ceiling(run)]))]
    if f:
        sections.append(
            Section(
                "ops",
                "The ops at a glance",
                _focus_words(run, f),
                drawn(
                    [op_figures.utilisation(run, f), op_figures.roofline(run, f), heatmaps.crossover(run, f)]
                ),
            )
        )
    for model in model_figures.models(run):
        pictures = drawn(model_figures.of_model(run, model))
        rows = model_figures.series(run, model)
        tables = (
            [(f"All measurements of {model}", model_figures.model_table(rows), not pictures)]
            if len(rows)
            else []
        )
        sections.append(Section(f"model-{slug_of(model)}", f"Model: {model}", "", pictures, tables))
    if len(run.fairness):
        sections.append(
            Section(
                "fairness",
                "Fairness cards",
                "What was spent on each side, and what came of it: a race says little if one side was "
                "tuned for longer. Every op's card, and the mix of its instructions, is in its section.",
                tables=[
                    (
                        "All fairness cards",
                        figures.table(compile_times(run.fairness), FAIRNESS, **COMPILED),
                        False,
                    )
                ],
            )
        )
    else:
        sections.append(
            Section(
                "fairness",
                "Fairness cards",
                "None in this run: `lab inspect --all --out DIR` adds "
                "them to the records in DIR, without a GPU.",
            )
        )
    if len(run.ladder):
        sections.append(
            Section(
                "ladders",
                "Ladders: from a naive kernel to the op's own",
                "One idea a rung, in both languages; `lab explain OP --rungs` shows them in the terminal.",
                drawn(ladder_figures.of_run(run)),
                twins=[
                    ladder_view(op)
                    for op in sorted(rungs.OPS, key=style.part_order)
                    if with_twins and (run.ladder["op"] == op).any()
                ],
            )
        )
    sections += _op_sections(run, f, drawn, with_twins)
    if len(run.suspects):
        listed = figures.table(
            run.suspects, "kind flag op role model backend dtype batch context cache us gbps share"
        )
        sections.append(
            Section(
                "flagged",
                "Flagged measurements",
                "Listed so that nothing is hidden; no bandwidth picture shows them.",
                tables=[("Flagged measurements", listed, False)],
            )
        )
    if len(run.failures):
        listed = figures.table(run.failures, "kind error op role model backend dtype batch context")
        sections.append(Section("failures", "Failures", tables=[("Failures", listed, True)]))
    return View(run, slug, _tiles(run, f), _facts(run), sections)


def _op_sections(run, f, drawn, with_twins):
    names = list(dict.fromkeys([*run.op["op"], *run.fairness["op"]]))
    if with_twins:
        names += [op for op in twins.known_ops() if op not in names]
    names.sort(key=lambda n: (style.part_order(n), n))
    made = []
    for op in names:
        rows = run.op[run.op["op"] == op]
        section = Section(f"op-{slug_of(op)}", f"Op: {op}", twins=[twin_view(op)] if with_twins else [])
        if op in declared.groups()["PersistentOps"]:
            section.intro = (
                "A whole step: the models' sections have its times, as tokens of the plan persistent."
            )
        if (run.fairness["op"] == op).any():
            sides = one_call(run.fairness[run.fairness["op"] == op], f.dtype if f else "")
            section.tables += [(*made, True) for made in (card(sides), mix(sides)) if made]
        if len(rows):
            section.pictures = drawn(op_figures.of_op(run, f, op))
            listed = ops.labelled(rows).assign(shape=rows["shape"].map(ops.shape_text))
            listed = figures.table(
                listed,
                "case backend tuning dtype batch context shape cache timer us us_p10 us_p90 n "
                "bytes gbps share flag",
            )
            section.tables.append((f"All {len(rows)} measurements of {op}", listed, False))
        made.append(section)
    if made and with_twins:
        made[0].intro = "The sources shown are those of the folder that the report was built in" + (
            f"; the run was made at commit {run.env.commit}." if run.env and run.env.commit else "."
        )
    return made


def one_call(rows, dtype):
    """One op's fairness records of a dtype (its first, where it has none of that) and of one architecture."""
    rows = rows[rows["dtype"] == (dtype if (rows["dtype"] == dtype).any() else rows["dtype"].iloc[0])]
    return rows[rows["arch"] == rows["arch"].iloc[0]]


def compile_times(rows):
    """Fairness records with `compile_s` apart by what it is the time of, since the two cannot be set side by
    side."""
    cuda = rows["backend"] == "cuda"
    return rows.assign(file_s=rows["compile_s"].where(cuda), kernel_s=rows["compile_s"].where(~cuda))


def card(rows):
    """(caption, frame) of what was spent on each side; a column for each kernel. rows: of one_call()."""
    sides, rows = {"": list(CARD.values())}, compile_times(rows)
    for row in rows.itertuples():
        shown = {field: cell(getattr(row, field)) for field in CARD}
        if row.occupancy == row.occupancy:
            shown["occupancy"] = f"{row.occupancy:.0%}"
        if untuned.by_cards([row]):
            shown["tried"] += f" ({untuned.WORD})"
        sides[_kernel(row)] = list(shown.values())
    return f"Fairness card: {_call(rows)}", pd.DataFrame(sides)


def mix(rows):
    """(caption, frame) of the instructions by what they do, as `card`; None for records that do not hold
    them."""
    counts = {
        _kernel(row): {str(name): n for name, n in row.mix.items() if isinstance(n, int) and n > 0}
        for row in rows.itertuples()
    }
    found = [
        name for name in (*MIX, *itertools.chain(*counts.values())) if any(name in c for c in counts.values())
    ]
    if not found:
        return None
    named = [name for name in dict.fromkeys(found) if name not in UPKEEP]
    sides = {"": [*named, "addresses, moves, control flow"]}
    for kernel, count in counts.items():
        upkeep = sum(count.get(name, 0) for name in UPKEEP)
        sides[kernel] = (
            [*(count.get(name, 0) for name in named), upkeep] if count else [math.nan] * (len(named) + 1)
        )
    return f"Instructions of machine code, each counted once: {_call(rows)}", pd.DataFrame(sides)


def _kernel(row):
    return f"{style.backend(row.backend).label}: {row.kernel}"


def _call(rows):
    first = rows.iloc[0]
    return f"{first['dtype']}, {first['arch']}, {ops.shape_text(first['shape'])}"


def twin_view(op):
    """The CUDA and the Triton file of an op as HTML, step by step; {"missing": text} where a file is
    absent."""

    def view():
        cuda, triton = twins.pair(op)
        rows = twins.rows(cuda, triton)
        return side_by_side(cuda, triton, rows, f"The twins side by side: {len(rows)} steps")

    return _or_missing(view)


def ladder_view(op):
    """The two files of an op's ladder as HTML, rung by rung; {"missing": text} where a file is absent."""
    return _or_missing(lambda: side_by_side(*twins.ladder(op), f"The rungs of {op} side by side"))


def _or_missing(view):
    try:
        return view()
    except LabError as e:
        return {"missing": str(e).replace(str(twins.ROOT) + "/", "")}


def side_by_side(cuda, triton, rows, title):
    """Rows of lab.report.twins as the template shows them."""

    def side(file, step, missing):
        return {
            "label": style.backend(file.language).label,
            "missing": missing,
            "chunks": _chunks(file, step.chunks if step else []),
        }

    return {
        "title": title,
        "sides": [
            {
                "label": style.backend(h.language).label,
                "name": h.name,
                "header": h.header,
                "lines": h.count,
                "around": _chunks(h, h.around),
            }
            for h in (cuda, triton)
        ],
        "steps": [
            {
                "title": row.title,
                "intro": row.intro,
                "sides": list(map(side, (cuda, triton), row.steps, row.missing)),
            }
            for row in rows
        ],
    }


def _chunks(file, chunks):
    return [
        {
            "first": c.first,
            "last": c.first + len(c.lines) - 1,
            "kernel": c.kernel,
            "text": c.text,
            "below": c.below,
            "html": twins.highlight(file.language, textwrap.dedent(c.code)),
        }
        for c in chunks
        if c.lines or c.text
    ]


# Words and numbers above the pictures


def _focus_words(run, f):
    how = {
        "graph": "device time inside a graph",
        "wall": "host clock, emulated",
        "event": "time with the host's launches",
    }
    return (
        f"Shown: {f.dtype}, {f.cache.replace('_', ' ')} caches, {how.get(f.timer, f.timer)}"
        + (f", the shapes of {f.model}" if f.model else "")
        + ". Everything else is in the sections of the ops."
    )


def _tiles(run, f):
    """[(figure, what it is, detail)]: the few numbers that a reader wants first."""
    tiles = []
    if run.best_ceiling("read") and not run.emulated:
        tiles.append(
            (f"{run.best_ceiling('read'):,.0f} GB/s", "measured ceiling", "the best plain read of this run")
        )
    for model in model_figures.models(run):
        rows = model_figures.series(run, model)
        if not len(rows):
            continue
        rows = rows[rows["batch"] == rows["batch"].min()]
        rows = rows[rows["context"] == rows["context"].min()].sort_values("us")
        first = rows.iloc[0]
        words = []
        for row in rows.head(3).itertuples():
            known = row.of_ceiling == row.of_ceiling and not row.suspect
            share = f", {row.of_ceiling:.0%} of the ceiling" if known else ""
            words.append(
                f"{row.series} {duration(row.us)}{share}" + (f" ({row.tuning})" if row.tuning else "")
            )
        at = f"batch {figures.amount(first['batch'])} @{figures.amount(first['context'])}"
        tiles.append(
            (
                duration(first["us"]),
                f"a step of {model}, {at}" + (", emulated" if run.emulated else ""),
                "; ".join(words),
            )
        )
    if f and not run.emulated:
        counts = ops.score(ops.chosen(run.op, f))
        if sum(counts.values()):
            tiles.append(
                (
                    f"{counts['faster']} : {counts['slower']}",
                    "cases won, CUDA to Triton",
                    ops.score_words(counts),
                )
            )
    return tiles


def _facts(run):
    env = run.env
    if env is None:
        return [("run", run.id)]

    def number(value, unit, scale=1):
        return f"{value / scale:,.0f} {unit}" if isinstance(value, (int, float)) and value == value else None

    after = next((e for e in run.envs if e.when == "after"), None)
    clock = number(env.sm_mhz, "MHz")
    if clock and after and number(after.sm_mhz, "MHz"):
        clock = f"{clock} before, {number(after.sm_mhz, 'MHz')} after"
    throttle = env.throttle if isinstance(env.throttle, list) else None
    facts = [
        ("run", run.id),
        ("time", env.time),
        ("device", run.device),
        ("capability", env.capability),
        ("multiprocessors", env.sms),
        ("memory", number(env.memory_bytes, "GiB", 2**30)),
        ("L2 cache", number(env.l2_bytes, "MiB", 2**20)),
        ("SM clock", clock),
        ("memory clock", number(env.mem_mhz, "MHz")),
        ("power", number(env.power_w, "W")),
        ("power limit", number(env.power_limit_w, "W")),
        ("temperature", number(env.temperature_c, "°C")),
        ("throttle reasons", None if throttle is None else ", ".join(map(str, throttle)) or "none"),
        ("ECC", env.ecc),
        ("driver", env.driver),
        ("CUDA", env.cuda),
        ("nvcc", env.nvcc),
        ("torch", env.torch),
        ("triton", env.triton),
        ("python", env.python),
        ("CPU", env.cpu),
        ("commit", env.commit),
        ("tables of lab tune", ", ".join(f"{k} {v or 'none'}" for k, v in (env.tuned or {}).items())),
    ]
    return [(name, value) for name, value in facts if value not in (None, "")]


# Rendering


def cell(value):
    """A value of a table as text: thousands separated, four significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if math.isinf(value):
            return str(value)
        if value == int(value):
            return f"{int(value):,}"
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(digits, 6)}f}"
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str)
    return str(value)


def duration(us):
    """123.456 -> "123 us", 1234.5 -> "1.23 ms", 1.64e6 -> "1.64 s"."""
    divisor, name = (1e6, "s") if us >= 1e6 else (1e3, "ms") if us >= 1e3 else (1.0, "us")
    value = us / divisor
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def frame(table, caption, label):
    """The first TABLE_ROWS rows of a table as HTML. Not in the template, which takes much longer for a
    cell."""
    right = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    if len(table) > TABLE_ROWS:
        caption = (
            f"{caption} (the first {TABLE_ROWS:,} of {len(table):,} rows; all of them are in records.jsonl)"
        )
    heads = "".join(
        f'<th scope="col"{NUMERIC * num}>{escape(str(name))}</th>' for name, num in zip(table.columns, right)
    )
    body = []
    for row in table.head(TABLE_ROWS).itertuples(index=False, name=None):
        texts = [escape(cell(value)) for value in row]
        body.append(
            "<tr>"
            + "".join(
                f"<td{NUMERIC if num else LONG if len(text) > 50 else ''}>{text}</td>"
                for text, num in zip(texts, right)
            )
            + "</tr>"
        )
    sides = ' class="sides"' if len(table.columns) and not table.columns[0] else ""
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">\n<table{sides}>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody>\n</table>\n</div>\n"
    )


def html(views, title):
    """The report as one page."""
    return _render(title, views=views, only=None)


def twin_page(title, facts, cuda, triton, rows):
    """A CUDA and a Triton file as one page; facts: [(what, text)] above them, rows: of lab.report.twins."""
    return _render(
        f"{title} in CUDA and in Triton",
        views=[],
        only={"facts": facts, "twin": side_by_side(cuda, triton, rows, "Side by side")},
    )


def _render(title, **context):
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {"frame": frame, "points": figures.POINTS}
    light, dark = twins.highlight_css()
    return env.get_template("page.html.j2").render(title=title, code_light=light, code_dark=dark, **context)


def markdown(views, title):
    """The summary for a code host: warnings, machine, headline numbers, every picture with its text."""
    out = [
        f"# {md(title)}",
        "",
        "Drawn by `lab report` from records.jsonl, which also writes the full report, "
        "index.html, with the tables behind the pictures and the sources side by side.",
        "",
    ]
    for view in views:
        run = view.run
        if len(views) > 1:
            out += [f"## Run {md(run.id)}", ""]
        out += [
            f"> **{'Warning' if n.level == 'warning' else 'Note'}**: {md(n.text)}\n>" for n in run.notices
        ]
        out += ["", "| | |", "|---|---|"]
        out += [f"| **{md(value)}** | {md(what)}: {md(detail)} |" for value, what, detail in view.tiles]
        out += [f"| {md(name)} | {md(value)} |" for name, value in view.facts]
        out.append("")
        for section in view.sections:
            if section.pictures:
                out += [f"##{'#' if len(views) > 1 else ''} {md(section.title)}", ""]
            for p in section.pictures:
                out += [
                    f"![{md(p.figure.alt)}]({p.file})",
                    "",
                    md(p.figure.reading),
                    "",
                    f"`{_code(p.figure.command)}`",
                    "",
                ]
    return "\n".join(out).rstrip() + "\n"


def md(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", escape(" ".join(str(text).split()), quote=False))


def _code(text):
    return " ".join(str(text).replace("`", "'").split())


def slug_of(text, taken=None):
    """A file name or fragment from any text; unique among `taken`, which grows."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-.")[:80] or "x"
    if taken is not None:
        base, count = slug, 2
        while slug in taken:
            slug, count = f"{base}-{count}", count + 1
        taken.add(slug)
    return slug


def _uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()
