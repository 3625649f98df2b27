"""`lab ledger MODEL --inside`: what the blocks of the persistent step do while it runs.

A launch that records (lab/ops/step_layout.py) is timed as any other. Of several, the one of median time is
kept, so that the records and the time are of the same launch. A row `phase` is the mean of all blocks: how
long they were in the phase, of that how long they waited for other blocks and for tiles of weights or KV, and
the rest, which is called work. Two things are in no block's phases: `idle`, blocks that have not begun while
others have, or have ended while others have not; and `launch`, what launching a graph costs. With
`unexplained` all add up to the launch's time. With more than 3% unexplained the account does not stand for
the launch: the row says so, and the verb fails.

The kernel that records is slower than the one that does not; the row `total` has the times of both.

On a CPU the same records come with the host's clock, of an emulated kernel: nothing follows from them for a
GPU.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lab.errors import error_text
from lab.formats import kv
from lab.harness import ledger, model_bench, timing
from lab.harness.ops_bench import alive
from lab.model.decoder import Decoder
from lab.ops import OPS
from lab.ops.decode_step import apart_of
from lab.ops.step_layout import END, LM_HEAD, MATRICES, PHASES, START, TRACE_BLOCKS, trace_rows
from lab.records.schema import InsideRow

PLAN, BACKENDS = "persistent", ("cuda", "triton")
LAUNCHES = 21  # that record, on a GPU
DRAWN = 16  # blocks whose timeline is recorded
COMPILE_SECONDS = 1800.0  # nvcc takes one or two minutes on an idle machine
ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE, BUILT = ROOT / "cuda_src/traced/decode_step.cu", ROOT / "build/inside"


def measure(session, rig, weights, name, dtype_name, context, backend):
    """Records the inside of a model's persistent step in one language, once. weights: model_bench.Weights."""
    base = dict(
        run=session.run,
        model=name,
        backend=backend,
        plan=PLAN,
        dtype=dtype_name,
        batch=1,
        context=context,
        weight_format=weights.format_of(name),
        kv_dtype=rig.kv_dtype,
        timer="wall" if rig.device == "cpu" else "graph",
        emulated=rig.device == "cpu",
    )
    if any(all(getattr(r, f) == v for f, v in base.items()) for r in session.of_kind("inside")):
        return
    try:
        rows = measure_step(base, rig, weights.of(name), backend, context)
    except Exception as e:
        rows = [InsideRow(**base, row="total", error=error_text(e))]
    for order, row in enumerate(rows):
        row.order = order
    session.add(*rows)
    model_bench.release(rig.device)
    if rig.device == "cuda":
        alive(f"the inside of {name} under {backend}")


def measure_step(base, rig, weights, backend, context):
    ops = rig.backends[backend]
    recording = recording_step(ops, backend, rig.device)
    decoder = Decoder(weights, ops, 1, context + 1, plan=PLAN, kv_dtype=rig.kv_dtype)
    model_bench.fill(decoder, 1, context)
    b = decoder.buffers
    shape = TRACE_BLOCKS, trace_rows(len(b.step_model.layers)), 4
    trace = torch.zeros(shape, dtype=torch.int64, device=decoder.device)
    workspace = dataclasses.replace(b.step_workspace, trace=trace)
    given = b.ids, b.positions, b.step_model, b.cache.k, b.cache.v, b.block_table, b.logits
    scales = b.cache.k_scales, b.cache.v_scales
    record = functools.partial(recording, *given, workspace, *scales, out=b.ids)
    normal = functools.partial(ops.decode_step, *given, b.step_workspace, *scales, out=b.ids)
    if rig.device == "cpu":
        launch = on_cpu(decoder, record, trace)
    else:
        launch = on_gpu(decoder, normal, record, trace, rig.seconds)
    return account(
        base, launch, read(launch.trace, backend), nbytes_of(b.step_model, b.cache, context), rig.ceilings
    )


def recording_step(ops, backend, device):
    """decode_step as a function that takes a trace. For CUDA on a GPU that is another kernel, which is
    compiled first."""
    if (backend, device) != ("cuda", "cuda"):
        return ops.decode_step
    from lab.judge import kernel_file  # of a layer above: it builds an extension with one file replaced

    (op,) = (one for one in OPS if one.whole_step)
    built = kernel_file.build(SOURCE, op, device, BUILT, COMPILE_SECONDS)
    return kernel_file.function_of(SOURCE, op, device, str(built))


def on_cpu(decoder, record, trace):
    """One launch by the host's clock."""
    with torch.inference_mode():
        start = time.perf_counter()
        record()
        us = (time.perf_counter() - start) * 1e6
    return SimpleNamespace(us=us, launch_us=0.0, normal_us=None, n=1, trace=trace)


