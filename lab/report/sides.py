"""A model's measured steps as three sides: CUDA, Triton, and the best of the others, its peers.

What the pictures, the cards and the verdict share: which rows belong together, and which of them is the best.
"""

import pandas as pd

from lab.report import style
from lab.report.figures import table

SIDES = ("cuda", "triton", "peer")  # peer: the fastest of the other backends
MODES = {  # how a step was launched: in words
    "graph": "one CUDA graph a step",
    "eager": "kernels launched one by one",
    "compile": "torch.compile",
}
COLUMNS = (
    "series tuning batch context us us_p10 us_p90 us_p99 n tokens_per_s ttft_ms gbps share linearity flag"
)


def models(run):
    """Model names, the one that holds the most bytes first."""
    names = list(dict.fromkeys([*run.model["model"], *run.ledger["model"], *run.inside["model"]]))
    held = run.model.groupby("model")["weight_bytes"].max().fillna(0)
    return sorted(names, key=lambda name: -held.get(name, 0))


def main_model(run):
    """The model of which most is said first: the one that holds the most bytes of those that CUDA or Triton
    ran; None without model rows."""
    rows = run.model
    ours = rows[rows["backend"].isin(["cuda", "triton"])]
    rows = ours if len(ours) else rows
    held = rows.groupby("model", sort=False)["weight_bytes"].max().fillna(0)
    return None if not len(rows) else held.idxmax()


def series(run, model):
    """The rows of one model without overrides, in its main dtype; `series` names the line that each belongs
    to."""
    rows = run.model[(run.model["model"] == model) & (run.model["overrides"].map(len) == 0)]
    if not len(rows):
        return rows.assign(series=[])
    dtype = next((d for d in ("bf16", "fp16", "fp32") if (rows["dtype"] == d).any()), rows["dtype"].iloc[0])
    rows = rows[rows["dtype"] == dtype]
    several = [c for c in ("plan", "mode") if rows.loc[rows[c] != "-", c].nunique() > 1]
    told = [[style.backend(r.backend).label, *(getattr(r, c) for c in several)] for r in rows.itertuples()]
    return rows.assign(series=[" ".join(w for w in words if w not in ("", "-")) for words in told])


def plans_of(rows):
    """The plans that CUDA or Triton ran, where there are several; in their order."""
    found = set(rows.loc[rows["backend"].isin(["cuda", "triton"]), "plan"]) - {"", "-"}
    return (
        sorted(found, key=lambda p: (style.PLANS.index(p) if p in style.PLANS else 9, p))
        if len(found) > 1
        else []
    )


def launched(rows, eager=False):
    """The rows of steps that a graph replays, or of those launched one by one; all rows where there is one
    kind only. torch.compile counts as the first."""
    right = (rows["mode"] == "eager") == eager
    return rows[right] if right.any() else rows


def first_size(rows):
    """The rows of the smallest batch and, of those, of the smallest context."""
    rows = rows[rows["batch"] == rows["batch"].min()]
    return rows[rows["context"] == rows["context"].min()]


def with_side(rows):
    """Adds `side`: cuda, triton, or peer for every other backend."""
    return rows.assign(side=rows["backend"].where(rows["backend"].isin(["cuda", "triton"]), "peer"))


def fastest(rows, keys=()):
    """The fastest row of each side, or of each side and each value of the keys."""
    return with_side(rows).sort_values("us", kind="stable").drop_duplicates(["side", *keys])


def side_look(side):
    """Label, colour and marker of one of the three sides."""
    return style.backend(side) if side != "peer" else style.Look("best peer", style.MUTED, "D")


def words(row):
    """ "CUDA persistent", "torch.compile": what a row of series() ran."""
    if row.mode == "compile":
        return f"{style.backend(row.backend).label}.compile"
    return " ".join([style.backend(row.backend).label, *(w for w in (row.plan,) if w not in ("", "-"))])


def floor_of(rows):
    """The time in us that the bytes of these rows (of one size) take at the measured bandwidth, or None."""
    known = rows[rows["of_ceiling"].notna() & ~rows["suspect"]]
    return float((known["us"] * known["of_ceiling"]).median()) if len(known) else None


def modes(rows):
    return ", ".join(MODES.get(m, m) for m in dict.fromkeys(rows["mode"]) if m)


def foreign(run):
    """Decode steps of other programs beside ours: [(caption, frame)], one for each program and version."""
    found = []
    for program in dict.fromkeys((r.program, r.version, r.settings, r.source) for r in run.foreign):
        mine = [r for r in run.foreign if (r.program, r.version, r.settings, r.source) == program]
        sizes, lines = {}, []
        for r in mine:
            sizes.setdefault((r.model, r.dtype, r.batch, r.context), {})[r.what] = r.us / 1e3
        for (model, dtype, batch, context), theirs in sizes.items():
            line = {"model": model, "dtype": dtype, "batch": batch, "context": context}
            line |= {f"{program[0]}, {what} (ms)": ms for what, ms in theirs.items()}
            rows = series(run, model)
            rows = rows[(rows["batch"] == batch) & (rows["context"] == context) & (rows["dtype"] == dtype)]
            for row in fastest(launched(rows)).itertuples() if len(rows) else ():
                if row.side != "peer":
                    line[f"{side_look(row.side).label}, device (ms)"] = row.us / 1e3
                    line[f"{side_look(row.side).label}'s plan"] = row.plan
            lines.append(line)
        name, version, settings, source = program
        when = ", ".join(dict.fromkeys(r.time for r in mine if r.time))
        caption = f"{name} {version} beside ours, measured apart{f' on {when}' if when else ''}: {source}. "
        found.append((caption + f"Settings: {settings}", pd.DataFrame(lines)))
    return found


def measurements(rows):
    return table(rows, COLUMNS)
