"""`lab compare A B`: were the rows of run B slower than those of run A? Reads records, never imports torch.

A and B are a folder, a records file, or either with `@RUN` for one run of it (the last run otherwise). Rows
are matched by schema.key. Exit status: 0 same or faster, 1 slower beyond --fail-on-slower, 2 not comparable,
or not in full: a run with a line that holds no usable value (a time that is no number, say) does not pass.

Two runs of one commit on one card measure the same thing: every faster or slower is then a false alarm, and
their share is printed (and recorded, with --record). It should stay below 5%.
"""

import functools
import json
import math
import operator
import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lab.errors import LabError, shown
from lab.files import write_whole
from lab.numbers import number
from lab.records import schema
from lab.text import columns

FASTER, SLOWER, SAME, AMBIGUOUS, FAILED = "faster", "slower", "same", "ambiguous", "failed"
VERDICTS = (SLOWER, FAILED, AMBIGUOUS, FASTER, SAME)  # the order of the table: what needs a look comes first
WITHIN_RUN = 0.01  # smallest relative effect called real between interleaved measurements of one process
BETWEEN_RUNS = 0.03  # and between two processes: memory layout, clocks and temperature differ
MOST_OF_CEILING = 1.02  # share of the measured bandwidth above which a time is not believed
RESOLUTION_US = 0.1  # differences below this are the grain of launching graph nodes, not of the kernel
LABEL = 400  # characters of a row's name that are printed
HOST_TIMERS = ("event", "wall")  # whose times include the host's
# What must be equal for two runs to be compared: a field of the env row and what to call it.
SAME_ON_BOTH = {
    "device": "device",
    "gpu": "GPU",
    "driver": "driver",
    "cuda": "CUDA",
    "torch": "torch",
    "triton": "triton",
    "nvcc": "nvcc",
    "power_limit_w": "power limit",
}


def verdict(a, b, min_effect=WITHIN_RUN):
    """faster | slower | same | ambiguous: what b is next to a, each with us, us_p10, us_p90 and n.

    A difference of medians above the smallest effect counts when the p10..p90 intervals are disjoint and is
    ambiguous when they overlap. Below it the two are the same, unless the medians are known too badly
    (standard error of a median, 1.2533 sigma / sqrt(n), with sigma = (p90 - p10) / 2.563 as for a normal
    distribution) to say so.
    """
    if None in (a.us_p10, a.us_p90, a.n, b.us_p10, b.us_p90, b.n) or min(a.n, b.n) < 3:
        return AMBIGUOUS
    smallest = max(min_effect * a.us, RESOLUTION_US)
    difference = b.us - a.us
    if abs(difference) > smallest:
        if b.us_p10 > a.us_p90 or b.us_p90 < a.us_p10:
            return SLOWER if difference > 0 else FASTER
        return AMBIGUOUS
    error = (
        1.2533
        / 2.563
        * math.hypot((a.us_p90 - a.us_p10) / math.sqrt(a.n), (b.us_p90 - b.us_p10) / math.sqrt(b.n))
    )
    return SAME if abs(difference) + 2 * error <= 2 * smallest else AMBIGUOUS


def above_ceiling(row):
    """Whether a row's bytes would have come faster than this card can read or write: then the time is not
    that of all the work, and no win rests on it."""
    if row.kind == "serving":  # it has no bytes
        return False
    return row.flag == "above the ceiling" or (
        getattr(row, "cache", None) != "warm" and (row.of_ceiling or 0) > MOST_OF_CEILING
    )


def without_win(said, a, b):
    """A verdict about b next to a, in which a row above the ceiling is not the faster one."""
    winner = {FASTER: b, SLOWER: a}.get(said)
    return AMBIGUOUS if winner is not None and above_ceiling(winner) else said


@dataclass
class Pair:
    """One row of both runs. `change` is B's time over A's, minus one; None where a time is missing, or is a
    difference of times that is not above zero (schema.DIFFERENCES)."""

    a: object
    b: object
    verdict: str

    @property
    def change(self):
        return self.b.us / self.a.us - 1 if self.a.us and self.b.us and self.a.us > 0 else None


