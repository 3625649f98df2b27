"""The harness: statistics, buffers, ceilings, shapes, resume, errors, the ledger's account; on a GPU, known
answers."""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lab import options
from lab.contract import BACKENDS, Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.harness import (
    bench,
    ceiling,
    crossover,
    ledger,
    ledger_verb,
    model_bench,
    ops_bench,
    request,
    shapes,
    timing,
)
from lab.harness.ceiling import Ceilings
from lab.model.families import PRESETS
from lab.model.plans import PLANS
from lab.model.sources.random import RandomSource
from lab.model.weights import load
from lab.ops import OPS, find
from lab.records import card, schema
from lab.records.schema import Ceiling, LedgerRow, OpRow
from lab.records.session import Session

MIB = 1 << 20
COLD = {op.name for op in OPS if op.cold}
TINY = dataclasses.replace(
    PRESETS["smollm2-135m"],
    name="tiny",
    layers=2,
    hidden=64,
    intermediate=96,
    q_heads=2,
    kv_heads=1,
    vocab=257,
    max_positions=128,
)
TINY_QK = dataclasses.replace(TINY, name="tiny-qk", architecture="qwen3", qk_norm=True)
gpu = pytest.mark.gpu
# A whole step is measured as a token, and what ranks pass to each other by `lab bench exchange`.
MEASURED = {op.name for op in OPS if not op.whole_step and "exchange" not in op.names}


