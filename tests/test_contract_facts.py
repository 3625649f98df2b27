"""What an op declares is all that the harness needs: its peers, its ladder, how often a step calls it."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from lab import cli, ladder, rungs
from lab.contract import Peer, Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.harness import crossover, ledger, model_bench, ops_bench
from lab.harness.shapes import Point
from lab.learn import ladder_check
from lab.model.families import PRESETS
from lab.model.plans import PLANS
from lab.model.sources.random import RandomSource
from lab.model.weights import load
from lab.ops import OPS, find
from lab.ops.kv_append import PAGE_SIZE
from lab.records import schema
from lab.rungs.rung import Ladder, Rung

ROOT = Path(__file__).resolve().parent.parent
TINY = dataclasses.replace(
    PRESETS["smollm2-135m"],
    name="tiny",
    architecture="qwen3",
    qk_norm=True,
    layers=3,
    hidden=64,
    intermediate=96,
    q_heads=4,
    kv_heads=1,
    vocab=257,
    max_positions=128,
)


@pytest.mark.parametrize("plan", PLANS)
def test_a_step_calls_each_op_as_often_as_its_contract_says(plan):
    decoder = model_bench.Decoder(
        load(RandomSource(TINY), torch.bfloat16, "cpu"), select("torch", "cpu"), 1, 17, plan=plan
    )
    model_bench.fill(decoder, 1, 16)
    counted = Counter((call.op, call.role) for call in ledger.record_step(decoder))
    said = Counter()
    for op in OPS:
        if plan in op.plans:
            for role, _ in op.uses(TINY):
                said[op.name, role if op.use_of else None] += op.calls(TINY, role)
    assert counted == said


def test_crossover_asks_the_contract(monkeypatch):
    def row(op, role, dtype):
        return schema.OpRow(
            "r", op, "cuda", dtype, 1, {}, None, "cold", "graph", role=role, models=["llama-3.2-1b"], us=2.0
        )

    rows = [
        row("embedding", None, "bf16"),
        row("silu_mul", None, "bf16"),
        row("silu_mul", None, "fp32"),
        row("sample", "greedy", "fp32"),  # it takes nothing else
        row("an_op_that_is_no_more", None, "bf16"),
    ]
    found = {cell.op: cell.us["cuda"] for cell in crossover.cells(rows, "llama-3.2-1b", "bf16")}
    assert found == {"embedding": 2.0, "silu_mul": 32.0, "sample": 2.0, "an_op_that_is_no_more": 32.0}


def test_an_op_declares_its_peers():
    made = []

    def make(sets):
        made.append(sets)
        return [lambda gate_up=gate_up: gate_up * 1 for (gate_up,) in sets]

    peers = (
        Peer("theirs", make, takes=lambda a: a.gate_up.dtype == torch.bfloat16, copies=True),
        Peer("not_here", make, module="no_such_package"),
    )
    op, point = (
        dataclasses.replace(find("silu_mul"), peers=peers),
        Point("silu_mul", None, 2, None, {"cols": 8}),
    )
    rig = ops_bench.Rig("cpu", {"torch": select("torch", "cpu")}, None)
    bound = ops_bench.BoundPoint(op, point, torch.bfloat16, rig)
    assert bound.names("cold", "graph") == ["torch", "theirs"] and bound.names("in_model", "graph") == [
        "torch"
    ]
    (call,) = bound.bind("theirs")
    assert made == [bound.sets] and call().shape == (2, 16)
    assert ops_bench.BoundPoint(op, point, torch.float32, rig).names("cold", "graph") == ["torch"]
    rig.vendor = False
    assert ops_bench.BoundPoint(op, point, torch.bfloat16, rig).names("cold", "graph") == ["torch"]


def test_cublas_computes_the_op():
    """On the CPU the call is torch's own product: the arguments are the right ones."""
    op = find("linear")
    sets = [op.inputs(Rand("cpu", torch.float32, seed), batch=3, n=8, k=16, bias=True) for seed in (0, 1)]
    peer = next(one for one in op.peers if one.name == "cublas")
    for call, args in zip(peer.make(sets), sets, strict=True):
        assert torch.allclose(call().double(), op.reference(*args)[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def toy_ladder(monkeypatch):
    """A ladder of silu_mul in Triton: one rung that takes no odd widths, and the op's own kernel."""

    def launch(number, a, out):
        assert number == 1
        gate, up = a.gate_up.float().chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    one = Rung(
        "silu_mul",
        1,
        "Naive",
        "idea",
        "gain",
        absent={"cuda": "not written"},
        needs="an even width",
        fits=lambda a: a.gate_up.shape[1] % 4 == 0,
    )
    made = Ladder(
        op="silu_mul",
        rungs=(one, Rung("silu_mul", 2, "Product", "idea", "gain")),
        triton=launch,
        cases=(("even", dict(rows=2, cols=8)), ("odd", dict(rows=1, cols=7))),
        points={"cpu": dict(batch=2, context=None, shape={"cols": 16})},
    )
    monkeypatch.setitem(rungs.LADDERS, "silu_mul", made)
    return made


def test_an_op_declares_its_ladder(toy_ladder, tmp_path, capsys):
    functions = {"triton": lambda name: ladder.bind(ladder.rung_called(name), "triton")}
    assert ladder_check.check(["silu_mul"], functions, ["fp32"], "cpu", 0) == 0
    assert " fp32 1/1 (1 refused)" in capsys.readouterr().out
    words = "bench ops silu_mul --ladder --device cpu --backend triton --out".split()
    assert cli.main([*words, str(tmp_path)]) == 0
    rows = schema.read(tmp_path).of_kind("op")
    assert [(r.rung, r.batch, r.shape, r.error) for r in rows] == [(n, 2, {"cols": 16}, None) for n in (1, 2)]


def test_ladders_measure_the_pages_of_the_benchmark():
    """lab/rungs imports no torch, so the size of a page stands there once more."""
    for point in rungs.ladder_of("decode_attention").points.values():
        assert point["shape"]["page_size"] == PAGE_SIZE
    with pytest.raises(LabError, match="choose from linear, quantised_linear, rmsnorm"):
        rungs.ladder_of("rope")


def test_the_harness_knows_no_op_by_name():
    """A fact of an op is in its contract or its ladder. An op may be named in an example or in a message."""
    named = re.compile("|".join(rf'"{op.name}"' for op in OPS))
    for folder in ("harness", "tune"):
        for path in (ROOT / "lab" / folder).glob("*.py"):
            assert not named.findall(path.read_text()), path
    assert not named.findall((ROOT / "lab/ladder.py").read_text())
