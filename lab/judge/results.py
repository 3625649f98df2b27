"""Runs the race of a kernel that the judge has found right, and says what came of it."""

from __future__ import annotations

from lab.errors import one_line
from lab.harness import untuned
from lab.harness.request import Request
from lab.judge.race import RacedFile
from lab.records import compare


def race(name: str, file: RacedFile, request: Request) -> int:
    """Benchmarks a kernel, called `name`, beside the built-in backends and the vendor's; the exit status."""
    from lab.harness import bench

    return bench.measure(request, own={name: file})


def draw(name: str, out: str) -> int:
    """Says who won, by the records in `out`, and draws the report; 1 if no size of the file has a time."""
    from lab.records import schema
    from lab.report import build

    rows = schema.read(out).rows
    for line in verdicts(rows, name):
        print(line)
    mine = [r for r in rows if r.kind == "op" and r.backend == name and r.run == rows[-1].run]
    return build.report(out) or int(not any(r.us for r in mine))


def untuned_beside(row, rows):
    """The backends that were measured at `row`'s size in its run with settings that nobody raced."""
    cards = untuned.by_cards([r for r in rows if r.kind == "fairness" and r.run == row.run])
    return {
        r.backend
        for r in rows
        if r.kind == "op"
        and (r.run, r.op, r.role, r.dtype, r.batch, r.context, r.shape)
        == (row.run, row.op, row.role, row.dtype, row.batch, row.context, row.shape)
        and untuned.is_untuned(r, cards)
    }


def verdicts(rows, name):
    """A line for each size of the last run that raced this file: its time, its share of the ceiling, and how
    each other backend did against it, with "untuned" beside one whose settings nobody raced."""
    own = [
        r
        for r in rows
        if r.kind == "op"
        and r.backend == name
        and (r.cache == "cold", r.timer) in ((True, "graph"), (False, "wall"))
    ]
    for row in (r for r in own if r.run == own[-1].run):
        size = " ".join(f"{k}={v}" for k, v in row.shape.items())
        line = one_line(f"{row.op} {row.role or ''} {row.dtype} batch {row.batch} {size}: ") + " "
        if row.error:
            yield line + one_line(f"failed: {row.error}")
            continue
        share = "" if row.of_ceiling is None else f", {row.of_ceiling:.0%} of the ceiling"
        if row.of_ceiling is not None and compare.above_ceiling(row):
            yield line + f"{row.us:.1f} us{share}; above the ceiling: not a time of all the work, so no win"
            continue
        left = untuned_beside(row, rows)
        words = {"faster": "faster than", "slower": "slower than", "same": "the same as"}
        yield (
            line
            + f"{row.us:.1f} us{share}; "
            + ", ".join(
                f"{words.get(verdict, 'too close to call against')} {one_line(other)}"
                + f" ({untuned.WORD})" * (other in left)
                for other, verdict in (row.verdict or {}).items()
            )
        )