def on_gpu(decoder, normal, record, trace, seconds):
    """The launch of median time, of LAUNCHES that record. A whole token runs before each, so that L2 holds
    what it holds when tokens follow each other."""
    step = model_bench.timed_step(decoder, "graph")

    def before():
        torch.cuda._sleep(ledger.AHEAD)
        step.graph.replay()
        step.before()

    entries = {
        "normal": timing.GraphTimed([ledger.all_of([normal])], before),
        **ledger.null_graphs(decoder.device, before),
    }
    stats = timing.measure(entries, seconds * len(entries), 20, 100)
    recording = timing.GraphTimed([ledger.all_of([record])], before)
    launches = []
    for _ in range(LAUNCHES):
        sample = recording.sample()
        torch.cuda.synchronize()
        launches.append((recording.read(sample), trace.cpu()))
    us, found = sorted(launches, key=lambda one: one[0])[LAUNCHES // 2]
    for entry in (recording, *entries.values()):
        entry.close()
    return SimpleNamespace(
        us=us, launch_us=ledger.launch_cost(stats), normal_us=stats["normal"].us, n=LAUNCHES, trace=found
    )


def read(trace, backend):
    """A trace in microseconds from the first block's begin: begins, ends, others, tiles and ahead, [blocks,
    phases] each. Of Triton's kernel, which does not know when a load's data arrive, the last two are None."""
    live = trace.numpy()
    live = live[live[:, 0, 1] != 0]
    clock, at, last_clock, last = live[:, 0].T[:, :, None]
    rate = (last - at) / (last_clock - clock) / 1e3  # microseconds a cycle
    begin = (at - at.min()) / 1e3

    def time_of(clocks):
        return begin + (clocks - clock) * rate

    ends, second = time_of(live[:, 1:, 0]), live[:, 1:, 1]
    begins = np.concatenate([begin, ends[:, :-1]], axis=1)
    if backend == "triton":
        others, tiles, ahead = np.where(second != 0, time_of(second) - begins, 0.0), None, None
    else:
        others, tiles, ahead = second * rate, live[:, 1:, 2] * rate, live[:, 1:, 3].astype(float)
        ahead[ahead < 0] = np.nan
    return SimpleNamespace(
        begins=begins, ends=ends, others=others, tiles=tiles, ahead=ahead, blocks=len(live)
    )


def phases_of(layers):
    """The names of a trace's rows after row 0."""
    return [START, *itertools.chain(*[PHASES] * layers), LM_HEAD, END]


def nbytes_of(m, cache, context):
    """{phase: bytes that it must read}, of a StepModel: matrices, and the context's K and V."""
    matrices = {
        phase: sum(w.nbytes for layer in m.layers for w in apart_of(getattr(layer, part)))
        for phase, part in zip((p for p in PHASES if p != "attention"), MATRICES, strict=True)
    }
    head = m.head_dim * cache.k.itemsize + kv.scale_bytes(cache.k.dtype)
    tokens = 2 * len(m.layers) * context * m.kv_heads * head
    return {**matrices, "attention": tokens, LM_HEAD: m.lm_head.nbytes}


def account(base, launch, found, nbytes, ceilings):
    """The rows of one launch. launch: us, launch_us, normal_us, n; found: what read() returns."""
    base = dict(base, n=launch.n, blocks=found.blocks)
    layers = (found.ends.shape[1] - 3) // len(PHASES)
    names, total = np.array(phases_of(layers)), launch.us
    spent = found.ends - found.begins
    rows = []

    def mean(times, at):
        return None if times is None else float(times[:, at].sum(axis=1).mean())

    for phase in dict.fromkeys(names.tolist()):
        at = names == phase
        us, others, tiles = (mean(times, at) for times in (spent, found.others, found.tiles))
        given = ceilings.fields("read", nbytes.get(phase), us)
        counted = found.ahead is not None and not np.isnan(found.ahead[:, at]).all()
        rows.append(
            InsideRow(
                **base,
                row="phase",
                phase=phase,
                calls=int(at.sum()),
                us=us,
                others_us=others,
                tiles_us=tiles,
                work_us=max(0.0, us - others - (tiles or 0.0)),
                ahead=float(np.nanmean(found.ahead[:, at])) if counted else None,
                bytes=nbytes.get(phase),
                gbps=given.get("gbps"),
                of_ceiling=given.get("of_ceiling"),
                of_token=us / total,
            )
        )
    whole = found.ends[:, -1].max()
    idle = float(whole - (found.ends[:, -1] - found.begins[:, 0]).mean())
    unexplained = total - float(whole) - launch.launch_us
    flag = (
        "above 3% of the launch"
        if abs(unexplained) > ledger.TOLERANCE * total and not base["emulated"]
        else None
    )
    for row, us, said in (
        ("idle", idle, None),
        ("launch", launch.launch_us, None),
        ("unexplained", unexplained, flag),
    ):
        rows.append(InsideRow(**base, row=row, us=us, of_token=us / total, flag=said))
    read_bytes = sum(nbytes.values())
    given = ceilings.fields("read", read_bytes, total)
    rows.append(
        InsideRow(
            **base,
            row="total",
            us=total,
            normal_us=launch.normal_us,
            bytes=read_bytes,
            gbps=given.get("gbps"),
            of_ceiling=given.get("of_ceiling"),
            of_token=1.0,
        )
    )
    return rows + timelines(base, found)


def timelines(base, found):
    """A row for each of up to DRAWN blocks, evenly spaced."""
    tiles = np.zeros_like(found.others) if found.tiles is None else found.tiles
    stamps = (1e3 * np.stack([found.ends, found.others, tiles], axis=2)).round().astype(int).clip(0)
    chosen = np.linspace(0, found.blocks - 1, min(DRAWN, found.blocks)).round().astype(int)
    return [InsideRow(**base, row="block", block=int(i), stamps=stamps[i].ravel().tolist()) for i in chosen]
