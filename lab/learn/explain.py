"""`lab explain OP`: the two kernels of an op side by side, step by step, with the bytes that it moves and its
last measured times. Helpers are unfolded where they are called (lab/learn/unfold.py); beside the Triton code
stands what its compiler made of it at the same size (lab/learn/compiled.py). `lab explain FORMAT`: how both
languages unpack a weight format, with its bits a weight.

With --rungs it shows the op's ladder: what each rung changes, what that should gain and what it gained when
it was measured. So it does for a ladder that is not called like its op.
"""

from pathlib import Path

from lab import rungs
from lab.errors import LabError
from lab.files import write_whole
from lab.learn import glossary

INDENT = 2  # columns by which a helper's code stands to the right of its call
SIDE_BY_SIDE = 100  # columns; on a narrower terminal the kernels stand one below the other


def add_arguments(parser):
    parser.add_argument(
        "op",
        metavar="NAME",
        nargs="?",
        help="an op or a weight format of `lab ops`, as in rmsnorm or int4-g128",
    )
    parser.add_argument(
        "--rungs", action="store_true", help="the op's ladder instead, from a naive kernel to its own kernel"
    )
    parser.add_argument("--step", type=int, metavar="N", help="only this step, or with --rungs this rung")
    parser.add_argument(
        "--unfold",
        nargs="?",
        choices=("loops", "all", "none"),
        const="all",
        default="loops",
        help="helpers to show where they are called, with file and line: those that hold a loop or are "
        "called in one (loops, the default), all (--unfold alone), or none",
    )
    parser.add_argument(
        "--no-compiled",
        dest="compiled",
        action="store_false",
        help="leave out what Triton's compiler made of its kernel, for which it is compiled",
    )
    parser.add_argument(
        "--glossary",
        nargs="?",
        const="",
        metavar="WORD",
        help="what a word means here; without it: all words",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page instead of printing")
    parser.add_argument(
        "--reports", metavar="DIR", help="where measured records lie (default: the lab's own reports)"
    )


def main(args):
    """Prints the two kernels, or the two files of a weight format, or writes them as a page. Returns 0.

    Raises LabError for an unknown name, a missing kernel, or, with --rungs, an op that has no ladder.
    """
    if args.glossary is not None:
        if args.op:
            raise LabError("--glossary explains a word, not an op: lab explain --glossary WORD")
        return glossary.show(args.glossary)
    if args.op is None:
        raise LabError("which op? `lab ops` lists them; lab explain --glossary WORD explains a word")
    from lab.report import twins

    known, formats = twins.known_ops(), twins.known_formats()
    # int4-g128 is one of the formats of the file int4.
    format_file = args.op if args.op in formats else args.op.split("-")[0]
    only_rungs = args.op in rungs.NAMES and args.op not in known  # a ladder that is not called like its op
    if only_rungs:
        known.append(args.op)
    if args.op not in known and format_file in formats:
        return explain_format(format_file, args)
    if args.op not in known:
        import difflib

        near = difflib.get_close_matches(args.op, known + formats, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LabError(
            f"unknown op {args.op!r}: {hint}choose from {', '.join(known)}, or a weight format: "
            f"{', '.join(formats)}"
        )
    reports = twins.ROOT / "reports" if args.reports is None else Path(args.reports)
    if args.rungs or only_rungs:
        (cuda, triton, rows), title = twins.ladder(args.op), f"The ladder of {args.op}"
        facts, made = measured_rungs(args.op, rows, reports), ()
    else:
        cuda, triton = twins.pair(args.op)
        rows, title = twins.rows(cuda, triton), args.op
        facts, size = measured(args.op, reports)
        if size is None:
            found, size = bytes_of(args.op)
            facts = found + facts
        made = made_by_triton(size, facts) if args.compiled and not args.html else ()
    if args.reports is not None and not reports.is_dir():
        facts.append(("measured", f"not shown: there is no folder {reports}"))
    give(args, title, facts, cuda, triton, rows, made)
    return 0


def made_by_triton(size, facts):
    """What Triton's compiler made of the kernels at a size, (arguments of a Point, name of a dtype); adds to
    the facts which kernels these are, or why there is none."""
    from lab.harness.shapes import Point
    from lab.ops import find

    point, dtype = Point(**size[0]), size[1]
    if (
        find(point.op).whole_step or find(point.op).between_ranks
    ):  # which is called with a model, or with ranks
        facts.append(("Triton's compiler", f"not shown for this op: lab inspect {point.op}"))
        return ()
    try:
        from lab.learn import compiled

        made = compiled.at_point(find(point.op), point, dtype)
    except (LabError, ImportError) as error:
        facts.append(("Triton's compiler", f"not shown: {error}"))
        return ()
    facts += [("Triton's compiler", f"at this size {one.summary}") for one in made]
    return made


def explain_format(name, args):
    """The two files that unpack the weight formats of lab/formats/NAME.py. Returns 0.

    Raises LabError for a format that the file does not have, and for options that are about ops.
    """
    import importlib

    from lab.report import twins

    for option, value in (("--rungs", args.rungs), ("--reports", args.reports is not None)):
        if value:
            raise LabError(f"{option} is about ops, and {args.op} is a weight format")
    formats = {f.name: f for f in importlib.import_module(f"lab.formats.{name}").FORMATS}
    if args.op != name and args.op not in formats:
        raise LabError(f"unknown weight format {args.op!r}: choose from {', '.join(formats)}")
    facts = [(f.name, f"{f.bits_a_weight:g} bits a weight; {f.summary}") for f in formats.values()]
    facts.append(("scales", "multiplied with float32 sums, in core/packed_* of both languages"))
    cuda, triton = twins.pair(f"{twins.FORMATS}/{name}")
    give(args, name, facts, cuda, triton, twins.rows(cuda, triton))
    return 0


def give(args, title, facts, cuda, triton, rows, made=()):
    """Writes the page args.html, or prints if it is None. args.step: only that step, counted from 1. made: of
    lab.learn.compiled."""
    if args.html and (args.unfold == "all" or args.step is not None):
        raise LabError("--unfold and --step are about the terminal, not about --html")
    if args.step is not None:
        if not 1 <= args.step <= len(rows):
            raise LabError(f"{title} has the steps 1 to {len(rows)}")
        rows = rows[args.step - 1 : args.step]
    if args.html:
        write_page(Path(args.html), title, facts, cuda, triton, rows)
        print(args.html)
    else:
        show(title, cuda, triton, rows, facts, args.unfold, made)


def bytes_of(op):
    """The least traffic and the arithmetic of the contract's first case, in bf16 if the op takes it: ([(what,
    text)], (arguments of a Point, name of a dtype))."""
    import torch

    from lab.contract import Rand, dtype_name
    from lab.ops import find

    contract = find(op)
    dtype = torch.bfloat16 if torch.bfloat16 in contract.dtypes else contract.dtypes[0]
    name = dtype_name(dtype)
    first = contract.cases[0]
    a = contract.bound(*contract.inputs(Rand("cpu", dtype), **first.sizes))
    nbytes, flops = int(contract.nbytes(a)), int(contract.flops(a))
    sizes = ", ".join(f"{k}={v}" for k, v in first.sizes.items())
    return [
        ("example", f"{sizes} in {name} ({first.why})"),
        ("bytes", f"{nbytes:,} must cross DRAM (nbytes in lab/ops/{op}.py)"),
        ("arithmetic", f"{flops:,} flop, {flops / nbytes:.2f} a byte"),
    ], (dict(op=op, role=None, batch=1, context=None, shape={}, case=dict(first.sizes)), name)


def runs_of(reports):
    """The runs below `reports`, newest first, and messages about unreadable records: (runs, [(what,
    text)])."""
    from lab.records import schema
    from lab.report import load

    if not reports.is_dir() or not any(reports.rglob(schema.FILE)):
        return [], []
    try:
        return load.load(reports), []
    except LabError as e:
        return [], [("measured", f"not shown: {e}")]


def measured_rungs(op, rows, reports):
    """Adds to the rungs what the last run on a GPU measured of them. Returns [(what, text)] about that run.

    rows: the Rows of twins.ladder(op), which begin with rung 1.
    """
    from lab.report import ladder_figures, ops, style

    runs, said = runs_of(reports)
    run = next((r for r in runs if not r.emulated and op in ladder_figures.measured(r)), None)
    if run is None:
        return said + [("measured", f"not yet: `lab bench ops {op} --ladder` measures it on a GPU")]
    found = ladder_figures.rows_of(run, op)[0]
    gains = ladder_figures.steps(run, op, found)
    found = found[~found["suspect"]]
    for number, row in enumerate(rows, 1):
        words = []
        for backend in style.backend_order(found["backend"]):
            for one in found[(found["rung"] == number) & (found["backend"] == backend)].itertuples():
                judged = gains[(gains["rung"] == number) & (gains["backend"] == backend)]
                words.append(
                    style.backend(backend).label
                    + (f", {one.tuning}," if one.tuning else "")
                    + f" {one.us:,.1f} us"
                    + (f", {one.of_ceiling:.0%} of the ceiling" if one.of_ceiling == one.of_ceiling else "")
                    + "".join(ladder_figures.told(gain) for gain in judged.itertuples())
                )
        row.intro += (("measured", "; ".join(words) or "not in that run"),)
    first = found.iloc[0]
    return said + [
        (
            "measured",
            f"{run.device}, run {run.id}: {ops.shape_text(first['shape'])}, batch "
            f"{first['batch']:.0f}, {first['dtype']}, {first['cache']} cache",
        )
    ]


def measured(op, reports):
    """One size of the op with its bytes and arithmetic, and the last GPU times at that size of each folder
    below `reports`: ([(what, text)], (arguments of a Point, name of a dtype) or None without records).

    The size comes from the newest run on a GPU: at the smallest batch, the one with the most bytes.
    """
    from lab.records import schema
    from lab.report import ops, style

    runs, found = runs_of(reports)
    size, point, seen = None, None, set()
    for run in runs:
        f = ops.focus(run)
        rows = run.op[run.op["op"] == op]
        if f is None or run.emulated or run.path in seen or not len(rows):
            continue
        rows = ops.labelled(ops.chosen(rows, f))
        rows = rows[~rows["suspect"] & rows["of_ceiling"].notna()]
        if not len(rows):
            continue
        if size is None:
            rows = rows[rows["batch"] == rows["batch"].min()]
            first = rows.loc[rows["bytes"].fillna(0).idxmax()]
            size, point = _size(first, schema.freeze), _point(first)
            found += [
                (
                    "size",
                    f"{first['case']}: {ops.shape_text(first['shape'])}, batch {first['batch']:.0f}, "
                    f"{first['dtype']}",
                )
            ]
            if first["bytes"] > 0:
                found += [
                    ("bytes", f"{first['bytes']:,.0f} must cross DRAM (nbytes in lab/ops/{op}.py)"),
                    (
                        "arithmetic",
                        f"{first['flops']:,.0f} flop, {first['flops'] / first['bytes']:.2f} a byte",
                    ),
                ]
        rows = rows[[_size(row, schema.freeze) == size for _, row in rows.iterrows()]]
        if not len(rows):  # another run measured other sizes
            continue
        seen.add(run.path)
        for backend in style.backend_order(rows["backend"]):
            row = rows[rows["backend"] == backend].iloc[0]
            name = style.backend(backend).label + (f", {row['tuning']}" if row["tuning"] else "")
            found.append(
                (
                    f"{run.device}, run {run.id}",
                    f"{name}: {row['us']:,.1f} us, {row['of_ceiling']:.0%} of the ceiling "
                    f"({row['cache']} cache, n {row['n']:.0f})",
                )
            )
    return found, point


def _point(row):
    """(arguments of a Point, name of its dtype) of a row of op measurements."""
    context = None if row["context"] != row["context"] else int(row["context"])
    size = dict(op=row["op"], role=None, batch=int(row["batch"]), context=context, shape=row["shape"])
    return size, row["dtype"]


def _size(row, freeze):
    """The values by which the sizes of two rows of op measurements are compared."""
    context = None if row["context"] != row["context"] else row["context"]
    return row["dtype"], row["batch"], context, freeze(row["shape"])


def show(title, cuda, triton, rows, facts, unfolded="loops", made=()):
    """Prints the kernels to the terminal, through a pager if there is one, and side by side if it is wide
    enough. rows: of lab.report.twins. unfolded: as in lab.learn.unfold.pieces; made: of
    lab.learn.compiled."""
    from rich.console import Console

    from lab.learn import pager

    class Terminal(Console):
        def on_broken_pipe(self):  # rich would exit with status 1; lab.cli handles this error
            raise BrokenPipeError

    console, words = Terminal(), pager.command()
    if words is None:
        draw(console, title, cuda, triton, rows, facts, unfolded, made)
        return
    with console.capture() as captured:
        draw(console, title, cuda, triton, rows, facts, unfolded, made)
    pager.show(captured.get(), words)


def draw(console, title, cuda, triton, rows, facts, unfolded, made):
    """Prints the kernels to a console of rich."""
    from rich.console import Group
    from rich.markup import escape
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.table import Table
    from rich.text import Text

    from lab.learn import unfold
    from lab.report import style

    wide = console.width >= SIDE_BY_SIDE
    twins = (cuda, triton)
    looks = [style.backend(twin.language) for twin in twins]
    seen = {twin.language: set() for twin in twins}

    def code(twin, chunk):
        lexer = "cuda" if twin.language == "cuda" else "python"
        return Syntax(
            chunk.code,
            lexer,
            theme="ansi_dark",
            line_numbers=True,
            start_line=chunk.first,
            word_wrap=True,
            background_color="default",
            dedent=False,
        )

    def with_helpers(twin, look, chunk):
        given = twin.language, twin.name, chunk.first, len(chunk.lines)
        for piece in unfold.pieces(*given, unfolded, seen[twin.language]):
            indent = (0, 0, 0, INDENT * piece.depth)
            if piece.helper:
                where = f"{piece.file}:{piece.first} {piece.helper.name}"
                yield Padding(Text(where, style=look.color), indent)
            yield Padding(code(twin, piece), indent)

    def compiled(chunk):
        """What Triton's compiler made of a chunk's lines."""
        for kernel in made if not chunk.kernel else [k for k in made if k.kernel == chunk.kernel]:
            for line in range(chunk.first, chunk.first + len(chunk.lines)):
                if line in kernel.by_line:
                    said = "; ".join(kernel.by_line[line])
                    yield Text(f"line {line}, compiled: {said}", style="italic")

    def side(twin, look, step, missing):
        if step is None:
            return Text(missing, style="dim")
        parts = []
        for chunk in step.chunks:
            which = f", {chunk.kernel}" if len(step.chunks) > 1 and chunk.kernel else ""
            parts.append(Text.assemble((f"{look.label}{which}: ", f"bold {look.color}"), chunk.text))
            if chunk.lines:
                parts += with_helpers(twin, look, chunk)
                parts += compiled(chunk) if twin.language == "triton" else ()
            elif chunk.below:
                parts.append(Text(f"The code is that of {chunk.below}, below.", style="dim"))
        return Group(*parts)

    def both(left, right):
        if not wide:
            console.print(left)
            console.print(right)
            return
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(ratio=1)
        table.add_column(ratio=1)
        table.add_row(left, right)
        console.print(table)

    console.rule(f"[bold]{escape(title)}[/bold]")
    both(
        *(
            Group(Text(twin.name, style=f"bold {look.color}"), Text(twin.header))
            for twin, look in zip(twins, looks)
        )
    )
    console.print()
    for what, text in facts:
        console.print(Text.assemble((what + ": ", "bold"), text))
    for row in rows:
        console.rule(escape(row.title), align="left")
        for what, text in row.intro:
            console.print(Text.assemble((what + ": ", "bold"), text))
        both(*map(side, twins, looks, row.steps, row.missing))
    console.rule("Around the steps", align="left")
    for twin in twins:
        outside = sum(len(c.lines) for c in twin.around)
        console.print(
            Text(
                f"{twin.name}: {twin.count} lines, {outside} of them outside the steps "
                "(declarations and launch)",
                style="dim",
            )
        )
    console.print(Text("all helpers: --unfold; a word: lab explain --glossary WORD", style="dim"))


def write_page(path, title, facts, cuda, triton, rows):
    """Writes the two kernels as one self-contained page."""
    from lab.report import page

    write_whole(path, page.twin_page(title, facts, cuda, triton, rows))
