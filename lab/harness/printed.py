"""What a run of the bench measured, as text for a terminal: `lab bench` prints it when it has measured.

Every function takes the rows of one run (lab/records/schema.py) and returns lines. What a run measured first
matters most (STAGES in bench.py), so of long tables the first lines are printed and the rest is counted.
"""

import operator
import shlex

from lab.errors import one_line
from lab.harness import untuned
from lab.records import compare
from lab.text import columns

OURS = ("cuda", "triton")
LINES = 40  # of one table
CACHES = ("cold", "in_model", "warm")  # the first of these that a size was measured in
NAMES = {"cuda": "CUDA", "triton": "Triton"}


def text_of(rows, out, what="all"):
    """The tables of a run, and what to call next. out: the folder of its records; what: as of a Request."""
    from lab.harness import ledger_verb

    ledger = [r for r in rows if r.kind == "ledger"]
    lines = [*models(rows), *accuracy(rows), *ops(rows), *ladders(rows)]
    lines += totals(ledger) if what == "all" else [ledger_verb.text_of(ledger)] if ledger else []
    if not lines:
        return ""
    if any(getattr(r, "emulated", False) for r in rows):
        lines += ["", "emulated: these times say how long emulation takes, and nothing about a GPU"]
    return "\n".join([*lines, "", *following(rows, out)])


def following(rows, out):
    """The commands that go on from here."""
    folder = shlex.quote(str(out))
    found = [(f"lab report {folder}", "draws all of this as a page")]
    backends = {r.backend for r in rows if r.kind == "op" and r.us and r.rung is None and r.models}
    if set(OURS) <= backends:
        found.append((f"lab bench crossover --out {folder}", "which backend to take at which size"))
    return [("next: " if i == 0 else "      ") + line for i, line in enumerate(columns(found))]


def ops(rows):
    """A line for each size of an op: the time of both languages and of the fastest other backend; the share
    of the ceiling that the faster one of ours reached; what CUDA is next to Triton."""
    cards = untuned.by_cards([r for r in rows if r.kind == "fairness"])
    sizes = {}  # size -> (cache, timer) -> backend -> row
    for r in rows:
        if r.kind == "op" and r.us and r.rung is None and r.timer != "event":
            size = r.op, r.role, r.dtype, r.batch, r.context, shape_of(r), r.weight_format
            sizes.setdefault(size, {}).setdefault((r.cache, r.timer), {})[r.backend] = r
    if not sizes:
        return []
    dtypes = list(dict.fromkeys(size[2] for size in sizes))
    lines = [("op", "size", "CUDA us", "Triton us", "best other us", "", "share", "CUDA is", "")]
    caches = []
    for (op, role, dtype, batch, context, shape, form), modes in sizes.items():
        mode = min(modes, key=lambda m: CACHES.index(m[0]) if m[0] in CACHES else len(CACHES))
        caches.append(mode[0])
        found = modes[mode]
        words = [f"b{batch}", f"ctx {context}" if context else "", shape, form, dtype * (len(dtypes) > 1)]
        others = sorted((r for name, r in found.items() if name not in OURS), key=lambda r: r.us)
        cuda, triton = (found.get(name) for name in OURS)
        first = min((r for r in (cuda, triton) if r), key=lambda r: r.us, default=None)
        lines.append(
            (
                " ".join(filter(None, (op, role))),
                " ".join(filter(None, words)),
                us(cuda),
                us(triton),
                us(others[0] if others else None),
                others[0].backend if others else "",
                share(first or others[0]),
                next_to(cuda, triton),
                left_untuned(found, cards),
            )
        )
    which = " or ".join(cache for cache in CACHES if cache in caches)
    told = f"ops in {' and '.join(dtypes)}, {which} caches; share: of the bandwidth, the faster of ours"
    return ["", told, *shortened(lines, right=(2, 3, 4, 6))]


def models(rows):
    """A line for each configuration of a model, those whose kernels are launched one by one last."""
    mine = sorted((r for r in rows if r.kind == "model" and r.us), key=lambda r: r.mode == "eager")
    if not mine:
        return []
    heading = "model backend plan mode weights batch context ms tokens/s".split()
    lines = [(*heading, "p10 to p90", "share")]
    for r in mine:
        swapped = "".join(f" {op}={name}" for op, name in r.overrides.items())
        weights = r.weight_format or r.dtype
        weights += f", KV {r.kv_dtype}" if r.kv_dtype else ""
        between = "" if r.us_p10 is None else f"{tokens(r, r.us_p90)} to {tokens(r, r.us_p10)}"
        lines.append(
            (
                r.model + (f" on {r.ranks} GPUs" if r.ranks > 1 else ""),
                r.backend + swapped,
                r.plan,
                r.mode,
                weights,
                r.batch,
                r.context,
                f"{r.us / 1e3:.3f}",
                tokens(r, r.us),
                between,
                share(r),
            )
        )
    return ["", "decode steps; share: of the measured bandwidth", *shortened(lines, (5, 6, 7, 8, 10))]