@pytest.fixture
def tiny(monkeypatch):
    """A preset small enough to bench on a CPU in milliseconds."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(card, "commit", lambda: "c0ffee")  # the tree may be edited while the tests run
    return TINY


def options_of_bench(argv):
    parser = argparse.ArgumentParser()
    options.bench(parser)
    return parser.parse_args([str(a) for a in argv])


def run_bench(*argv):
    return bench.main(options_of_bench(argv))


def settings_of(*argv):
    return request.settings_of(bench.request_of(options_of_bench(argv)))


# Statistics and sampling


def test_percentiles_are_numpys():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 57):
        s = rng.random(n).tolist()
        got = timing.summarize(s)
        want = np.percentile(s, [50, 10, 90, 99])
        assert np.allclose([got.us, got.us_p10, got.us_p90, got.us_p99], want) and got.n == n


class Fake:
    """Something to sample that notes when it was sampled."""

    host = True

    def __init__(self, name, log, us, timer="wall"):
        self.name, self.log, self.us, self.timer, self.first_us = name, log, itertools.cycle(us), timer, 1.0

    def sample(self):
        self.log.append(self.name)
        return next(self.us)

    def read(self, sample):
        return sample


def test_samples_are_interleaved_abba():
    log = []
    got = timing.measure({"a": Fake("a", log, [1.0]), "b": Fake("b", log, [2.0])}, 0.0, least=3, most=3)
    # The host's entries sit the first round out: it is there for graphs, whose first replay finds an empty
    # queue.
    assert "".join(log) == "baabba"
    assert got["a"].us == 1.0 and got["b"].us == 2.0 and got["a"].n == got["b"].n == 3


def test_sampling_stops_by_time_between_its_bounds():
    slow = timing.WallTimed(lambda: time.sleep(0.01))
    start = time.perf_counter()
    got = timing.measure({"slow": slow}, 0.1, least=2, most=1000)["slow"]
    assert 5 <= got.n <= 10 and time.perf_counter() - start < 1.0
    assert 10_000 <= got.us < 20_000


# Buffers


def test_clones_are_distinct_memory_with_the_same_views():
    rand = Rand("cpu", torch.float32)
    q, k, positions, _ = find("rope").inputs(rand, batch=3, q_heads=4, kv_heads=2, head_dim=64)
    q2, k2, positions2, _ = timing.clone_args((q, k, positions, 1.5))
    assert q2.stride() == q.stride() and all(map(torch.equal, (q2, k2, positions2), (q, k, positions)))
    assert (
        q2.untyped_storage().data_ptr() == k2.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    )
    q2.zero_()
    assert q.abs().sum() > 0 and torch.equal(k2, k)


@pytest.mark.parametrize("nbytes", [12 << 10, MIB, 7 * MIB, 50 * MIB, 300 * MIB, 2 << 30])
def test_cold_sets_rotate_through_five_times_l2_or_are_flushed(nbytes):
    l2 = 50 * MIB
    sets, calls, flush = timing.plan_sets(nbytes, l2)
    assert sets >= 2 and calls % sets == 0
    assert flush or sets * nbytes >= 5 * l2
    assert not flush or calls == sets  # between two flushes a set is used once
    assert calls <= 1000


def test_cold_sets_respect_the_memory():
    assert timing.plan_sets(MIB, 50 * MIB, 10 * MIB, 100 * MIB) == (10, 10, True)


@pytest.mark.parametrize("nbytes", [12 << 10, MIB, 7 * MIB, 50 * MIB, 300 * MIB])
def test_in_a_race_a_replay_uses_each_set_once(nbytes):
    l2, free = 50 * MIB, 20 << 30
    sets, calls, flush = timing.plan_sets(nbytes, l2, nbytes, free, once=True)
    assert flush and calls == sets >= timing.plan_sets(nbytes, l2, nbytes, free)[0]
    us = sets * max(nbytes / timing.ASSUMED_GBPS / 1e3, timing.LAUNCH_US)
    assert us >= timing.GRAPH_US or sets in (timing.MAX_SETS, free // nbytes)
    assert timing.plan_sets(nbytes, l2, nbytes, 3 * nbytes, once=True) == (3, 3, True)


# Ceilings


def curve(direction="read", t0_ns=2000.0, gbps=3000.0):
    """Rows of a card whose streams take a fixed time plus bytes over bandwidth."""
    return [
        Ceiling(
            "r", direction, "cuda", size, us=(t0_ns + size / gbps) / 1e3, gbps=size / (t0_ns + size / gbps)
        )
        for size in ceiling.SIZES
    ]


def test_ceiling_is_the_best_and_short_streams_are_held_to_what_they_can_reach():
    slow = [dataclasses.replace(r, backend="triton", gbps=r.gbps * 0.9) for r in curve()]
    c = Ceilings.of(curve() + slow)
    assert c.best("read") == pytest.approx(3000, rel=0.01) and c.best("copy") is None
    for nbytes in (100_000, 3 * MIB, 100 * MIB, 2 << 30):
        assert c.at("read", nbytes) == pytest.approx(nbytes / (2000 + nbytes / 3000), rel=1e-3)
    assert c.at("read", 16 << 30) == c.curves["read"][-1][1]


def test_shares_and_flags():
    c = Ceilings.of(curve())
    half = c.fields("read", 300 * MIB, 300 * MIB / 1500 / 1e3)
    assert half["gbps"] == pytest.approx(1500) and half["of_ceiling"] == pytest.approx(0.5, rel=0.01)
    assert not half["flag"] and half["of_stream"] > half["of_ceiling"]
    assert c.fields("read", 300 * MIB, 300 * MIB / 3300 / 1e3)["flag"] == "above the ceiling"
    assert c.fields("read", MIB, 0.1, "warm", 50 * MIB)["flag"] == "fits in L2"
    assert Ceilings().fields("read", MIB, 1.0) == {}  # no ceiling, no claim


def test_pieces_of_the_arena_are_distinct():
    arena, sink = torch.zeros(4096, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    reads = ceiling.pieces(arena, "read", 4096, sink)
    copies = ceiling.pieces(arena, "copy", 4096, sink)
    assert len(reads) == 4 and {p.data_ptr() for p, _ in reads} == {
        arena.data_ptr() + 4096 * i for i in range(4)
    }
    assert all(src.nbytes == dst.nbytes == 2048 for src, dst in copies) and len(copies) == 4
    assert not {s.data_ptr() for s, _ in copies} & {d.data_ptr() for _, d in copies}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("words", [4, 1028, 40_000])
def test_stream_kernels_copy_every_word(backend, words):
    src = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32)
    dst = torch.zeros_like(src)
    if backend == "cuda":
        host = pytest.importorskip("lab._host")
        ceiling.cuda_call(host, 1, src, dst, 2, 64)()
    else:
        ceiling.triton_call(1, src, dst, 3, 1024, 4)()
    assert torch.equal(src, dst)


# The card


def test_nvidia_smi_is_parsed_and_gaps_are_none():
    got = card.parse_query(
        "580.1, 1980, 2619, [N/A], 120.5, 700.00, 35, Enabled, 0x0000000000000025", card.QUERY
    )
    assert got["driver"] == "580.1" and got["sm_mhz"] == 1980 and got["sm_max_mhz"] is None
    assert got["throttle"] == ["software power cap", "software thermal"]  # 0x1, idle, is none


# Shapes


@pytest.mark.parametrize("model", shapes.MODELS)
def test_every_point_of_a_preset_has_its_uses(model):
    c = PRESETS[model]
    found = shapes.points([model], (1, 64), (1024, 8192))
    assert {p.op for p in found} == MEASURED
    linears = {p.role: p.shape for p in found if p.op == "linear"}
    assert (
        linears["qkv"]["n"] == (c.q_heads + 2 * c.kv_heads) * c.head_dim
        and linears["lm_head"]["n"] == c.vocab
    )
    assert {(p.batch, p.context) for p in found if p.op == "decode_attention"} <= {
        (b, n) for b in (1, 64) for n in (1024, 8192)
    }
    assert all(json.loads(json.dumps(p.shape)) == p.shape for p in found)


def test_equal_shapes_of_two_models_are_one_point_of_both():
    found = shapes.points(["llama-3.2-1b", "llama-3.1-8b"], (1,), (1024,))
    sample = [p for p in found if p.op == "sample"]
    assert len(sample) == 1 and sample[0].models == ("llama-3.2-1b", "llama-3.1-8b")
    assert len({p.identity for p in found}) == len(found)


def test_points_of_an_op_that_no_model_uses_come_from_its_contract(monkeypatch):
    other = dataclasses.replace(find("silu_mul"), name="other", uses=None)
    monkeypatch.setattr(shapes, "OPS", (*OPS, other))
    found = shapes.points(["smollm2-135m"], ops=["other"])
    assert len(found) == len(other.cases)
    args, _ = shapes.arguments(other, found[0], Rand("cpu", torch.float32), 1)
    other.validate(*args)


@pytest.mark.parametrize("config", [TINY, TINY_QK])
def test_arguments_pass_the_contract(config, monkeypatch):
    monkeypatch.setitem(PRESETS, config.name, config)
    for point in shapes.points([config.name], (1, 3), (5, 64)):
        op = find(point.op)
        dtype = torch.float32
        args, used = shapes.arguments(op, point, Rand("cpu", dtype), 132)
        op.validate(*args)
        assert op.nbytes(op.bound(*args)) > 0
        assert op.has_context == ("splits" in used)
        assert set(op.cold) <= set(op.names)


# The benches on a CPU


def test_ops_bench_records_emulated_rows_and_nothing_it_did_not_measure(tiny, tmp_path, capsys):
    assert (
        run_bench(
            "ops",
            "--model",
            "tiny",
            "--backend",
            "torch",
            "--device",
            "cpu",
            "--context",
            "16",
            "--seconds",
            "0.001",
            "--out",
            tmp_path,
        )
        == 0
    )
    rows = schema.read(tmp_path).rows
    ops = [r for r in rows if r.kind == "op"]
    assert {r.op for r in ops} == MEASURED
    assert all(r.timer == "wall" and r.emulated and r.us > 0 and r.n >= 2 for r in ops)
    assert all(r.gbps is None and r.of_ceiling is None and r.error is None for r in ops)
    assert [r.when for r in rows if r.kind == "env"] == ["before", "after"]
    assert not [r for r in rows if r.kind == "ceiling"]


def test_a_whole_step_is_measured_as_a_token(tiny, tmp_path):
    ask = [
        "--model",
        "tiny",
        "--backend",
        "torch",
        "--device",
        "cpu",
        "--context",
        "16",
        "--seconds",
        "0.001",
        "--out",
        tmp_path,
        "--dtype",
        "bf16",
    ]
    assert run_bench("model", "--batch", "2,1", "--plan", "basic,persistent", *ask) == 0
    found = [(r.plan, r.batch, r.error) for r in schema.read(tmp_path).rows if r.kind == "model"]
    assert found == [("basic", 1, None), ("persistent", 1, None), ("basic", 2, None)]
    assert shapes.points(["smollm2-135m"], ops=["decode_step"]) == []
    with pytest.raises(
        LabError, match="decode_step is a whole step, measured as a token: lab bench model --plan pers"
    ):
        run_bench("ops", "decode_step", *ask)
    with pytest.raises(
        LabError, match="plan persistent decodes one sequence, not a batch of 2: use --batch 1"
    ):
        run_bench("model", "--batch", "2", "--plan", "basic,persistent", *ask)


def test_sides_that_a_batch_rules_out_or_that_say_nothing_new_are_left_out():
    rig = ops_bench.Rig("cuda", dict.fromkeys(BACKENDS), None, plans=("basic", "fused", "persistent"))
    both = [(backend, plan) for plan in ("basic", "fused") for backend in BACKENDS]
    assert rig.sides(1, "bf16") == [*both, ("cuda", "persistent"), ("triton", "persistent")]
    assert rig.sides(2, "bf16") == both
    rig.lean = True
    assert [plan for backend, plan in rig.sides(1, "bf16") if backend == "torch"] == ["basic"]
    rig.lean, rig.plans = False, ("persistent",)
    assert (
        rig.sides(1, "bf16") == [(backend, "persistent") for backend in BACKENDS]
        and rig.sides(4, "bf16") == []
    )
    rig.plans, rig.backends = ("fused", "persistent"), {"torch": None}
    assert rig.sides(1, "bf16") == [("torch", "fused"), ("torch", "persistent")]


def test_an_interrupted_bench_says_so_and_exits_as_interrupted(tiny, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops_bench, "measure_point", interrupted)
    assert (
        run_bench(
            "ops", "silu_mul", "--model", "tiny", "--backend", "torch", "--device", "cpu", "--out", tmp_path
        )
        == 130
    )
    assert "goes on from here" in capsys.readouterr().out
    assert [r.kind for r in schema.read(tmp_path).rows] == ["env"]


def test_when_every_row_fails_the_bench_fails(tiny, tmp_path, capsys, monkeypatch):
    ops = select("torch", "cpu")
    monkeypatch.setattr(ops_bench, "load_backends", lambda *_, **__: ({"torch": ops}, []))
    monkeypatch.setattr(ops_bench.BoundPoint, "timed", lambda *_: 1 / 0)
    assert run_bench("ops", "silu_mul", "--model", "tiny", "--device", "cpu", "--out", tmp_path) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("lab bench: error: nothing could be measured: every row failed")
    )


def test_what_matters_most_is_measured_first(monkeypatch):
    """The steps of the full set as on a GPU, none of them run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = settings_of("all")
    rig = ops_bench.Rig("cuda", dict.fromkeys(BACKENDS), None, plans=settings.plans)
    steps = bench.steps_of(None, rig, settings)
    labels = [step.label for step in steps]
    first = {
        "op": next(i for i, l in enumerate(labels) if " b4 " in l and l.endswith("bf16")),
        "model": labels.index("smollm2-135m b4 1024"),
        "dtype": next(i for i, l in enumerate(labels) if "fp16" in l),
        "compiled": labels.index("smollm2-135m compiled"),
    }
    head = labels[: min(first.values())]
    assert {f"{name} b1 1024" for name in shapes.MODELS} < set(head)
    assert {
        "ledger llama-3.1-8b cuda fused",
        "ledger llama-3.1-8b triton persistent",
        "swaps llama-3.1-8b fused",
        "ladder of linear",
    } < set(head)
    assert not [l for l in labels if l.startswith("swaps") and l.endswith("persistent")]
    assert all(
        l.endswith("bf16") for l in labels if l.split()[0] in COLD and labels.index(l) < first["dtype"]
    )
    assert first["model"] < first["op"] < first["compiled"] < first["dtype"]
    modes = {
        (step.run.args[3].batch, step.run.args[4]): step.run.args[5]
        for step in steps
        if step.run.func is bench.measure_op
        and step.run.args[3].op == "linear"
        and step.run.args[3].format is None
    }
    assert modes[1, "bf16"] == ops_bench.MODES and modes[64, "bf16"] == modes[1, "fp16"] == (
        ("cold", "graph"),
    )