class OpenRun(NamedTuple):
    """One run of a records file. left_out: what is wrong with the lines of it that could not be read."""

    rows: list
    env: object
    notices: list
    left_out: list


def open_run(where, read=schema.read):
    """The OpenRun of "path" or "path@run"."""
    path, at, run = str(where).rpartition("@")
    if not at or os.path.exists(str(where)):
        path, run = str(where), ""
    found = read(path)
    if not found.rows:
        raise LabError(f"{found.path} holds no records" + "".join(f"; {line}" for line in found.notices[:1]))
    runs = found.runs()
    if run and run not in runs:
        raise LabError(
            f"{found.path} has no run {run!r}: it has {', '.join(shown(r, quotes=False) for r in runs)}"
        )
    # Without a name it is the last run: a line that was left out may have belonged to it, or to one after it.
    mine = {run or runs[-1], None}
    left_out = [
        f"{found.path}:{bad.line}: {bad.problem}"
        for bad in found.left_out
        if bad.run in mine or not run and bad.run not in runs
    ]
    rows = found.of_run(run or runs[-1])
    env = next((r for r in rows if r.kind == "env"), None)
    if env is None:
        raise LabError(
            f"{found.path}: run {shown(rows[0].run, quotes=False)} has no env row, so it cannot be compared"
            + (f" (left out: {left_out[0]})" if left_out else "")
        )
    return OpenRun(rows, env, found.notices, left_out)


def differences(a, b):
    """What keeps two env rows from being compared: [(name, A's value, B's value)]."""
    return [
        (name, getattr(a, f), getattr(b, f))
        for f, name in SAME_ON_BOTH.items()
        if getattr(a, f) != getattr(b, f)
    ]


def same_setting(a, b):
    """Whether the same card, software, tables of `lab tune` and commit made two runs, by their env rows."""
    return (a.commit, a.tuned) == (b.commit, b.tuned) and not differences(a, b)


def timed(rows):
    """{key: row} of what has a time to compare (or an error); the later of two equal keys counts."""
    wanted = {"op", "model", "serving", "ledger"}
    return {
        schema.key(r): r
        for r in rows
        if r.kind in wanted
        and not (r.kind == "ledger" and r.row in ("gap", "unexplained"))
        and (r.us is not None or r.error)
    }


def match(rows_a, rows_b, min_effect=BETWEEN_RUNS):
    """(pairs, rows only in A, rows only in B). A row that A measured and B could not is `failed`.

    Rows with the same median, spread and count are the same, however wide the spread: they are one
    measurement, read twice. The pairs are sorted by verdict, the largest change first, else in A's order.
    """
    a, b = timed(rows_a), timed(rows_b)
    pairs = []
    for k, row in a.items():
        other = b.get(k)
        if other is None or row.error:
            continue
        said = (
            FAILED
            if other.error
            else SAME
            if _statistics(row) == _statistics(other)
            else without_win(verdict(row, other, min_effect), row, other)
        )
        pairs.append(Pair(row, other, said))
    pairs.sort(key=lambda p: (VERDICTS.index(p.verdict), -abs(p.change or 0)))
    return pairs, [r for k, r in a.items() if k not in b], [r for k, r in b.items() if k not in a]


_statistics = operator.attrgetter("us", "us_p10", "us_p90", "n")


def repeat(pairs, env_a, env_b, min_effect, run):
    """The Repeat record of two runs of one commit on one card, to stand beside `run`; None where they are not
    that."""
    judged = [p for p in pairs if p.verdict != FAILED]
    if (
        not judged
        or not env_a.commit
        or env_a.run == env_b.run
        or differences(env_a, env_b)
        or (env_a.commit, env_a.tuned) != (env_b.commit, env_b.tuned)
    ):
        return None
    counts = Counter(p.verdict for p in judged)
    host = [p for p in judged if p.a.timer in HOST_TIMERS]
    return schema.Repeat(
        run,
        env_a.run,
        env_b.run,
        env_a.commit,
        len(judged),
        counts[FASTER],
        counts[SLOWER],
        counts[AMBIGUOUS],
        (counts[FASTER] + counts[SLOWER]) / len(judged),
        min_effect,
        len(host),
        sum(p.verdict in (FASTER, SLOWER) for p in host),
    )


