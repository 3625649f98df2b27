"""`lab bench ops --ladder`: every rung of the ladders at one size, cold, in one interleaved measurement per
ladder.

A rung that matters at another size (Rung.at) is measured there, too, beside the rung that it changes: that
is where its gain is judged. Only the first dtype is measured. A record carries the rung's number, and in
`config` its name, its idea, the number of the rung that it changes and the gain that it promises over it;
`judged` says whether this is the size for that gain, `partial` that only some rungs are measured at it.
`note` says what may keep it from that gain. So a report needs the records alone.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from lab import ladder, rungs
from lab.contract import DTYPES, Rand
from lab.errors import LabError, error_text
from lab.harness import timing
from lab.harness.ops_bench import FREE_SHARE, alive
from lab.harness.shapes import Point, arguments
from lab.ops import find
from lab.records.schema import OpRow

SECONDS = 1.2  # of sampling all rungs of a ladder together
FEW_SECONDS = 0.3  # of a few rungs at a size of their own
LEAST, MOST = 10, 60  # samples of each


class Climb(NamedTuple):
    """A point of a ladder: all rungs, or those whose gain is judged at it and the rungs that these change."""

    point: Point
    judged: tuple[int, ...] = ()  # numbers of rungs; none: the whole ladder


def points(device, names, every_batch):
    """[Climb] where these ladders are measured; all ladders where there are none. every_batch: on a GPU also
    at Ladder.batches. Raises LabError for a name without a ladder."""
    for name in names:
        rungs.ladder_of(name)
    found = []
    for one in (one for name, one in rungs.LADDERS.items() if not names or name in names):
        point = Point(one.op, None, **one.points[device], format=one.format)
        batches = one.batches if device == "cuda" and every_batch else ()
        found += [Climb(point), *(Climb(replace(point, batch=batch)) for batch in batches)]
        elsewhere = {}  # Point.identity -> Climb
        for rung in (rung for rung in one.rungs if rung.at and device == "cuda"):
            there = replace(point, **rung.at)
            judged = elsewhere[there.identity].judged if there.identity in elsewhere else ()
            elsewhere[there.identity] = Climb(there, (*judged, rung.number))
        found += elsewhere.values()
    return found


def rows_of(session, rig, climb, dtype_name, args, launch_config):
    """{(rung, backend): row} of what is to be measured at a point: what the session lacks of the rungs that
    take these arguments."""
    point = climb.point
    op, rows = find(point.op), {}
    a = op.bound(*args)
    cache, timer = ("cold", "graph") if rig.device == "cuda" else ("warm", "wall")
    every = rungs.rungs(rungs.name_of(op.name, point.format))
    wanted = {n for rung in every if rung.number in climb.judged for n in (rung.number, rung.changes)}
    for rung in every:
        if climb.judged and rung.number not in wanted:
            continue
        here = rung.number in climb.judged if climb.judged else not rung.at or rig.device != "cuda"
        for backend in having(rig.backends, every, climb):
            if backend not in rungs.BACKENDS or backend in rung.absent or not rung.takes(a):
                continue
            row = OpRow(
                session.run,
                op.name,
                backend,
                dtype_name,
                point.batch,
                point.shape,
                point.context,
                cache,
                timer,
                rung=rung.number,
                weight_format=point.format,
                bytes=int(op.nbytes(a)),
                flops=int(op.flops(a)),
                note=rung.otherwise or None,
                emulated=timer == "wall",
                config={
                    "rung": rung.number,
                    "name": rung.name,
                    "idea": rung.idea,
                    "promised": rung.promised(point.batch),
                    "over": rung.changes,
                    "judged": here,
                    **({"partial": True} if climb.judged else {}),
                    **launch_config,
                },
            )
            if not session.has(row):
                rows[rung, backend] = row
    return rows


def having(backends, every, climb):
    """The backends that have a rung to be judged."""
    judged = [rung for rung in every if not climb.judged or rung.number in climb.judged]
    return [name for name in backends if any(name not in rung.absent for rung in judged)]


def measure(session, rig, climb, dtype_name):
    """Measures the rungs of a Climb that the session lacks; those that fail are recorded with `error`."""
    point = climb.point
    op = find(point.op)
    args, config = arguments(op, point, Rand(rig.device, DTYPES[dtype_name]), rig.multiprocessors)
    rows = rows_of(session, rig, climb, dtype_name, args, config)
    if not rows:
        return
    a_row = next(iter(rows.values()))
    nbytes, cache, timer = a_row.bytes, a_row.cache, a_row.timer
    sets, flush = [args], None
    if rig.device == "cuda":
        torch.cuda.empty_cache()
        count, _, flushed = timing.plan_sets(
            nbytes, rig.l2_bytes, timing.bytes_of_args(args), FREE_SHARE * torch.cuda.mem_get_info()[0]
        )
        sets += [timing.clone_args(args) for _ in range(count - 1)]
        flush = rig.flush if flushed else None
    outs = [op.outputs(*a) for a in sets]
    timed = {}
    for (rung, backend), row in rows.items():
        try:
            function = ladder.bind(rung, backend, rig.device)
            calls = [function.ready(*a, out=o) for a, o in zip(sets, outs)]
            timed[rung, backend] = timing.WallTimed(calls[0]) if timer == "wall" else _graph(calls, flush)
        except LabError as e:
            row.error = error_text(e)
        except Exception as e:  # one rung that cannot run must not cost the others
            row.error = error_text(e)
            if rig.device == "cuda":
                alive(op.name)
    least, most = (2, 4) if timer == "wall" else (LEAST, MOST)
    stats = timing.measure(timed, seconds_of(climb), least, most) if timed else {}
    for key, s in stats.items():
        shares = rig.ceilings.fields(op.direction, rows[key].bytes, s.us, cache, rig.l2_bytes)
        for name, value in {**s.fields(), **shares}.items():
            setattr(rows[key], name, value)
    for t in timed.values():
        t.close()
    session.add(*rows.values())
    if rig.device == "cuda":
        alive(op.name)


def seconds_of(climb):
    """Of sampling all rungs of a Climb together."""
    return FEW_SECONDS if climb.judged else SECONDS


def _graph(calls, flush):
    """A graph that lasts GRAPH_US and takes every buffer set equally often; a slow rung's holds each once."""
    eager = timing.EagerTimed(calls[:1])  # the first call compiles
    us = min(eager.read(_synced(eager.sample())) for _ in range(2))
    rounds = 1 if flush else math.ceil(timing.GRAPH_US / (max(us, timing.LAUNCH_US) * len(calls)))
    return timing.GraphTimed(calls * rounds, flush)


def _synced(sample):
    torch.cuda.synchronize()
    return sample