def test_the_sets_are_expected_to_take_no_longer_than_promised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, minutes in ((["all"], 12), (["all", "--quick"], 2)):
        settings = settings_of(*words)
        rig = ops_bench.Rig("cuda", dict.fromkeys(BACKENDS), None, plans=settings.plans, lean=settings.quick)
        if settings.quick:
            rig.seconds, rig.modes = ops_bench.QUICK_SECONDS, ops_bench.QUICK_MODES
        steps = bench.steps_of(None, rig, settings)
        assert 0.3 * minutes < sum(step.seconds for step in steps) / 60 < 0.9 * minutes
        torch_plans = {step.label for step in steps if "torch" in step.label}
        assert ("ledger llama-3.2-1b torch fused" in torch_plans) != settings.quick


def test_every_step_of_a_made_up_gpu_is_recorded_once_and_within_its_budget(tiny, tmp_path, monkeypatch):
    ops, calls = select("torch", "cpu"), []
    rig = ops_bench.Rig("cuda", {"cuda": ops, "torch": ops}, None, seconds=0.0)

    def failing(*args):
        calls.append(args)
        raise RuntimeError("no kernel image")

    def measured(session, rig, weights, rows, sides, batch, context):
        calls.append(sides)
        for r in rows:
            r.us = 1.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(ops_bench, "make_rig", lambda *_: rig)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings())
    monkeypatch.setattr(bench.ladder_bench, "points", lambda *_: [])
    monkeypatch.setattr(ops_bench, "measure_point", lambda *_: None)
    monkeypatch.setattr(model_bench, "load", lambda *_: load(RandomSource(TINY), torch.float32, "cpu"))
    monkeypatch.setattr(model_bench, "open_source", lambda *_: None)
    monkeypatch.setattr(model_bench, "_measure", measured)
    monkeypatch.setattr(ledger, "measure_backend", failing)
    monkeypatch.setattr(ledger, "measure_swaps", failing)
    for module in (model_bench, ledger):
        monkeypatch.setattr(module, "alive", lambda _: None)
    settings = settings_of("all", "--model", "tiny", "--batch", "1,2", "--context", "16")
    session = Session(tmp_path, "cpu", settings.recorded(), budget_minutes=0)
    assert not bench.run_all(session, settings, rig.backends) and not calls
    session.deadline = None
    assert bench.run_all(session, settings, rig.backends)
    rows = {kind: session.of_kind(kind) for kind in ("model", "ledger")}
    assert [(r.batch, r.mode) for r in rows["model"] if r.mode != "eager" and r.backend == "torch"] == [
        (1, "graph"),
        (1, "graph"),
        (2, "graph"),
        (2, "graph"),
        (1, "compile"),
    ]
    assert [(r.backend, r.plan, r.row) for r in rows["ledger"]] == [
        ("cuda", "basic", "total"),
        ("torch", "basic", "total"),
        ("cuda", "fused", "total"),
        ("torch", "fused", "total"),
        ("cuda", "persistent", "total"),
        ("triton", "basic", "swap"),
        ("triton", "fused", "swap"),
    ]
    assert all("no kernel image" in r.error for r in rows["ledger"])
    calls.clear()
    assert bench.run_all(session, settings, rig.backends) and not calls  # all is recorded


