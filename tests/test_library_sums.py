"""The peer of the exchange within a decode step, as rows, tables and pictures have it, and the 70B model that
one GPU does not hold. tests/test_ranks.py runs the peer on two processes."""

import pytest
import synthetic_records as synthetic
import torch
from tiny_models import CONFIGS

from lab.errors import LabError
from lab.harness import ledger_verb, library_sums, model_bench, parallel_bench, printed, shapes
from lab.harness.request import Request, settings_of
from lab.model import weights
from lab.model.families import PRESETS
from lab.model.kv_cache import token_bytes
from lab.model.parallel import RankSource, part_of, possible
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import Storage
from lab.ops import find
from lab.records import compare
from lab.records.schema import Env, LedgerRow, ModelRow
from lab.report import ledger_figures, load, parallel_figures, style

LARGE = PRESETS["llama-3.1-70b"]


def asked(**more):
    return settings_of(Request("model", models=("qwen3-0.6b",), device="cpu", **more))


def test_by_default_only_models_that_divide_are_measured():
    request = Request("model", device="cpu")
    settings = settings_of(request)
    assert parallel_bench.left_out_of(settings, request, 2) == ["smollm2-135m"]  # 9 query heads
    assert "smollm2-135m" in parallel_bench.divided(settings, request, 3).models
    with pytest.raises(LabError, match="among 7 ranks"):
        parallel_bench.divided(settings, request, 7)
    named = Request("model", models=("smollm2-135m",), device="cpu")  # is refused, not left out
    assert parallel_bench.left_out_of(settings_of(named), named, 2) == []


def test_each_language_has_a_peer_under_the_fused_plan():
    settings = asked(plans=("basic", "fused"))
    assert library_sums.sides(settings) == [
        *(("cuda", "basic"), ("cuda", "fused"), ("cuda+gloo", "fused")),
        *(("triton", "basic"), ("triton", "fused"), ("triton+gloo", "fused")),
        *(("torch", "basic"), ("torch", "fused")),
    ]
    assert not any("+" in name for name, _ in library_sums.sides(asked(plans=("fused",), vendor=False)))
    assert not any("+" in name for name, _ in library_sums.sides(asked(plans=("basic",))))
    assert "gloo" in library_sums.note_of("cuda+gloo") and library_sums.note_of("cuda") is None


def test_a_peer_has_the_kernels_of_its_backend_and_torch_sums(monkeypatch):
    monkeypatch.setenv("LAB_OVERRIDE", "rope=torch")  # holds for the peer as for its backend
    one, other = (library_sums.select_side(name, "cpu").chosen for name in ("cuda", "cuda+gloo"))
    assert {op for op in one if one[op] != other[op]} == {"all_reduce_add"}
    assert other["all_reduce_add"] == "torch" and other["rope"] == "torch" and other["linear"] == "cuda"


SIZE = dict(dtype="bf16", batch=1, context=1024, ranks=2)


def a_run():
    for backend, us in (("cuda", 3000.0), ("cuda+nccl", 3700.0)):
        yield ModelRow("r", "m", backend, "fused", "graph", us=us, us_p10=us, us_p90=us, n=9, **SIZE)
        base = dict(run="r", model="m", backend=backend, plan="fused", **SIZE)
        yield LedgerRow(**base, row="chain", op="all_reduce_add", us=us - 2900, calls=64)
        yield LedgerRow(**base, row="total", order=1, us=us, n=5, of_token=1.0)


def test_the_peer_is_beside_ours_in_tables_ledgers_and_the_report(tmp_path):
    rows = list(a_run())
    assert any("cuda+nccl fused" in " ".join(line.split()) for line in printed.models(rows))
    assert "\nm cuda+nccl fused bf16 on 2 ranks" in ledger_verb.text_of(
        [row for row in rows if row.kind == "ledger"]
    )
    assert compare.label(rows[3]) == "m on 2 GPUs cuda+nccl fused graph bf16 b1 ctx1024"
    synthetic.write(tmp_path, [Env("r", "before", "cuda"), *rows])
    (run,) = load.load(tmp_path)
    frame = dict(parallel_figures.tables(run))["A token of models that several GPUs divide"]
    assert list(frame.iloc[:, 1]) == ["CUDA", "CUDA + NCCL"]
    figure = ledger_figures.token(run, "m", "fused")
    assert set(figure.table.iloc[:, 0]) == {
        "CUDA fused on 2 GPUs, chains",
        "CUDA + NCCL fused on 2 GPUs, chains",
    }
    assert style.backend("cuda+nccl").color == style.backend("nccl").color
    assert style.backend("a+b").label == "a+b"