def ladders(rows):
    """A line for each rung: both languages, and how many times faster it is than the rung that it changes."""
    mine = [r for r in rows if r.kind == "op" and r.us and r.rung is not None]
    if not mine:
        return []
    sizes = {}  # size -> rung -> backend -> row
    for r in mine:
        size = r.op, r.batch, r.context, shape_of(r), r.weight_format
        sizes.setdefault(size, {}).setdefault(r.rung, {})[r.backend] = r
    lines = []
    for (op, batch, context, shape, form), rungs in sizes.items():
        size = " ".join(filter(None, (form, f"b{batch}", f"ctx {context}" if context else "", shape)))
        table = [("", "rung", "CUDA us", "share", "times", "Triton us", "share", "times")]
        for number, found in sorted(rungs.items()):
            cells = []
            for backend in OURS:
                r = found.get(backend)
                cells += [us(r), share(r), gain(rungs, r)]
            table.append((number, next(iter(found.values())).config.get("name", ""), *cells))
        lines += ["", f"ladder of {op}, {size}; times: as fast as the rung that it changes"]
        lines += columns(table, right=(0, 2, 3, 4, 5, 6, 7), indent="  ")
    return lines


def gain(rungs, row):
    """How many times faster a rung is than the one that it changes, or the next below of its language; "" of
    the lowest, and where another size is the one to judge it. rungs: number -> backend -> row of one size."""
    if row is None or not row.config.get("judged", True):
        return ""
    changes = row.config.get("over") or row.rung - 1
    below = [n for n, found in rungs.items() if n <= changes and row.backend in found]
    return f"{rungs[max(below)][row.backend].us / row.us:.2f}" if below else ""


def accuracy(rows):
    """A line for each weight format of a model."""
    mine = [r for r in rows if r.kind == "accuracy" and r.kl is not None]
    if not mine:
        return []
    lines = [("model", "weights", "KL divergence", "same next token", "MB a token")]
    for r in mine:
        size = f"{(r.bytes or 0) / 1e6:.0f}"
        lines.append((r.model, r.weight_format, f"{r.kl:.4f}", f"{r.top1:.1%}", size))
    return ["", "accuracy, beside the weights that are not rounded", *shortened(lines, (2, 3, 4))]


def totals(ledger):
    """A line for each ledger of a run that holds several kinds of measurements."""
    same = operator.attrgetter("model", "backend", "plan", "batch", "context", "weight_format")
    rest = {same(r): r.us for r in ledger if r.row == "unexplained"}
    lines = [("ledger", "backend", "plan", "us a token", "unexplained")]
    for r in ledger:
        if r.row == "total" and r.us:
            left = f"{rest[same(r)] / r.us:.1%}" if rest.get(same(r)) is not None else ""
            lines.append((r.model, r.backend, r.plan, f"{r.us:.1f}", left))
    return ["", "ledgers: lab ledger MODEL prints one", *shortened(lines, (3, 4))] if lines[1:] else []


def shortened(lines, right=()):
    """The first LINES of a table below its heading, indented."""
    shown = columns(lines[: LINES + 1], right=right, indent="  ")
    left = len(lines) - 1 - LINES
    return shown + ([f"  ... and {left} more lines, in the records and in the report"] if left > 0 else [])


def shape_of(row):
    return " ".join(f"{name}={value}" for name, value in row.shape.items())


def us(row):
    return "" if row is None else f"{row.us:.1f}" if row.us < 10000 else f"{row.us:.0f}"


def tokens(row, time_us):
    """Tokens a second, if a step of `row` takes time_us."""
    rate = row.batch / time_us * 1e6
    return f"{rate:.{0 if rate >= 1000 else 1 if rate >= 100 else 2}f}"


def share(row):
    return "" if row is None or row.of_ceiling is None else f"{row.of_ceiling:.0%}"


def next_to(cuda, triton):
    """What CUDA is next to Triton: the harness' own word, if it left one."""
    if cuda is None or triton is None:
        return ""
    said = cuda.verdict.get("triton")
    return said or compare.without_win(compare.verdict(triton, cuda), triton, cuda)


def left_untuned(found, cards):
    """ "(Triton untuned)": which of ours nobody raced settings for."""
    names = [NAMES[b] for b in OURS if b in found and untuned.is_untuned(found[b], cards)]
    return f"({' and '.join(names)} {untuned.WORD})" if names else ""


def failed(row):
    """One line about a row with an error."""
    name = getattr(row, "op", None) or getattr(row, "model", "")
    side = getattr(row, "backend", None) or row.weight_format
    return one_line(f"failed: {row.kind} {name} {side}: {row.error}")