def test_models_that_do_not_fit_side_by_side_are_measured_plan_by_plan(monkeypatch):
    rig = ops_bench.Rig("cuda", dict.fromkeys(BACKENDS), None, plans=("basic", "fused"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (800, 800))
    basic, fused = ([(b, plan) for b in BACKENDS] for plan in ("basic", "fused"))
    sides = basic + fused
    assert model_bench.together(rig, sides, 100) == [sides] and model_bench.together(rig, sides, 601) == []
    assert model_bench.together(rig, sides, 150) == [basic, fused]
    assert model_bench.together(rig, sides, 250) == [basic[:2], basic[2:], fused[:2], fused[2:]]


def test_a_stopped_run_is_not_continued_with_other_tables(tiny, tmp_path, monkeypatch):
    ask = [
        "ops",
        "silu_mul",
        "--model",
        "tiny",
        "--backend",
        "torch",
        "--device",
        "cpu",
        "--seconds",
        "0.001",
        "--out",
        tmp_path,
        "--budget-minutes",
        "0",
    ]
    environment = card.environment
    for digest in ("1a2b3c4d", "1a2b3c4d", None):
        monkeypatch.setattr(
            card,
            "environment",
            lambda *given: dataclasses.replace(environment(*given), tuned={"cuda": digest, "triton": None}),
        )
        run_bench(*ask)
    assert len(schema.read(tmp_path).runs()) == 2


def test_a_failing_backend_is_an_error_row_and_the_others_are_measured(tiny, tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("kernel silu_mul_kernel:\n too many resources")

    ops = select("torch", "cpu")
    other = select("torch", "cpu")
    other.silu_mul = broken
    monkeypatch.setattr(ops_bench, "select", lambda name, device, **_: {"torch": ops, "triton": other}[name])
    run_bench(
        "ops",
        "silu_mul",
        "--model",
        "tiny",
        "--backend",
        "torch,triton",
        "--device",
        "cpu",
        "--out",
        tmp_path,
    )
    rows = {r.backend: r for r in schema.read(tmp_path).of_kind("op")}
    assert rows["torch"].us > 0 and rows["torch"].verdict == {}
    assert rows["triton"].us is None
    assert rows["triton"].error == "RuntimeError: kernel silu_mul_kernel: too many resources"
    assert "too many resources" in capsys.readouterr().out


def test_a_stopped_bench_goes_on_where_it_was(tiny, tmp_path, capsys):
    ask = [
        "ops",
        "--model",
        "tiny",
        "--backend",
        "torch",
        "--device",
        "cpu",
        "--context",
        "16",
        "--seconds",
        "0.001",
        "--out",
        tmp_path,
    ]
    run_bench(*ask, "--budget-minutes", "0")
    first = schema.read(tmp_path)
    assert [r.kind for r in first.rows] == ["env"] and "goes on from here" in capsys.readouterr().out
    run_bench(*ask)
    full = schema.read(tmp_path)
    assert full.runs() == first.runs() and "was stopped; going on" in capsys.readouterr().err
    keys = [schema.key(r) for r in full.rows]
    assert len(keys) == len(set(keys)) > 10 and full.rows[-1].when == "after"

    # Killed in the middle: only what is missing is measured again.
    lines = full.path.read_text().splitlines(True)
    full.path.write_text("".join(lines[:5]) + lines[5][:30])
    run_bench(*ask)
    again = schema.read(tmp_path)
    assert again.runs() == first.runs() and again.rows[:5] == full.rows[:5]
    assert {schema.key(r) for r in again.rows} == set(keys) and len(again.rows) == len(keys)

    # A complete run, other settings or another commit: a new run.
    run_bench(*ask)
    run_bench(*ask, "--batch", "2", "--budget-minutes", "0")
    run_bench(*ask, "--budget-minutes", "0")
    assert len(schema.read(tmp_path).runs()) == 4


def test_model_bench_has_the_four_indicators(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model_bench, "open_source", lambda name, kind: RandomSource(TINY))
    run_bench(
        "model",
        "tiny",
        "--backend",
        "torch",
        "--device",
        "cpu",
        "--batch",
        "1,2",
        "--context",
        "16",
        "--out",
        tmp_path,
    )
    rows = schema.read(tmp_path).of_kind("model")
    assert [(r.batch, r.context, r.mode, r.timer) for r in rows] == [
        (1, 16, "eager", "wall"),
        (2, 16, "eager", "wall"),
    ]
    for r in rows:
        assert r.error is None and r.emulated and r.gbps is None
        assert r.tokens_per_s == pytest.approx(r.batch / r.us * 1e6, rel=1e-4)
        assert r.us_p10 <= r.us <= r.us_p90 <= r.us_p99 and r.ttft_ms > 0
        assert r.weight_bytes == TINY.parameters * 4 and r.page_utilisation == pytest.approx(16 / 32)
        assert r.kv_bytes == 2 * TINY.layers * r.batch * 32 * TINY.kv_width * 4
        assert r.bytes == r.weight_bytes + r.batch * 17 * 2 * TINY.layers * TINY.kv_width * 4
    assert rows[0].linearity == 1.0
    assert rows[1].linearity == pytest.approx(rows[1].tokens_per_s / rows[0].tokens_per_s / 2, rel=1e-3)


def test_a_benchmarked_step_always_does_the_same_work(tiny):
    weights = load(RandomSource(TINY), torch.float32, "cpu")
    decoder = model_bench.Decoder(weights, select("torch", "cpu"), 2, 17)
    model_bench.fill(decoder, 2, 16)
    step = model_bench.timed_step(decoder, "eager")
    step.sample()
    assert decoder.positions.tolist() == [17, 17]  # one step after 16 tokens of context, however often
    step.sample()
    assert decoder.positions.tolist() == [17, 17] and decoder.context_lens.tolist() == [18, 18]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["ops", "rmsnorn"], "did you mean rmsnorm"),
        (["model", "lama"], "unknown model"),
        (["ops", "--backend", "cudnn"], "unknown backend"),
        (["ops", "--dtype", "int3"], "unknown dtype"),
        (["ops", "--batch", "1,x"], "positive integers"),
        (["ops", "--context", "0"], "positive integers"),
        (["ledger", "smollm2-135m", "--device", "cpu", "--backend", "torch"], "needs a GPU"),
    ],
)
def test_bad_input_is_one_line(argv, said, tmp_path):
    with pytest.raises(LabError, match=said):
        run_bench(*argv, "--out", tmp_path)


