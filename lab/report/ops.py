"""Which op rows a picture shows, what they are called, and which of two is faster."""

from dataclasses import dataclass
from types import SimpleNamespace

from lab.records import compare
from lab.report import style
from lab.report.figures import amount

DRAWN = 40  # cases of one picture
VERDICTS = ("faster", "slower", "same", "ambiguous")


@dataclass(frozen=True)
class Focus:
    """The rows that the overview shows: one dtype, one timer, one cache state, and the shapes of one
    model."""

    dtype: str
    timer: str
    cache: str
    model: str | None

    @property
    def of_model(self):
        return f", {self.model}" if self.model else ""


def focus(run):
    """bf16, graph time and cold caches where the run has them; the model with the most ops, the largest of
    several such.

    None for a run without op rows.
    """
    rows = run.op
    if not len(rows):
        return None

    def pick(column, wishes):
        return next((w for w in wishes if (rows[column] == w).any()), rows[column].mode()[0])

    timer = pick("timer", ("graph", "wall", "event"))
    rows = rows[rows["timer"] == timer]
    dtype = pick("dtype", ("bf16", "fp16", "fp32"))
    rows = rows[rows["dtype"] == dtype]
    cache = pick("cache", ("cold", "in_model", "warm"))
    ops, largest = {}, {}
    for models, op, nbytes in zip(rows["models"], rows["op"], rows["bytes"].fillna(0)):
        for model in map(str, models):
            ops.setdefault(model, set()).add(op)
            largest[model] = max(largest.get(model, 0), nbytes)
    return Focus(
        dtype, timer, cache, max(ops, key=lambda model: (len(ops[model]), largest[model]), default=None)
    )


def of_model(rows, f):
    """The rows whose shapes the focus' model has; rows that name no model stay."""
    return rows[rows["models"].map(lambda m: not f.model or not m or f.model in map(str, m)).astype(bool)]


def chosen(rows, f):
    """The rows of a focus. An op that has none in its dtype (sample takes float32 logits) is shown in its
    own."""
    right = rows["dtype"] == f.dtype
    right |= ~rows["op"].isin(rows.loc[right, "op"])
    return of_model(rows[right & (rows["timer"] == f.timer) & (rows["cache"] == f.cache)], f)


def labelled(rows):
    """Adds `case`, what a row is called: op, use, context; and the sizes where two rows would be called the
    same."""
    plain = []
    for row in rows.itertuples():
        at = f"@{amount(row.context)}" if row.context == row.context else ""
        plain.append(" ".join(filter(None, (row.op, row.role, row.plan.removeprefix("basic"), at))))
    sizes = [shape_text(s) for s in rows["shape"]]
    called = {}
    for name, size in zip(plain, sizes):
        called.setdefault(name, set()).add(size)
    return rows.assign(
        case=[f"{name} {size}" if len(called[name]) > 1 else name for name, size in zip(plain, sizes)]
    )


def shape_text(shape):
    return " ".join(f"{k}={v}" for k, v in shape.items())


def in_order(cases):
    """Names of cases without repeats, in the order in which a decode step runs their ops."""
    return list(dict.fromkeys(sorted(cases, key=lambda case: style.part_order(case.split(" ")[0]))))


def first_of(order):
    """(the first DRAWN of a picture's cases; a sentence on those left out, "" where there are none)."""
    left = len(order) - DRAWN
    words = f" {left:,} more are not drawn, so that the picture can be read: all are in records.jsonl."
    return order[:DRAWN], words if left > 0 else ""


def verdict(row, other):
    """faster | slower | same | ambiguous: `row` next to `other`; the harness's own word where it left one."""
    if row.verdict.get(other.backend) in VERDICTS:
        return row.verdict[other.backend]
    return compare.verdict(
        *(
            SimpleNamespace(
                **{
                    name: None if (value := getattr(r, name)) != value else value
                    for name in ("us", "us_p10", "us_p90", "n")
                }
            )
            for r in (other, row)
        )
    )


def by_case(rows):
    """((case, batch), [row, ...]) in order of appearance.

    One itertuples for all groups: pandas makes a class of rows at every call.
    """
    found = {}
    for row in rows.itertuples():
        found.setdefault((row.case, row.batch), []).append(row)
    return found.items()


def pairs(rows, a, b):
    """(case, batch, row of a, row of b) wherever both backends have a row; suspects take no part. rows:
    labelled."""
    for (case, batch), group in by_case(rows[~rows["suspect"]]):
        found = {r.backend: r for r in group}
        if a in found and b in found:
            yield case, batch, found[a], found[b]


def score(rows, a="cuda", b="triton"):
    """{verdict: how often a has it next to b; "untuned": in how many of all cases a side is}."""
    counts = dict.fromkeys((*VERDICTS, "untuned"), 0)
    for _, _, one, other in pairs(labelled(rows), a, b):
        counts[verdict(one, other)] += 1
        counts["untuned"] += bool(one.tuning or other.tuning)
    return counts


def score_words(counts, a="cuda", b="triton"):
    """ "CUDA is faster in 46 of 86 cases, Triton in 26; 14 are the same; in 11 one side is untuned." """
    total, left = sum(counts[v] for v in VERDICTS), counts.get("untuned", 0)
    if not total:
        return ""
    a, b = style.backend(a).label, style.backend(b).label
    said = [f"{a} is faster in {counts['faster']} of {total} cases, {b} in {counts['slower']}"]
    for verdict, words in (("same", "the same"), ("ambiguous", "too close to call")):
        if counts[verdict]:
            said.append(f"{counts[verdict]} {'is' if counts[verdict] == 1 else 'are'} {words}")
    if left:
        said.append(f"in {left} one side is untuned")
    return "; ".join(said) + "."
