"""What stands where: the pictures, tables and words of a run, and the page made of them.

The first screen is a verdict and one picture; eight sections follow, then the models and the ops; what was
run on what, notes and failures stand below, folded. Every picture is inline SVG, whose colours follow the
page's theme. jinja2 escapes every string of a record. The page loads nothing from anywhere: its
Content-Security-Policy forbids it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from lab import declared, rungs
from lab.report import (
    fairness,
    figures,
    format_figures,
    heatmaps,
    inside_figures,
    ladder_figures,
    ledger_figures,
    machine_figures,
    model_figures,
    op_figures,
    ops,
    overview_figures,
    parallel_figures,
    serving_figures,
    sides,
    sources,
    style,
    svg,
    tables,
    twins,
    verdict,
)

HERE = Path(__file__).parent
LADDERS = "One idea a rung, in both languages; lab explain OP --rungs shows them in the terminal."
PROMISES = (
    " A bar shows how many times as fast a rung is as the one that it changes; left of 1 it is slower. "
    "On the right of a picture: the share of the bandwidth that the rung reaches in each language."
)


@dataclass
class Picture:
    figure: figures.Figure
    file: str  # path below the output folder
    root: object  # tree of lab.report.svg

    @property
    def svg(self):
        """The picture as a file."""
        f = self.figure
        return svg.alone(self.root, f.title, f"{f.alt} {f.conditions}").encode()


@dataclass
class Part:
    """Pictures and tables under a heading: a section of the page, or what unfolds in one."""

    id: str
    title: str
    intro: str = ""
    shown: list = field(default_factory=list)  # Picture or Grid
    tables: list = field(default_factory=list)  # (caption, frame, open)
    twins: list = field(default_factory=list)  # of lab.report.sources
    cards: list = field(default_factory=list)  # (what, figure, detail)
    plans: list = field(default_factory=list)  # of the lines in `shown`, to choose from
    folds: list = field(default_factory=list)  # Parts

    @property
    def everything(self):
        return [*self.shown, *(one for fold in self.folds for one in fold.everything)]


@dataclass
class View:
    """One run as the template sees it."""

    run: object
    slug: str
    verdict: list  # sentences
    headline: Picture | None
    top: list  # Parts: the eight sections
    models: list  # a Part for each model
    ops: list  # a Part for each op
    below: list  # Parts: everything else
    facts: list

    @property
    def parts(self):
        return [*self.top, *self.models, *self.ops, *self.below]

    @property
    def pictures(self):
        shown = [self.headline] * bool(self.headline) + [s for part in self.parts for s in part.everything]
        return [one for one in shown if isinstance(one, Picture)]


def view(run, slug, folder, with_twins, progress):
    """Draws all pictures of a run. `folder` is where their files will lie, `progress(name)` is called before
    each."""
    taken = set()

    def drawn(*found):
        made = []
        for one in filter(None, found):
            if isinstance(one, figures.Figure):
                name = slug_of(one.name, taken)
                progress(name)
                one = Picture(one, f"{folder}/{name}.svg", figures.drawn(one, run.emulated))
            made.append(one)
        return made

    f = ops.focus(run)
    of_ops = [op_figures.utilisation(run, f), op_figures.tiny(run, f)] if f else []
    first, *of_ops = [*filter(None, [overview_figures.headline(run), *of_ops])] or [None]
    several = parallel_figures.tokens(run)
    headline = drawn(first or several)
    top = _top(run, f, of_ops, several if first else None, drawn, with_twins)
    return View(
        run,
        slug,
        verdict.sentences(run, f),
        headline[0] if headline else None,
        [part for part in top if part.everything or part.tables],
        [_model(run, model, drawn) for model in sides.models(run)],
        _ops(run, f, drawn, with_twins),
        _below(run, f, drawn),
        _facts(run),
    )


def _top(run, f, of_ops, several, drawn, with_twins):
    """The eight sections that say most. of_ops: figures of the ops, several: of tokens on several GPUs, both
    but for one that stands above all."""
    model = sides.main_model(run)
    overview = overview_figures.overview(run)
    plans = ledger_figures.plans(run, model) if model else []
    return [
        Part(
            "models",
            "Every model: the best of each side",
            shown=drawn(overview),
            tables=[(*found, False) for found in sides.foreign(run)],
        ),
        _several(run, several, drawn),
        _serving(run, drawn),
        Part(
            "wins",
            "Who wins where",
            _focus_words(run, f) if f else "",
            drawn(heatmaps.crossover(run, f)) if f else [],
        ),
        Part(
            "bandwidth",
            "Times of the ops" if run.emulated else "How much of the bandwidth the ops reach",
            shown=drawn(*of_ops),
        ),
        _formats(run, drawn),
        Part(
            "token",
            "Where one token goes",
            shown=drawn(ledger_figures.token(run, model, plans[0])) if plans else [],
        ),
        Part(
            "ladders",
            "Ladders: from a naive kernel to the op's own",
            LADDERS + PROMISES * (not run.emulated),
            drawn(*ladder_figures.of_run(run)),
            twins=[
                sources.ladder_view(name)
                for name in ladder_figures.measured(run)
                if with_twins and name in rungs.NAMES
            ],
        ),
    ]


def _several(run, of_tokens, drawn):
    """What several GPUs did, together."""
    shown = drawn(of_tokens, parallel_figures.exchange(run))
    tables = [(*found, False) for found in parallel_figures.tables(run)]
    return Part("several-gpus", "Several GPUs", shown=shown, tables=tables)


def _serving(run, drawn):
    """Many sequences that take turns in the rows of a batch."""
    models = dict.fromkeys(run.serving["model"]) if len(run.serving) else ()
    pictures = [serving_figures.throughput(run, model) for model in models]
    return Part("serving", "Many sequences in one queue", shown=drawn(*pictures))


def _formats(run, drawn):
    """Weight formats: what fewer bits gain and cost."""
    part = Part("formats", "Fewer bits: weight formats", "lab explain FORMAT shows how each is unpacked.")
    models = list(dict.fromkeys(run.accuracy["model"]))
    part.shown = drawn(
        format_figures.products(run),
        format_figures.layer(run),
        *(format_figures.accuracy(run, model) for model in models),
        format_figures.shares(run),
    )
    part.tables = [(*found, False) for found in [format_figures.errors(run)] if found]
    if len(run.packed):
        caption = f"All {len(run.packed)} measurements with packed weights"
        part.tables.append((caption, op_figures.all_rows(run.packed), False))
    return part


def _model(run, model, drawn):
    rows = sides.series(run, model)
    part = Part(f"model-{slug_of(model)}", f"Model: {model}", cards=verdict.cards(run, model))
    part.shown = drawn(model_figures.lines(run, model), model_figures.lines(run, model, eager=True))
    part.plans = sides.plans_of(rows) if len(rows) else []
    at_top = model == sides.main_model(run)  # the first ledger of this one stands there
    folds = [
        ("throughput", "Throughput", [model_figures.throughput(run, model)]),
        ("memory", "Memory", [model_figures.memory(run, model)]),
        ("ledger", "Where a token goes, plan by plan", ledger_figures.ledgers(run, model)[at_top:]),
        ("inside", "Inside the persistent step", inside_figures.of_model(run, model)),
        ("swaps", "Swapping one op at a time, Triton to CUDA", ledger_figures.swaps(run, model)),
    ]
    for id, title, found in folds:
        if any(found):
            part.folds.append(Part(f"{part.id}-{id}", title, shown=drawn(*found)))
    if len(rows):
        part.tables.append((f"All measurements of {model}", sides.measurements(rows), not part.shown))
    account = ledger_figures.account_table(run, model)
    if len(account):
        part.tables.append((f"The whole account of a token of {model}, kernel by kernel", account, False))
    return part


def _ops(run, f, drawn, with_twins):
    names = list(dict.fromkeys([*run.op["op"], *run.fairness["op"]]))
    if with_twins:
        names += [op for op in twins.known_ops() if op not in names]
    names.sort(key=lambda n: (style.part_order(n), n))
    made = []
    for op in names:
        rows = run.op[run.op["op"] == op]
        part = Part(f"op-{slug_of(op)}", op, twins=[sources.twin_view(op)] if with_twins else [])
        if op in declared.groups()["PersistentOps"]:
            part.intro = (
                "A whole step: the models' sections have its times, as tokens of the plan persistent."
            )
        if (run.fairness["op"] == op).any():
            call = fairness.one_call(run.fairness[run.fairness["op"] == op], f.dtype if f else "")
            part.tables.append((*fairness.card(call), True))
            part.tables += [(*found, False) for found in [fairness.mix(call)] if found]
        if len(rows):
            part.shown = drawn(op_figures.against(run, f, op), heatmaps.winners(run, f, op))
            part.tables += [(*found, True) for found in [op_figures.caches(run, f, op)] if found]
            part.tables.append((f"All {len(rows)} measurements of {op}", op_figures.all_rows(rows), False))
        made.append(part)
    return made


def _below(run, f, drawn):
    """What was run on what, and what is not on the page."""
    machine = Part(
        "machine",
        "What was run, on what",
        shown=drawn(machine_figures.ceiling(run), f and machine_figures.roofline(run, f)),
    )
    made = [machine, Part("notes", f"Notes ({len(run.notices)})")]
    rows = run.fairness
    if len(rows):
        listed = figures.table(fairness.compile_times(rows), fairness.COLUMNS, **fairness.COMPILED)
        intro = (
            "What was spent on each side, and what came of it: a race says little if one side was tuned for "
            "longer. Every op's card is in its section."
        )
        made.append(Part("fairness", "Fairness cards", intro, tables=[("All fairness cards", listed, True)]))
    else:
        made.append(
            Part(
                "fairness",
                "Fairness cards",
                "None in this run: `lab inspect --all --out DIR` adds them to the records in DIR, without a "
                "GPU.",
            )
        )
    for id, title, found in (
        ("flagged", "Flagged measurements", run.suspects),
        ("skipped", "Skipped: what does not fit", run.skipped),
        ("failures", "Failures", run.failures),
    ):
        if len(found):
            what = "kind flag error op role model backend plan mode dtype batch context cache us gbps share"
            made.append(Part(id, title, tables=[(title, figures.table(found, what), True)]))
    return made


# Words and numbers around the pictures


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
        ("commit", env.commit and tables.brief(env.commit)),
        ("tables of lab tune", ", ".join(f"{k} {v or 'none'}" for k, v in (env.tuned or {}).items())),
    ]
    return [(name, tables.brief(value)) for name, value in facts if value not in (None, "")]


# Rendering


def html(views, title):
    """The report as one page."""
    styles = {}
    for v in views:
        for p in v.pictures:
            prefix = f"{v.slug}-{Path(p.file).stem}"
            p.inline = Markup(svg.inline(p.root, prefix, p.figure.alt, styles))
    return _render(title, views=views, only=None, css=style.css() + svg.rules(styles))


def twin_page(title, facts, cuda, triton, rows):
    """A CUDA and a Triton file as one page; facts: [(what, text)] above them, rows: of lab.report.twins."""
    twin = sources.side_by_side(cuda, triton, rows, "Side by side")
    title = f"{title} in CUDA and in Triton"
    return _render(title, views=[], css=style.css(), only={"facts": facts, "twin": twin})


def _render(title, css, **context):
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {
        "frame": tables.frame,
        "grid": tables.grid,
        "brief": tables.brief,
        "points": figures.POINTS,
    }
    light, dark = twins.highlight_css()
    css += tables.alignment() + light + "@media(prefers-color-scheme:dark){" + dark + "}"
    css += (HERE / "page.css").read_text()
    script = (HERE / "page.js").read_text()
    return env.get_template("page.html.j2").render(title=title, css=css, script=script, **context)


def slug_of(text, taken=None):
    """A file name or fragment from any text; unique among `taken`, which grows."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-.")[:80] or "x"
    if taken is not None:
        base, count = slug, 2
        while slug in taken:
            slug, count = f"{base}-{count}", count + 1
        taken.add(slug)
    return slug