# The ledger's arithmetic, on made-up device events


def test_calls_of_a_step_have_roles_and_bytes(tiny):
    weights = load(RandomSource(TINY_QK), torch.float32, "cpu")
    decoder = model_bench.Decoder(weights, select("torch", "cpu"), 1, 17)
    model_bench.fill(decoder, 1, 16)
    before = decoder.positions.tolist()
    calls = ledger.record_step(decoder)
    assert decoder.positions.tolist() == before
    names = [(c.op, c.role) for c in calls]
    assert names[0] == ("embedding", None) and names[-2:] == [("linear", "lm_head"), ("sample", None)]
    for role, count in (("qkv", 2), ("o", 2), ("gate_up", 2), ("down", 2), ("lm_head", 1)):
        assert names.count(("linear", role)) == count
    assert names.count(("rmsnorm", "hidden")) == 5 and names.count(("rmsnorm", "q_head")) == 2
    # Weights but the norms, plus 17 tokens of KV: what the step must read at least.
    moved = sum(c.nbytes for c in calls if c.op in ("linear", "decode_attention"))
    least = model_bench.step_bytes(weights, 1, 17)
    assert least * 0.98 < moved < least * 1.2
    attention = [c for c in calls if c.op == "decode_attention"]
    attention[0].again()  # a call can be made again, in place


def events_of(*names):
    return [(name, i * 10, 1000 * (i + 1)) for i, name in enumerate(names)]


def two_calls():
    return [ledger.Call("linear", "qkv", 3_000_000, None), ledger.Call("silu_mul", None, 500, None)]


def test_kernels_are_given_to_the_calls_between_their_marks():
    m, calls = "at::cuda::spin_kernel(long)", two_calls()
    outside = ledger.split_by_marks(
        events_of("Memcpy DtoD", m, "gemv", "reduce", m, m, "silu", m, "add"), calls
    )
    assert [c.kernels for c in calls] == [["gemv", "reduce"], ["silu"]]
    assert outside == [(-1, "Memcpy DtoD"), (1, "add")]
    order = ledger.sequence(calls, [o for o in outside if "Memcpy" not in o[1]])
    assert order == [(0, "gemv"), (0, "reduce"), (1, "silu"), (None, "add")]
    with pytest.raises(LabError, match="marked calls"):
        ledger.split_by_marks(events_of(m, "gemv", m), two_calls())
    replay = (m, "gemv", "reduce", "silu", "add", "Memcpy DtoD")
    took = (9, 1, 2, 3, 4, 9, 9, 3, 2, 5, 4, 9)
    begins = (0, 0, 1, 3, 6, 10)  # "silu" begins before "reduce" has ended
    events = [(name, at * 1000, us * 1000) for name, at, us in zip(replay * 2, begins * 2, took)]
    replays = ledger.replays_of(events)
    times = ledger.kernel_times(replays, order)
    assert [t.us for t in times] == [2.0, 2.0, 4.0, 4.0] and times[0].n == 2
    # First replay: none. Second: gemv ends 2 us after reduce begins, and silu 2 us after add does.
    assert ledger.overlap_us(replays, len(order)) == pytest.approx((0 + 2 + 2) / 2)
    with pytest.raises(LabError, match="no replay"):
        ledger.replays_of(events_of("gemv"))
    with pytest.raises(LabError, match="ran 3 kernels and the eager step 4"):
        ledger.kernel_times(ledger.replays_of(events_of(m, "gemv", "reduce", "silu")), order)
    with pytest.raises(LabError, match="number 1 is other, not reduce"):
        ledger.kernel_times(ledger.replays_of(events_of(m, "gemv", "other", "silu", "add")), order)


