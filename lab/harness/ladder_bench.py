"""`lab bench ops --ladder`: every rung of the ladders at one size, cold, in one interleaved measurement per
op.

Only the first dtype is measured. A record carries the rung's number, and in `config` its name, its idea and
the gain it promises over the rung before; `note` says what may keep it from that. So a report needs the
records alone.
"""

import functools
import math

import torch

from lab import ladder, rungs
from lab.contract import DTYPES, Rand
from lab.errors import LabError, error_text
from lab.harness import timing
from lab.harness.ops_bench import FREE_SHARE, alive
from lab.harness.shapes import Point, arguments
from lab.ops import find
from lab.ops.kv_append import PAGE_SIZE
from lab.records.schema import OpRow

HEADS = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": PAGE_SIZE}
POINTS = {  # a batch of 64 hidden states, and layers of Llama-3.1-8B
    "cuda": (
        Point("linear", None, 1, None, {"n": 4096, "k": 14336}),
        Point("rmsnorm", None, 64, None, {"cols": 8192}),
        Point("decode_attention", None, 8, 4096, HEADS),
    ),
    "cpu": (
        Point("linear", None, 1, None, {"n": 64, "k": 512}),
        Point("rmsnorm", None, 4, None, {"cols": 512}),
        Point("decode_attention", None, 2, 64, HEADS | {"q_heads": 4, "kv_heads": 2, "head_dim": 64}),
    ),
}
SECONDS = 2.0  # of sampling all rungs of an op together
LEAST, MOST = 10, 60  # samples of each


def points(device, ops):
    for op in ops:
        rungs.rungs(op)  # an op without a ladder is an error
    return [p for p in POINTS[device] if not ops or p.op in ops]


def measure(session, rig, point, dtype_name):
    """Measures all rungs of one op that the session lacks; those that fail are recorded with `error`."""
    op, (cache, timer) = find(point.op), ("cold", "graph") if rig.device == "cuda" else ("warm", "wall")
    args, config = arguments(op, point, Rand(rig.device, DTYPES[dtype_name]), rig.multiprocessors)
    a = op.bound(*args)
    nbytes, rows = int(op.nbytes(a)), {}
    for rung in rungs.rungs(op.name):
        for backend in rig.backends:
            if backend not in rungs.BACKENDS or backend in rung.absent or not rungs.fits(rung, args):
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
                bytes=nbytes,
                flops=int(op.flops(a)),
                note=rung.otherwise or None,
                emulated=timer == "wall",
                config={
                    "rung": rung.number,
                    "name": rung.name,
                    "idea": rung.idea,
                    "promised": rung.factor,
                    **config,
                },
            )
            if not session.has(row):
                rows[rung, backend] = row
    if not rows:
        return
    sets, flush = [args], None
    if rig.device == "cuda":
        torch.cuda.empty_cache()
        size = sum(
            {t.untyped_storage().data_ptr(): t.nbytes for t in args if isinstance(t, torch.Tensor)}.values()
        )
        count, _, flushed = timing.plan_sets(
            nbytes, rig.l2_bytes, size, FREE_SHARE * torch.cuda.mem_get_info()[0]
        )
        sets += [timing.clone_args(args) for _ in range(count - 1)]
        flush = rig.flush if flushed else None
    outs = [op.outputs(*a) for a in sets]
    timed = {}
    for (rung, backend), row in rows.items():
        try:
            function = ladder.bind(rung, backend, rig.device)
            calls = [functools.partial(function, *a, out=o) for a, o in zip(sets, outs)]
            timed[rung, backend] = timing.WallTimed(calls[0]) if timer == "wall" else _graph(calls, flush)
        except LabError as e:
            row.error = error_text(e)
        except Exception as e:  # one rung that cannot run must not cost the others
            row.error = error_text(e)
            if rig.device == "cuda":
                alive(op.name)
    least, most = (2, 4) if timer == "wall" else (LEAST, MOST)
    stats = timing.measure(timed, SECONDS, least, most) if timed else {}
    for key, s in stats.items():
        shares = rig.ceilings.fields(op.direction, rows[key].bytes, s.us, cache, rig.l2_bytes)
        for name, value in {**s.fields(), **shares}.items():
            setattr(rows[key], name, value)
    for t in timed.values():
        t.close()
    session.add(*rows.values())
    if rig.device == "cuda":
        alive(op.name)


def _graph(calls, flush):
    """A graph that lasts GRAPH_US and takes every buffer set equally often; a slow rung's holds each once."""
    eager = timing.EagerTimed(calls[:1])  # the first call compiles
    us = min(eager.read(_synced(eager.sample())) for _ in range(2))
    rounds = 1 if flush else math.ceil(timing.GRAPH_US / (max(us, timing.LAUNCH_US) * len(calls)))
    return timing.GraphTimed(calls * rounds, flush)


def _synced(sample):
    torch.cuda.synchronize()
    return sample
