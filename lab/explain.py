"""`lab explain OP`: the two halves of an op side by side, step by step, with its bytes and its last measured times."""
from pathlib import Path

from lab.errors import LabError
from lab.files import write_whole

SIDE_BY_SIDE = 110          # columns; on a narrower terminal the halves stand one below the other


def add_arguments(parser):
    parser.add_argument("op", metavar="OP", help="an op of `lab ops`, as in rmsnorm")
    parser.add_argument("--html", metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--reports", metavar="DIR", default="reports",
                        help="where measured records lie (default: reports)")


def main(args):
    """Prints the twins, or writes them as a page. Returns 0; raises LabError for an unknown op or a missing half."""
    from lab.report import twins

    known = twins.known_ops()
    if args.op not in known:
        import difflib
        near = difflib.get_close_matches(args.op, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LabError(f"unknown op {args.op!r}: {hint}choose from {', '.join(known)}")
    cuda, triton = twins.pair(args.op)
    facts = bytes_of(args.op) + measured(args.op, Path(args.reports))
    if args.html:
        write_page(Path(args.html), args.op, facts)
        print(args.html)
    else:
        show(args.op, cuda, triton, facts)
    return 0


def bytes_of(op):
    """[(what, text)]: least traffic and arithmetic of the contract's first case, in bf16 where the op takes it."""
    import torch

    from lab.dispatch import DTYPES, Rand
    from lab.ops import find

    contract = find(op)
    dtype = torch.bfloat16 if torch.bfloat16 in contract.dtypes else contract.dtypes[0]
    name = next(n for n, d in DTYPES.items() if d == dtype)
    first = contract.cases[0]
    arguments = contract.inputs(Rand("cpu", dtype), **first.sizes)
    nbytes, flops = int(contract.nbytes(*arguments)), int(contract.flops(*arguments))
    sizes = ", ".join(f"{k}={v}" for k, v in first.sizes.items())
    return [("example", f"{sizes} in {name} ({first.why})"),
            ("bytes", f"{nbytes:,} must cross DRAM (nbytes in lab/ops/{op}.py)"),
            ("arithmetic", f"{flops:,} flop, {flops / nbytes:.2f} a byte")]


def measured(op, reports):
    """[(where, text)]: the last GPU figures of each folder below `reports`, one line a backend; [] without records."""
    from lab.harness import records
    from lab.report import load, ops, style

    if not reports.is_dir() or not any(reports.rglob(records.FILE)):
        return []
    try:
        runs = load.load(reports)
    except LabError as e:
        return [("measured", f"not shown: {e}")]
    found, seen = [], set()
    for run in runs:
        f = ops.focus(run)
        rows = run.op[run.op["op"] == op]
        if f is None or run.emulated or run.path in seen or not len(rows):
            continue
        seen.add(run.path)
        rows = ops.labelled(ops.chosen(rows, f))
        rows = rows[~rows["suspect"] & rows["of_ceiling"].notna()]
        if not len(rows):
            continue
        rows = rows[rows["batch"] == rows["batch"].min()]
        rows = rows[rows["case"] == rows.loc[rows["bytes"].idxmax(), "case"]]
        for backend in style.backend_order(rows["backend"]):
            row = rows[rows["backend"] == backend].iloc[0]
            found.append((f"{run.device}, run {run.id}",
                          f"{style.backend(backend).label}: {row['us']:,.1f} us, {row['of_ceiling']:.0%} of the "
                          f"ceiling ({row['case']}, batch {row['batch']:.0f}, {row['dtype']}, {row['cache']} cache, "
                          f"n {row['n']:.0f})"))
    return found


def show(op, cuda, triton, facts):
    """Prints to the terminal: side by side where it is wide enough."""
    from rich.console import Console, Group
    from rich.markup import escape
    from rich.syntax import Syntax
    from rich.table import Table
    from rich.text import Text

    from lab.report import style, twins

    console = Console()
    wide = console.width >= SIDE_BY_SIDE
    halves = (cuda, triton)
    looks = [style.backend(h.language) for h in halves]

    def code(half, chunk):
        lexer = "cuda" if half.language == "cuda" else "python"
        return Syntax(chunk.code, lexer, theme="ansi_dark", line_numbers=True, start_line=chunk.first, word_wrap=True,
                      background_color="default", dedent=False)

    def side(half, look, step):
        if step is None:
            return Text(f"{look.label} has no such step.", style="dim")
        parts = []
        for chunk in step.chunks:
            which = f", {chunk.kernel}" if len(step.chunks) > 1 and chunk.kernel else ""
            parts.append(Text.assemble((f"{look.label}{which}: ", f"bold {look.color}"), chunk.text))
            if chunk.lines:
                parts.append(code(half, chunk))
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

    console.rule(f"[bold]{escape(op)}[/bold]")
    both(*(Group(Text(h.name, style=f"bold {look.color}"), Text(h.header)) for h, look in zip(halves, looks)))
    console.print()
    for what, text in facts:
        console.print(Text.assemble((what + ": ", "bold"), text))
    for number, title, *steps in twins.rows(cuda, triton):
        console.rule(f"{number}. {escape(title)}", align="left")
        both(*(side(h, look, step) for h, look, step in zip(halves, looks, steps)))
    console.rule("Around the steps", align="left")
    for h in halves:
        outside = sum(len(c.lines) for c in h.around)
        console.print(Text(f"{h.name}: {h.count} lines, {outside} of them outside the steps (declarations and launch)",
                           style="dim"))


def write_page(path, op, facts):
    """Writes the twins as one self-contained page."""
    from lab.report import page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LabError(f"cannot write {path}: {e.strerror}") from None
    write_whole(path, page.twin_page(op, facts))