def stats(us, n=20):
    return timing.Stats(us, us * 0.99, us * 1.01, us * 1.02, n)


BASE = dict(run="r", model="m", backend="cuda", plan="basic", dtype="bf16", batch=1, context=16)


def account(calls, times, token, chained, overlap):
    order = [(0, "void gemv<float>(int)"), (0, "reduce"), (1, "silu"), (None, "add")]
    chained = dict(zip(ledger.uses_of(calls), map(stats, chained), strict=True))
    rows = ledger.account(
        BASE,
        calls,
        order,
        list(map(stats, times)),
        stats(token),
        chained,
        1.5,
        Ceilings.of(curve() + curve("copy")),
        overlap,
    )
    assert all(isinstance(r, LedgerRow) for r in rows)
    parts = [r for r in rows if r.row != "total"]
    assert sum(r.us for r in parts) == pytest.approx(token) and sum(
        r.of_token for r in parts
    ) == pytest.approx(1.0)
    return rows, {r.row: r for r in rows}


def test_an_account_of_kernels_adds_up_to_the_token():
    rows, by_kind = account(two_calls(), (1.5, 0.5, 0.8, 0.7), 8.0, (5.0, 6.5, 7.7), overlap=False)
    assert by_kind["gap"].us == pytest.approx(7.7 - 3.5) and by_kind["unexplained"].us == pytest.approx(0.3)
    assert by_kind["unexplained"].flag == "above 3% of the token"
    kernels = {r.kernel: r for r in rows if r.row == "kernel"}
    assert kernels["gemv"].bytes == 3_000_000 and kernels["gemv"].gbps == pytest.approx(2000)
    assert (
        kernels["reduce"].bytes is None
        and kernels["silu"].of_ceiling is None
        and kernels["add"].op == "other"
    )
    text = ledger_verb.text_of(rows)
    assert "linear qkv" in text and "unexplained" in text and "total" in text and "overlap" not in text


def test_an_account_of_chains_adds_up_to_the_token():
    # Time stamps that overlap so much that they exceed the token; the chains do not care.
    rows, by_kind = account(two_calls(), (6.5, 0.5, 5.8, 0.7), 7.8, (5.0, 6.5, 7.7), overlap=True)
    assert [(r.row, r.op, r.kernel, r.us) for r in rows[:3]] == [
        ("chain", "linear", "gemv + reduce", pytest.approx(3.5)),
        ("chain", "silu_mul", "silu", pytest.approx(1.5)),
        ("chain", "other", "add", pytest.approx(1.2)),
    ]
    assert by_kind["gap"].us == 1.5 and by_kind["unexplained"].us == pytest.approx(0.1)
    assert by_kind["unexplained"].flag is None
    linear = rows[0]
    assert linear.bytes == 3_000_000 and linear.gbps == pytest.approx(3e3 / 3.5) and "isolated" in linear.note
    assert rows[1].us_p10 == pytest.approx(1.5 - np.hypot(0.065, 0.05)) and rows[1].n == 20
    assert "not an isolated kernel" in ledger_verb.text_of(rows)


def test_a_use_that_is_hidden_claims_no_bandwidth():
    rows, _ = account(two_calls(), (1, 1, 1, 1), 7.8, (1.4, 6.5, 7.7), overlap=True)
    assert rows[0].us < 0 and rows[0].bytes == 3_000_000 and rows[0].gbps is None


def test_chains_hold_the_calls_of_more_and_more_uses_in_the_steps_order():
    uses = [("a", None), ("b", "x"), ("a", None), ("b", "y"), ("b", "x")]
    calls = [ledger.Call(op, role, 0, f"{op}{i}") for i, (op, role) in enumerate(uses)]
    assert ledger.chains(calls, "last") == {
        ("a", None): ["a0", "a2"],
        ("b", "x"): ["a0", "b1", "a2", "b4"],
        ("b", "y"): ["a0", "b1", "a2", "b3", "b4"],
        ledger.OTHER: ["a0", "b1", "a2", "b3", "b4", "last"],
    }


@pytest.mark.parametrize("plan", PLANS)
def test_the_longest_chain_is_the_step(tiny, plan):
    decoder = model_bench.Decoder(
        load(RandomSource(TINY_QK), torch.bfloat16, "cpu"), select("torch", "cpu"), 1, 17, plan=plan
    )
    model_bench.fill(decoder, 1, 16)
    saved = decoder.state.clone(), decoder.ids.clone()
    longest = list(ledger.chains(ledger.record_step(decoder), lambda: None).values())[-1]
    want, logits = decoder.step().tolist(), decoder.logits.clone()
    decoder.state.copy_(saved[0]), decoder.ids.copy_(saved[1]), decoder.logits.fill_(torch.nan)
    ledger.all_of(longest)()
    assert decoder.ids.tolist() == want and decoder.logits.equal(logits)
    assert decoder.state.equal(saved[0])


class Replayed(timing.WallTimed):
    """A graph that is no graph: its calls one by one, by the wall clock."""

    def __init__(self, calls, before=None, graph=None):
        self.graph = self
        self.replay = graph.replay if graph else lambda: [call() for call in calls]
        super().__init__(self.replay, before)
        if before:
            before()  # capturing moves nothing on