def test_two_gpus_of_80_gb_hold_a_70b_and_smaller_ones_are_told_before_anything_is_taken(monkeypatch):
    source, bf16 = RandomSource(LARGE), torch.bfloat16
    room = {"cuda": 79 << 30, "cpu": 200 << 30}
    monkeypatch.setattr(weights, "device_bytes", lambda device, index: room[device] - index)
    weights.require_parts(source, 2, bf16, "cuda", tokens=1025)
    weights.require_parts(source, 2, bf16, "cpu", tokens=1025)
    with pytest.raises(
        LabError, match=r"llama-3.1-70b in bf16 needs 86.7 GiB on each of 2 ranks, 66.7 of them"
    ):
        weights.require_parts(source, 2, bf16, "cuda", tokens=1 << 17)
    with pytest.raises(
        LabError, match="133.4 GiB on each.*the memory that they share has 200.0 GiB: use a s"
    ):
        weights.require_parts(source, 2, torch.float32, "cpu")
    room["cuda"] = 40 << 30
    weights.require_parts(source, 4, bf16, "cuda", tokens=1025)
    weights.require_parts(source, 2, bf16, "cuda", Storage(quantise="int4-g128"), tokens=1025)
    with pytest.raises(LabError, match="GPU 0 has 40.0 GiB: use more ranks") as caught:
        weights.require_parts(source, 2, bf16, "cuda", tokens=1025)
    assert "\n" not in str(caught.value)


def test_a_cache_that_another_rank_has_no_room_for_is_refused_on_this_one_too(monkeypatch):
    small = CONFIGS["llama"]
    need = 2 * 9 * token_bytes(small, torch.float32) / model_bench.KV_SHARE
    of_other = [2 * need]
    monkeypatch.setattr(parallel_bench, "free_bytes", lambda device: int(3 * need))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op: t.clamp_(max=int(of_other[0])))
    sharing = [1]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: sharing[0])
    loaded = weights.load(RandomSource(small))
    assert parallel_bench.refused_cache(loaded, 2, 9, None) is None
    sharing[0] = 3  # on a CPU all ranks' caches are in one memory, which has room for two
    assert parallel_bench.refused_cache(loaded, 2, 9, None)
    sharing[0] = 1
    of_other[0] = need / 2
    row = ModelRow("r", "m", "cuda", "fused", "eager", "fp32", 2, 8, ranks=2)
    assert parallel_bench.timed(row, loaded, "cpu").error.startswith("does not fit") and row.us is None


class Shapes:
    """Takes the place of Rand: tensors without memory."""

    device = torch.device("meta")

    def __call__(self, *shape, dtype=torch.bfloat16, scale=1.0):
        return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_parts_of_a_70b_are_the_whole_and_the_ops_take_them(ranks):
    assert ranks in possible(LARGE)
    part, source = part_of(LARGE, ranks), RankSource(RandomSource(LARGE), ranks - 1, ranks)
    for one in (*part.layer.parts(), *part.outer_parts()):
        for name, rows in one.tensors:
            shape = (rows, one.columns) if one.is_matrix else (rows,)
            whole, dim, first = source.place("model.layers.0." + name, shape)
            assert first + shape[dim] == whole[dim] or whole == shape, name  # the last rank's part ends there
    products = [use for plan in ("basic", "fused") for use in shapes.uses(part, plan) if "linear" in use[0]]
    assert len(products) == 10
    for name, _, sizes in products:
        op = find(name)
        op.validate(*op.inputs(Shapes(), **op.sizes_at(sizes, 1, None, 132)[0]))