def alarms(r):
    """What a Repeat record says, device times and host-inclusive times apart: the host has other work,
    too."""
    kinds = (
        ("device", r.faster + r.slower - r.host_called, r.rows - r.host_rows),
        ("host-inclusive", r.host_called, r.host_rows),
    )
    return (
        " and ".join(
            f"{called} of {rows} {kind} times ({called / rows:.1%})" for kind, called, rows in kinds if rows
        )
        + " were called faster or slower"
    )


def label(row):
    """One line that tells a row from the others; what would control a terminal is escaped."""
    if row.kind == "op":
        words = [
            row.op,
            row.role,
            row.backend,
            row.dtype,
            row.weight_format,
            f"b{row.batch}",
            row.context and f"ctx{row.context}",
            " ".join(f"{k}={v}" for k, v in row.shape.items()),
            row.cache,
            row.timer,
        ]
    else:
        several = getattr(row, "ranks", 1) > 1
        words = [
            row.model,
            several and f"on {row.ranks} GPUs",
            row.backend,
            row.plan,
            getattr(row, "mode", None),
            row.dtype,
            row.weight_format,
            row.kv_dtype and f"kv {row.kv_dtype}",
            f"b{row.batch}",
            f"queue, {row.lengths}" if row.kind == "serving" else f"ctx{row.context}",
            getattr(row, "row", None),
            getattr(row, "op", None),
            getattr(row, "kernel", None),
            " ".join(f"{k}={v}" for k, v in getattr(row, "overrides", {}).items()),
        ]
    return shown(" ".join(str(w) for w in words if w), LABEL, quotes=False)


def untuned(pair):
    """ " (untuned)", " (A untuned)", " (B untuned)" where an op row says that no launch settings were raced
    for it, else ""."""
    sides = [
        name
        for name, row in (("A", pair.a), ("B", pair.b))
        if row.kind == "op" and row.config.get("tuned") is False
    ]
    return f" ({' '.join([*sides, 'untuned'] if len(sides) == 1 else ['untuned'])})" if sides else ""