@pytest.mark.parametrize(
    "backend, plan, row",
    [("cuda", "fused", "chain"), ("torch", "fused", "kernel"), ("cuda", "persistent", "kernel")],
)
def test_a_ledger_is_made_on_a_made_up_gpu(tiny, monkeypatch, backend, plan, row):
    seen, ops = [], select("torch", "cpu")  # the names of the kernels that "ran"

    def logged(name, run):
        return lambda *args, **options: (seen.append(f"{name}_kernel"), run(*args, **options))[1]

    def device_events(run):
        seen.clear()
        run()
        return [(name, i * 1000, 900) for i, name in enumerate(seen)]

    def timed_step(decoder, mode):
        state, ids = decoder.state.clone(), decoder.ids.clone()
        return Replayed(
            [torch.inference_mode()(lambda: decoder.run_plan(model_bench.GREEDY))],
            lambda: (decoder.state.copy_(state), decoder.ids.copy_(ids)),
        )

    for op in OPS:
        setattr(ops, op.name, logged(op.name, getattr(ops, op.name)))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(ledger.MARKER))
    monkeypatch.setattr(ledger, "device_events", device_events)
    monkeypatch.setattr(timing, "GraphTimed", Replayed)
    monkeypatch.setattr(model_bench, "timed_step", timed_step)
    measure = timing.measure
    monkeypatch.setattr(timing, "measure", lambda timed, *_: measure(timed, 0.0, 3, 3))
    rig = ops_bench.Rig("cpu", {}, Ceilings(), seconds=0.01)
    weights = load(RandomSource(TINY), torch.bfloat16, "cpu")
    base = BASE | {"backend": backend, "plan": plan}
    rows = ledger.measure_backend(base, rig, weights, ops, 1, 16)
    total, parts = rows[-1], rows[:-1]
    assert total.row == "total" and sum(r.us for r in parts) == pytest.approx(total.us)
    named = {(r.op, r.role): (r.kernel, r.calls) for r in rows if r.row == row}
    if plan == "persistent":
        assert named == {("decode_step", None): ("decode_step_kernel", 1)}
        assert total.bytes == next(r.bytes for r in rows if r.row == row) > weights.nbytes
    else:
        assert named["linear_add", "down"] == ("linear_add_kernel", TINY.layers)
        assert named["norm_linear_argmax", "lm_head"] == ("norm_linear_argmax_kernel", 1)
    assert {r.row for r in rows} == {row, "gap", "unexplained", "total"}


def test_swaps_cover_each_op_of_the_plan_asked(tiny, monkeypatch):
    timed = []
    monkeypatch.setattr(
        ledger,
        "select",
        lambda backend, device, overrides=(): (
            timed.append((backend, dict(overrides))) or select("torch", device)
        ),
    )
    monkeypatch.setattr(ledger, "SWAP_SECONDS", 0.01)
    rig = ops_bench.Rig("cpu", {}, Ceilings())
    weights = load(RandomSource(TINY), torch.float32, "cpu")
    for plan, ops in (("basic", 8), ("fused", 6)):
        timed.clear()
        rows = ledger.measure_swaps("r", rig, weights, "tiny", plan, "fp32", 1, 16)
        swapped = [r.op for r in rows if r.op]
        assert (
            swapped == list(dict.fromkeys(op for op, _, _ in shapes.uses(TINY, plan))) and len(swapped) == ops
        )
        assert timed == [("triton", {}), ("cuda", {}), *(("triton", {op: "cuda"}) for op in swapped)]
        assert all(r.plan == plan and r.us > 0 and not r.error for r in rows)
    text = ledger_verb.text_of(rows)
    assert "swap, plan fused" in text and "triton, norm_linear_argmax by cuda" in text and "all cuda" in text


def test_kernel_names_are_shortened():
    assert (
        ledger.short("void lab::(anonymous namespace)::gemv_kernel<half, 4>(float const*, int)")
        == "gemv_kernel"
    )
    assert ledger.short("rmsnorm_kernel") == "rmsnorm_kernel"


# Crossover


def op_row(op, backend, us, batch=1, context=None, role=None, spread=0.001):
    return OpRow(
        "r",
        op,
        backend,
        "bf16",
        batch,
        {"role": role or ""},
        context,
        "cold",
        "graph",
        role=role,
        models=["llama-3.2-1b"],
        us=us,
        us_p10=us * (1 - spread),
        us_p90=us * (1 + spread),
        n=30,
    )


