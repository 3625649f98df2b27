"""`lab ledger --inside`: what decode_step records about its blocks, and the account that is made of it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import lab
from tiny_models import LLAMA

from lab.check import Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.harness import inside
from lab.harness.ceiling import Ceilings
from lab.harness.inside_text import inside_text
from lab.model.sources.random import RandomSource
from lab.model.weights import load
from lab.ops import find
from lab.ops.step_layout import PHASES, TRACE_BLOCKS, trace_rows
from lab.records import schema
from lab.records.timeline import middle_layer, segments
from lab.report import figures, inside_figures
from lab.report import load as report_load

BOTH = pytest.mark.parametrize("backend", inside.BACKENDS)
LAYERS, CONTEXT = LLAMA.layers, 40
NAMES = ["start", *PHASES, "lm_head", "end"]
BASE = dict(
    run="r",
    model="tiny",
    plan="persistent",
    dtype="bf16",
    batch=1,
    context=CONTEXT,
    weight_format=None,
    kv_dtype=None,
    timer="wall",
    emulated=True,
)


@pytest.fixture(scope="module")
def weights():
    return load(RandomSource(LLAMA, seed=1), torch.bfloat16, "cpu")


@pytest.fixture(scope="module")
def measured(weights):
    """{backend: rows of a launch on the CPU}; the second, because the interpreter prepares the kernel at its
    first."""
    found = {}
    for backend in inside.BACKENDS:
        rig = SimpleNamespace(
            device="cpu", kv_dtype=None, backends={backend: select(backend, "cpu")}, ceilings=Ceilings()
        )
        for _ in range(2):
            rows = inside.measure_step(dict(BASE, backend=backend), rig, weights, backend, CONTEXT)
        for order, row in enumerate(rows):
            row.order = order
        found[backend] = rows
    return found


def of(rows, row):
    return [r for r in rows if r.row == row]


@BOTH
def test_the_rows_add_up_to_the_launch(measured, backend):
    rows = measured[backend]
    (total,), phases = of(rows, "total"), of(rows, "phase")
    assert [r.phase for r in phases] == NAMES
    assert [r.calls for r in phases] == [1, *[LAYERS] * len(PHASES), 1, 1]
    spent = sum(r.us for r in rows if r.row in ("phase", "idle", "launch", "unexplained"))
    assert spent == pytest.approx(total.us, rel=1e-9)
    (unexplained,) = of(rows, "unexplained")
    # What is unexplained is the call from Python; on a busy machine another process may run meanwhile.
    assert 0 < unexplained.us < 0.5 * total.us
    for r in phases:
        assert r.us > 0 and r.others_us >= 0
        assert r.others_us + (r.tiles_us or 0) + r.work_us == pytest.approx(r.us)
    waiting = sum(r.others_us for r in phases)
    assert 0 < waiting < total.us


@BOTH
def test_each_block_has_a_timeline_of_all_phases(measured, backend):
    rows = measured[backend]
    blocks = of(rows, "block")
    assert len(blocks) == blocks[0].blocks == {"cuda": 4, "triton": 2}[backend]
    timelines = {r.block: segments(r.stamps) for r in blocks}
    for mine in timelines.values():
        assert len(mine) == trace_rows(LAYERS) - 1
        assert all(one.begin <= one.end for one in mine)
        assert all(one.others + one.tiles <= one.end - one.begin + 0.003 for one in mine)  # rounded to ns
    layer, layers, spans = middle_layer(timelines, len(PHASES))
    assert (layer, layers) == (LAYERS // 2, LAYERS) and all(
        len(mine) == len(PHASES) for mine in spans.values()
    )


def test_only_cuda_counts_tiles(measured):
    for backend, counted in (("cuda", True), ("triton", False)):
        for r in of(measured[backend], "phase"):
            if r.phase in PHASES and r.phase != "attention":
                assert (r.ahead is not None and r.ahead >= 1 and r.tiles_us >= 0) == counted


def step(trace):
    """The arguments of a step with this trace."""
    args = find("decode_step").inputs(
        Rand("cpu", torch.bfloat16),
        layers=1,
        hidden=72,
        intermediate=64,
        vocab=83,
        q_heads=2,
        kv_heads=1,
        head_dim=64,
        position=20,
    )
    return *args[:-1], dataclasses.replace(args[-1], trace=trace)


@BOTH
def test_a_step_that_records_computes_the_same(backend):
    trace = torch.zeros(TRACE_BLOCKS, trace_rows(1), 4, dtype=torch.int64)
    plain, recorded = step(None), step(trace)
    run = select(backend, "cpu").decode_step
    assert run(*plain).equal(run(*recorded))
    assert plain[6].equal(recorded[6])  # logits
    live = trace[trace[:, 0, 1] != 0]
    assert len(live) and (live[:, 1:, 0].diff(dim=1) >= 0).all()


def test_traces_that_are_refused():
    with pytest.raises(LabError, match=r"the trace must be int64 \[1024, 9, 4\]"):
        select("cuda", "cpu").decode_step(
            *step(torch.zeros(TRACE_BLOCKS, trace_rows(2), 4, dtype=torch.int64))
        )
    with pytest.raises(LabError, match="torch runs decode_step op by op"):
        trace = torch.zeros(TRACE_BLOCKS, trace_rows(1), 4, dtype=torch.int64)
        select("torch", "cpu").decode_step(*step(trace))


def made_trace(backend):
    """Two blocks of a model without layers, whose clocks differ in offset and in rate: block 0 begins at 0 us
    with 2 cycles a ns, block 1 at 1 us with 1. Each phase takes 10 us, lm_head with 4 us of waiting."""
    trace = torch.zeros(TRACE_BLOCKS, trace_rows(0), 4, dtype=torch.int64)
    for block, (offset, rate, begin) in enumerate(((7_000_000, 2, 0), (900, 1, 1000))):
        ends = [offset + rate * 1000 * us for us in (10, 20, 30)]
        trace[block, 0] = torch.tensor([offset, 5_000_000 + begin, ends[-1], 5_000_000 + begin + 30_000])
        trace[block, 1:, 0] = torch.tensor(ends)
        trace[block, 1:, 3] = -1
        waited = rate * 4000
        trace[block, 2, 1] = waited if backend == "cuda" else ends[0] + waited
        trace[block, 2, 2:] = torch.tensor([rate * 500, 3]) if backend == "cuda" else 0
    return trace


@BOTH
def test_clocks_become_one_time(backend):
    found = inside.read(made_trace(backend), backend)
    assert found.blocks == 2
    np.testing.assert_allclose(found.begins, [[0, 10, 20], [1, 11, 21]], atol=1e-9)
    np.testing.assert_allclose(found.ends, [[10, 20, 30], [11, 21, 31]], atol=1e-9)
    np.testing.assert_allclose(found.others, [[0, 4, 0]] * 2, atol=1e-9)
    if backend == "cuda":
        np.testing.assert_allclose(found.tiles, [[0, 0.5, 0]] * 2, atol=1e-9)
        np.testing.assert_array_equal(found.ahead, [[np.nan, 3, np.nan]] * 2)


@pytest.mark.parametrize("us, flag", [(32.5, None), (33.5, "above 3% of the launch")])
def test_an_account_that_does_not_add_up_says_so(us, flag):
    launch = SimpleNamespace(us=us, launch_us=1.0, normal_us=30.0, n=21)
    base = dict(BASE, backend="cuda", timer="graph", emulated=False)
    found = inside.read(made_trace("cuda"), "cuda")
    rows = inside.account(base, launch, found, {"lm_head": 30_000}, Ceilings({"read": [(1 << 20, 6.0)]}))
    by_row = {r.phase or r.row: r for r in rows}
    assert by_row["idle"].us == pytest.approx(1.0)  # each of the two blocks is not there for 1 us
    assert by_row["unexplained"].us == pytest.approx(us - 32) and by_row["unexplained"].flag == flag
    head = by_row["lm_head"]
    assert (head.us, head.others_us, head.tiles_us, head.work_us) == pytest.approx((10, 4, 0.5, 5.5))
    assert (head.gbps, head.of_ceiling, head.ahead) == pytest.approx((3.0, 0.5, 3.0))


@BOTH
def test_what_is_shown(measured, backend, tmp_path):
    rows = measured[backend]
    path = tmp_path / "records.jsonl"
    env = schema.Env("r", "before", "cpu", cpu="a CPU")
    path.write_text("".join(map(schema.to_line, [env, *rows])))
    again = schema.read(path)
    assert not again.notices
    text = inside_text([r for r in again.rows if r.kind == "inside"])
    assert all(f"  {name} " in text for name in [*NAMES, "total"])
    assert f"layer 1 of {LAYERS}" in text and "#" in text
    (run,) = report_load.load(tmp_path)
    (picture,) = inside_figures.of_model(run, "tiny")
    assert "EMULATED on a CPU" in picture.conditions and "bf16" in picture.conditions
    assert "in model cache" in picture.conditions
    assert list(picture.table["phase"][: len(NAMES)]) == NAMES
    if backend == "cuda":  # drawing takes longest
        said = {e.text for e in figures.drawn(picture, run.emulated).iter() if e.text}
        assert {*inside_figures.PARTS, *NAMES} <= said


@pytest.mark.parametrize(
    "options, said",
    [
        ("--plan fused", "--inside is of the persistent plan's one kernel: leave out --plan fused"),
        ("--backend torch", "--inside: torch has no kernel of a whole step; use --backend cuda,triton"),
        ("--batch 4", "one sequence: leave out --batch"),
        ("--swap", "--inside and --swap are two measurements"),
    ],
)
def test_what_it_refuses(options, said, tmp_path):
    done = lab("ledger", "smollm2-135m", "--inside", *options.split(), "--out", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