def parse_share(text):
    """ "5%" or "0.05" -> 0.05."""
    try:
        value = number(text[:-1]) / 100 if text.endswith("%") else number(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise LabError(f"{text!r} is not a share: write 5% or 0.05")
    return value


def add_arguments(parser):
    parser.add_argument(
        "a", metavar="A", help="the run before: a folder or records file, FILE@RUN for one run of it"
    )
    parser.add_argument("b", metavar="B", help="the run after")
    parser.add_argument(
        "--fail-on-slower",
        metavar="SHARE",
        default="5%",
        help="exit 1 when a row with verdict slower lost more than this (default 5%%)",
    )
    parser.add_argument(
        "--min-us",
        type=float,
        default=1.0,
        metavar="US",
        help="... and more than this many microseconds (default 1)",
    )
    parser.add_argument(
        "--min-effect",
        metavar="SHARE",
        default=f"{BETWEEN_RUNS:.0%}",
        help="the smallest change called faster or slower (default 3%%)",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="compare even though GPU or versions differ, and say so"
    )
    parser.add_argument("--all", action="store_true", help="list the rows that are the same, too")
    parser.add_argument("--json", metavar="FILE", help="also write the verdicts to FILE")
    parser.add_argument(
        "--record",
        metavar="DIR",
        help="two runs of one commit: add the rate of false alarms to the last run of DIR",
    )


def main(args):
    """Prints the comparison and returns the exit status. Raises LabError (status 2) where none is
    possible."""
    threshold, min_effect = parse_share(args.fail_on_slower), parse_share(args.min_effect)
    read = functools.cache(schema.read)  # often two runs of one file
    a, b = open_run(args.a, read), open_run(args.b, read)
    env_a, env_b = a.env, b.env
    for line in dict.fromkeys(a.notices + b.notices):
        print(line, file=sys.stderr)
    differ = differences(env_a, env_b)
    if differ:
        text = " / ".join(name for name, _, _ in differ) + (" differs" if len(differ) == 1 else " differ")
        text += (
            " ("
            + "; ".join(
                f"{name}: {shown(one, quotes=False)} and {shown(other, quotes=False)}"
                for name, one, other in differ
            )
            + ")"
        )
        if not args.anyway:
            raise LabError(f"not comparable: {text}; --anyway compares all the same")
        print(f"warning: {text}: differences may come from there", file=sys.stderr)
    if env_a.tuned and env_b.tuned and env_a.tuned != env_b.tuned:
        print(
            f"the tables of lab tune differ: {shown(env_a.tuned, 200)} and {shown(env_b.tuned, 200)}",
            file=sys.stderr,
        )
    with schema.no_collection():
        pairs, only_a, only_b = match(a.rows, b.rows, min_effect)
    left_out = list(dict.fromkeys(a.left_out + b.left_out))
    if not pairs:
        raise LabError(
            f"not comparable: no row of {args.a} and {args.b} measures the same thing"
            + (f" (left out: {left_out[0]})" if left_out else "")
        )
    failing = [
        p
        for p in pairs
        if p.verdict == FAILED
        or p.verdict == SLOWER
        and (p.change is None or p.change > threshold)
        and p.b.us - p.a.us > args.min_us
    ]
    print(text_of(pairs, only_a, only_b, env_a, env_b, args.all))
    if args.json:
        write_json(args.json, pairs, env_a, env_b)
    again = repeat(pairs, env_a, env_b, min_effect, env_b.run)
    if again:
        print(f"one commit on one card, so these are false alarms: {alarms(again)}")
    if args.record:
        record(args.record, again)
    if failing:
        print(
            f"slower: {len(failing)} of {len(pairs)} rows by more than {threshold:.0%} and {args.min_us:g} us"
        )
    if left_out and not failing and not args.anyway:
        raise LabError(
            f"not comparable in full: {len(left_out)} line{'s' * (len(left_out) > 1)} of these runs hold no "
            f"usable value, as {left_out[0]}; --anyway compares the others"
        )
    return 1 if failing else 0


def record(where, again):
    """Adds a Repeat record to the last run of a records file. Raises LabError where the two runs are no
    repeat."""
    if again is None:
        raise LabError(
            "--record: A and B are not two runs of one commit on one card, so verdicts are no false alarms"
        )
    found = schema.read(where)
    if not found.rows:
        raise LabError(f"{found.path} holds no records")
    again.run = found.runs()[-1]
    with schema.Writer(where) as writer:
        writer.append(again)


def text_of(pairs, only_a, only_b, env_a, env_b, everything=False):
    counts = Counter(p.verdict for p in pairs)
    (run_a, run_b), card = (
        [shown(f"{e.run} commit {e.commit}", LABEL, quotes=False) for e in (env_a, env_b)],
        shown(env_a.gpu or env_a.device, LABEL, quotes=False),
    )
    lines = [f"A {run_a}   B {run_b}   {card}"]
    listed = [p for p in pairs if everything or p.verdict != SAME]
    cells = [("A us", "B us", "change", "verdict", "row")] if listed else []
    for p in listed:
        us_b = "-" if p.b.us is None else f"{p.b.us:.2f}"
        change = "-" if p.change is None else f"{p.change:+.1%}"
        emulated = " (emulated)" if getattr(p.a, "emulated", False) else ""
        cells.append((f"{p.a.us:.2f}", us_b, change, p.verdict, label(p.a) + emulated + untuned(p)))
    lines += columns(cells, right=(0, 1, 2))
    lines.append(
        f"{len(pairs)} rows: "
        + ", ".join(f"{counts[v]} {v} ({counts[v] / len(pairs):.1%})" for v in VERDICTS if counts[v])
    )
    if only_a or only_b:
        lines.append(f"not matched: {len(only_a)} rows only in A, {len(only_b)} only in B")
    return "\n".join(lines)


def write_json(path, pairs, env_a, env_b):
    body = {
        "a": env_a.run,
        "b": env_b.run,
        "rows": [
            {"row": label(p.a), "a_us": p.a.us, "b_us": p.b.us, "change": p.change, "verdict": p.verdict}
            for p in pairs
        ],
    }
    write_whole(path, json.dumps(body, indent=1) + "\n")