def test_crossover_weighs_shapes_by_their_calls_and_marks_what_is_ambiguous(tmp_path, capsys):
    rows = [
        op_row("linear", "cuda", 10.0, role="qkv"),
        op_row("linear", "triton", 11.0, role="qkv"),
        op_row("linear", "cuda", 150.0, role="lm_head"),
        op_row("linear", "triton", 140.0, role="lm_head"),
        op_row("decode_attention", "cuda", 9.0, context=1024),
        op_row("decode_attention", "triton", 8.0, context=1024),
        op_row("decode_attention", "cuda", 20.0, context=8192, spread=0.2),
        op_row("decode_attention", "triton", 22.0, context=8192, spread=0.2),
        op_row("rope", "cuda", 2.0),
    ]
    env = schema.Env("r", "before", "cuda")
    found = {(c.op, c.context): c for c in crossover.cells(rows, "llama-3.2-1b")}
    linear = found["linear", None]
    assert linear.us == {"cuda": 16 * 10 + 150, "triton": 16 * 11 + 140} and linear.winner == "cuda"
    assert (
        found["decode_attention", 1024].winner == "triton"
        and found["decode_attention", 1024].verdict == "faster"
    )
    assert found["decode_attention", 8192].verdict == "ambiguous" and found["rope", None].verdict == "alone"
    with schema.Writer(tmp_path) as w:
        w.append(env, *rows)
    run_bench("crossover", "llama-3.2-1b", "--out", tmp_path, "--export", tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    assert {"batch": 1, "context": 1024, "backend": "triton", "ambiguous": False} in table["decode_attention"]
    assert table["decode_attention"][1]["ambiguous"] is True
    assert "linear" in capsys.readouterr().out
    with pytest.raises(LabError, match="no op records of smollm2-135m"):
        run_bench("crossover", "smollm2-135m", "--out", tmp_path)


# Known answers on a GPU


@pytest.fixture(scope="module")
def measured():
    """The quick ceilings of this card."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    rows = [r for rows in ceiling.measure("r", quick=True) for r in rows]
    return rows, Ceilings.of(rows)


@gpu
def test_every_launch_shape_of_the_ceiling_ran(measured):
    rows, ceilings = measured
    assert [r.error for r in rows if r.error] == []
    assert {r.backend for r in rows} >= {"triton", "torch"}
    for direction in ceiling.DIRECTIONS:
        speeds = [gbps for _, gbps in ceilings.curves[direction]]
        assert speeds[-1] > 2 * speeds[0]  # a short stream cannot reach the ceiling


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_copy_is_the_ceiling_and_a_kernel_at_half_speed_is_half_of_it(measured, backend):
    ceilings, size = measured[1], 1024 * MIB
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    src = torch.empty(size // 8, dtype=torch.int32, device="cuda").random_()
    dst = torch.empty_like(src)
    timed = {}
    for passes in (1, 2):
        if backend == "cuda":
            from lab import _cuda

            calls = [
                ceiling.cuda_call(_cuda, 1, src, dst, s["blocks_per_sm"] * sms, s["threads"], passes)
                for s in ceiling.CUDA_SHAPES
            ]
        else:
            calls = [
                ceiling.triton_call(1, src, dst, s["programs_per_sm"] * sms, s["block"], s["warps"], passes)
                for s in ceiling.TRITON_SHAPES
            ]
        call = min(calls, key=quickly)
        timed[passes] = timing.GraphTimed([call] * 2)
    got = timing.measure(timed, 0.5)
    reached = ceilings.at("copy", size)
    assert size / got[1].us / 1e3 == pytest.approx(reached, rel=0.03)
    assert size / got[2].us / 1e3 == pytest.approx(reached / 2, rel=0.03)


READ_TWICE = """
import torch
from lab import _cuda
from lab.harness import ceiling
sms = torch.cuda.get_device_properties(0).multi_processor_count
src = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()  # 2 GiB: L2 keeps little of it
sink = torch.zeros(4, dtype=torch.int32, device="cuda")
for passes in (1, 2):
    ceiling.cuda_call(_cuda, 0, src, sink, 4 * sms, 512, passes)()
torch.cuda.synchronize()
"""


def dram_bytes(text):
    """The bytes that each kernel read, from `ncu --csv --print-units base --metrics dram__bytes_read.sum`."""
    lines = text.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith('"ID"')) :]
    return [
        float(row["Metric Value"].replace(",", ""))
        for row in csv.DictReader(table)
        if row["Metric Name"] == "dram__bytes_read.sum"
    ]


def test_ncus_table_is_parsed():
    assert dram_bytes(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","bandwidth_kernel","dram__bytes_read.sum","byte","2,147,483,648"\n'
        '"1","bandwidth_kernel","dram__bytes_read.sum","byte","12"\n'
    ) == [2**31, 12.0]


@gpu
def test_a_kernel_that_reads_its_input_twice_shows_in_dram_bytes():
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not os.access(ncu, os.X_OK):
        pytest.skip("needs ncu (Nsight Compute)")
    # Clocks are left alone: they change no byte, and the card's settings are not ours.
    ran = subprocess.run(
        [
            ncu,
            "--metrics",
            "dram__bytes_read.sum",
            "--kernel-name",
            "bandwidth_kernel",
            "--csv",
            "--print-units",
            "base",
            "--clock-control",
            "none",
            sys.executable,
            "-c",
            READ_TWICE,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    said = ran.stdout + ran.stderr
    if "ERR_NVGPUCTRPERM" in said:
        pytest.skip("ncu may not read the performance counters here (ERR_NVGPUCTRPERM)")
    assert ran.returncode == 0, said
    assert dram_bytes(ran.stdout) == [pytest.approx(2**31, rel=0.03), pytest.approx(2**32, rel=0.03)]


def quickly(call):
    return timing.measure({"c": timing.GraphTimed([call])}, 0.05, 5)["c"].us


@gpu
def test_what_fits_in_l2_is_not_above_the_ceiling_when_cold(measured, tmp_path):
    session = Session(tmp_path, "cuda", {})
    rig = ops_bench.make_rig({"torch": select("torch", "cuda")}, "cuda", measured[1])
    for point in shapes.points(["smollm2-135m"], (1,), (1024,), ["linear"]):
        ops_bench.measure_point(session, rig, point, "bf16")
    rows = session.of_kind("op")
    assert [r.error for r in rows if r.error] == []
    cold = [r for r in rows if r.cache == "cold" and r.timer == "graph"]
    assert len(cold) == 10 and all(
        r.of_ceiling < 1.0 and not r.flag for r in cold
    )  # five linears, torch and cuBLAS
    warm = {(r.backend, r.role): r.us for r in rows if r.cache == "warm"}
    fits = [r for r in cold if r.bytes < rig.l2_bytes / 2]  # the lm_head, 57 MB, does not
    assert len(fits) == 8 and all(warm[r.backend, r.role] < r.us for r in fits)


@gpu
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.2-1b"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_the_ledger_adds_up_on_a_gpu(measured, model, backend, plan):
    rig = ops_bench.make_rig({}, "cuda", measured[1], quick=True)
    weights = load(RandomSource(PRESETS[model]), torch.bfloat16, "cuda")
    base = dict(run="r", model=model, backend=backend, plan=plan, dtype="bf16", batch=1, context=1024)
    rows = ledger.measure_backend(base, rig, weights, select(backend, "cuda"), 1, 1024)
    total = next(r for r in rows if r.row == "total")
    assert sum(r.us for r in rows if r.row != "total") == pytest.approx(total.us, rel=1e-6)
    named = [r for r in rows if r.row in ("kernel", "chain")]
    gap = next(r for r in rows if r.row == "gap")
    assert sum(r.us for r in named) + gap.us == pytest.approx(total.us, rel=0.03)
    assert (backend, plan) not in ledger.DEPENDENT or {r.row for r in named} == {"chain"}
    assert {r.op for r in named} >= {op for op, _, _ in shapes.uses(weights.config, plan)}
    assert all(r.us > -0.01 * total.us for r in (gap, *named))  # two measurements, each with its noise


def test_a_graph_keeps_what_it_has_captured():
    """A rung's call may own memory that the graph knows by its address alone."""
    calls = [object(), object()]
    assert timing.GraphTimed(calls, graph=object()).calls is calls
