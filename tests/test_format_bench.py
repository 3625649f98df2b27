"""Weight formats in the bench and the report: rows of packed weights, what they cost, pictures."""

import math
from dataclasses import replace

import pytest
import synthetic_records as synthetic
import torch
from report_pages import Page, env, report
from tiny_models import CONFIGS, write_gguf

from lab import cli, peers
from lab.contract import Peer
from lab.dispatch import select
from lab.errors import LabError
from lab.formats import FORMATS
from lab.harness import accuracy, bench, crossover, ledger, model_bench, ops_bench, request, shapes
from lab.harness.ceiling import Ceilings
from lab.harness.request import Request, op_points, settings_of
from lab.model.decoder import Decoder
from lab.model.families import PRESETS
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import EXPANDED, Storage
from lab.model.weights import load
from lab.ops import OPS, find
from lab.records import card, compare, schema
from lab.report import format_figures, model_figures, overview_figures, sides, style
from lab.report import load as report_load

PRODUCTS = ["embedding", "linear", "linear_add", "norm_linear", "norm_linear_argmax", "norm_linear_silu_mul"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIGS["llama"])
    monkeypatch.setattr(card, "commit", lambda: "c0ffee")
    monkeypatch.setattr(model_bench, "open_source", lambda name, kind: RandomSource(PRESETS[name]))


def lab(*words):
    return cli.main([str(word) for word in words])


# lab bench ops --weight-format


def test_bench_ops_records_every_product_in_every_format(tmp_path, tiny):
    words = ("--backend", "cuda", "--device", "cpu", "--model", "tiny", "--batch", "2", "--seconds", "0.01")
    formats = "none,int4-g32-min,fp8"
    assert lab("bench", "ops", *words, "--weight-format", formats, "--out", tmp_path) == 0
    rows = schema.read(tmp_path).of_kind("op")
    assert sorted({r.op for r in rows}) == PRODUCTS == sorted(op.name for op in OPS if op.takes_formats)
    assert not any(r.error for r in rows) and len({schema.key(r) for r in rows}) == len(rows)
    by_op = {(r.op, r.role): {} for r in rows}
    for r in rows:
        by_op[r.op, r.role][r.weight_format] = r
        assert (r.rms_error is None) == (r.weight_format is None) and r.us > 0
    assert all(list(found) == [None, "int4-g32-min", "fp8"] for found in by_op.values())
    c = CONFIGS["llama"]
    for (op, role), found in by_op.items():
        if op == "linear" and role != "lm_head":
            n, k = found["fp8"].shape["n"], found["fp8"].shape["k"]
            for name in ("int4-g32-min", "fp8"):
                moved = FORMATS[name].bytes_of(n, k) + 2 * 4 * (n + k)
                bias = 0 if not found[name].shape.get("bias") else 4 * n
                assert found[name].bytes == moved + bias, (role, c.hidden)
        if op != "embedding":
            assert found["fp8"].rms_error < 0.6 * found["int4-g32-min"].rms_error < 0.12


def test_ops_that_take_no_formats_are_left_out_and_refused():
    settings = settings_of(Request("ops", device="cpu", weight_formats=("fp8",)))
    assert {point.op for _, point in op_points(settings)} == set(PRODUCTS)
    for ask, says in (
        (dict(what="ops", ops=("rope",), weight_formats=("fp8",)), "rope has no weights in a format"),
        (dict(what="ops", weight_formats=("int5",)), "unknown weight format"),
        (dict(what="ledger", weight_formats=("fp8",)), "a ledger is of one format"),
        (dict(what="model", weight_formats=("fp8",), quantise="int8"), "contradict each other"),
        (dict(what="model", weight_formats=("fp8",), weights_as="stored"), "contradict each other"),
        (dict(what="ops", ladder=True, weight_formats=("fp8",)), "the weights that it was written for"),
        (dict(what="ops", quantise="fp8"), "lab bench ops --weight-format"),
    ):
        with pytest.raises(LabError, match=says):
            settings_of(Request(device="cpu", **ask))


def test_all_measures_a_few_formats_after_the_ladders(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = settings_of(Request("all", device="cuda"))
    packed = [point for _, point in op_points(settings) if point.format]
    assert {p.format for p in packed} == set(request.IN_FORMATS) and {p.batch for p in packed} == {1, 16, 64}
    assert {(p.op, p.role) for p in packed} == {("linear", role) for role in format_figures.LAYER}
    assert len(packed) == 36
    assert not any(p.format for _, p in op_points(replace(settings, quick=True)))
    rig = ops_bench.Rig("cuda", {}, None)
    weights = model_bench.Weights("random", "bf16", "cuda")
    steps = bench.op_steps(None, rig, settings, weights)
    mine = [step for stage, step in steps if stage == "ops in weight formats"]
    assert len(mine) == 36 and sum(step.seconds for step in mine) < 60
    assert bench.STAGES.index("ladders") < bench.STAGES.index("ops in weight formats")


def test_torch_is_no_side_of_packed_weights_beside_others():
    rig = ops_bench.Rig("cpu", {name: select(name, "cpu") for name in ("cuda", "torch")}, None)
    assert rig.having(find("linear")) == ["cuda", "torch"] and rig.having(find("linear"), True) == ["cuda"]
    assert ops_bench.Rig("cpu", {"torch": rig.backends["torch"]}, None).having(find("linear"), True) == [
        "torch"
    ]


def bound_linear(monkeypatch, peer, format="int4-g128", dtype=torch.bfloat16):
    op = replace(find("linear"), peers=(peer,))
    point = shapes.Point("linear", "o", 5, None, {"n": 64, "k": 256}, format=format)
    rig = ops_bench.Rig("cpu", {"torch": select("torch", "cpu")}, None)
    return ops_bench.BoundPoint(op, point, dtype, rig)


@pytest.mark.parametrize("peer, format", [(peers.INT4_MM, "int4-g128"), (peers.SCALED_MM, "fp8")])
def test_peers_of_packed_weights_compute_the_op(monkeypatch, peer, format):
    bound = bound_linear(monkeypatch, peer, format)
    assert list(bound.peers) == [peer.name]
    assert bound.checked(peer.name) == pytest.approx(bound.checked("torch"), rel=0.5)
    assert not bound_linear(monkeypatch, peer, "int8").peers
    assert not bound_linear(monkeypatch, peer, None).peers
    assert not bound_linear(monkeypatch, peer, format, torch.float32).peers


def test_a_side_that_is_wrong_is_not_timed(monkeypatch):
    def zeros(sets):
        return [lambda: torch.zeros(5, 64)]

    bound = bound_linear(monkeypatch, Peer("wrong", zeros))
    with pytest.raises(LabError, match="not timed: its result is 1 away from the reference"):
        bound.checked("wrong")
    nan = bound_linear(monkeypatch, Peer("nan", lambda sets: [lambda: torch.full((5, 64), torch.nan)]))
    with pytest.raises(LabError, match="not timed"):
        nan.checked("nan")
    assert 0.05 < bound.checked("torch") < 0.2


def test_compare_and_crossover_tell_formats_apart():
    row = schema.OpRow(
        "r", "linear", "cuda", "bf16", 1, {"n": 8, "k": 8}, us=2.0, us_p10=1.9, us_p90=2.1, n=9
    )
    row.models = ["llama-3.2-1b"]
    packed = replace(row, weight_format="fp8", us=1.0)
    pairs, only_a, only_b = compare.match([row, packed], [row, replace(packed, us=3.0)])
    assert [p.a.weight_format for p in pairs] == ["fp8", None] and not only_a and not only_b
    assert "fp8" in compare.label(packed)
    assert (
        crossover.cells([row, packed], "llama-3.2-1b")[0].us["cuda"]
        == crossover.cells([row], "llama-3.2-1b")[0].us["cuda"]
    )


def test_models_in_several_formats_are_one_run(tmp_path, tiny):
    words = ("--backend", "torch", "--device", "cpu", "--context", "16", "--out", tmp_path)
    assert lab("bench", "model", "tiny", *words, "--weight-format", "none,fp8,int4-g32") == 0
    found = schema.read(tmp_path)
    rows = found.of_kind("model")
    assert [r.weight_format for r in rows] == [None, "fp8, lm_head int8", "int4-g32, lm_head int8"]
    assert len(found.runs()) == 1 and rows[0].bytes > 2 * rows[1].bytes > 2 * rows[2].bytes
    run = report_load.load(tmp_path)[0]
    assert list(sides.series(run, "tiny")["weight_format"]) == [""]


def test_weights_of_several_storages_hold_one_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIGS["llama"])
    monkeypatch.setattr(model_bench, "open_source", lambda name, kind: RandomSource(PRESETS[name]))
    plain, packed = model_bench.Weights.of_storages(
        "random", "fp32", "cpu", [EXPANDED, Storage(False, "fp8", "int8")]
    )
    first = plain.of("tiny")
    assert plain.of("tiny") is first and not first.packed
    assert packed.of("tiny").packed and len(plain.shelf) == 1
    packed.drop()
    assert plain.shelf == {} and plain.config_of("tiny") is CONFIGS["llama"]


# The ledger


@pytest.mark.parametrize("plan", ["basic", "fused"])
def test_a_ledger_counts_the_bytes_of_packed_weights(plan):
    """Every use has the bytes of its matrices in all layers, codes and scales, and of its activations."""
    config = CONFIGS["llama"]
    moved = {}
    for storage in (EXPANDED, Storage(False, "int4-g32-min", "fp8")):
        weights = load(RandomSource(config), storage=storage)
        decoder = Decoder(weights, select("torch", "cpu"), 1, 17, plan=plan)
        model_bench.fill(decoder, 1, 16)
        found = moved[storage] = {}
        for call in ledger.record_step(decoder):
            found[call.op, call.role] = found.get((call.op, call.role), 0) + call.nbytes
    plain, packed = moved.values()
    assert list(plain) == list(packed)
    matrices = {"qkv": "wqkv", "o": "wo", "gate_up": "w_gate_up", "down": "w_down", "lm_head": "lm_head"}
    seen = set()
    for (op, role), nbytes in packed.items():
        if not find(op).takes_formats or role is None:
            continue
        name, times = matrices[role], 1 if role == "lm_head" else config.layers
        part = config.parts[name]
        format = FORMATS["fp8" if role == "lm_head" else "int4-g32-min"]
        less = times * (4 * part.rows * part.columns - format.bytes_of(part.rows, part.columns))
        assert plain[op, role] - nbytes == less, (op, role)
        seen.add(role)
    assert seen == set(matrices)


def test_swaps_name_the_weight_format(monkeypatch):
    monkeypatch.setattr(ledger, "select", lambda backend, device, overrides=(): select("torch", device))
    monkeypatch.setattr(ledger, "SWAP_SECONDS", 0.01)
    weights = load(RandomSource(CONFIGS["llama"]), storage=Storage(False, "fp8", None))
    rig = ops_bench.Rig("cpu", {}, Ceilings())
    rows = ledger.measure_swaps("r", rig, weights, "m", "fused", "fp32", 1, 8, "fp8, lm_head fp32")
    assert {r.weight_format for r in rows} == {"fp8, lm_head fp32"} and all(r.us > 0 for r in rows)


# lab bench accuracy


def test_divergence_and_agreement():
    before = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    assert accuracy.compared(before, before.clone()) == (0.0, 1.0)
    after = torch.tensor([[2.0, 1.0, 0.5], [0.0, 0.0, 3.0]])
    p, q = (torch.softmax(t[0].double(), -1) for t in (before, after))
    want = float((p * (p / q).log()).sum()) / 2
    divergence, same = accuracy.compared(before, after)
    assert math.isclose(divergence, want, rel_tol=1e-5) and same == 0.5
    with pytest.raises(LabError, match="not numbers"):
        accuracy.compared(before, after * torch.nan)


def test_errors_of_products_are_those_of_their_weights():
    source = RandomSource(CONFIGS["llama"])
    before = load(source, storage=EXPANDED)
    found = {}
    for name in ("fp8", "int4-g32"):
        found[name] = accuracy.products(before, load(source, storage=Storage(False, name, None)))
    assert list(found["fp8"]) == ["qkv", "o", "gate_up", "down", "lm_head"]
    assert found["fp8"]["lm_head"] == 0  # it is left as it is
    after = load(source, storage=Storage(False, "fp8", None))
    w, q = before.layers[0].wo.data.double(), after.layers[0].wo.data.double()
    x = torch.randn(4096, w.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = ops_bench.rms_error(x @ q.T, x @ w.T)  # of one layer of several
    assert found["fp8"]["o"] == pytest.approx(error, rel=0.1)
    assert all(found["int4-g32"][use] > 2 * found["fp8"][use] for use in ("qkv", "o", "gate_up", "down"))


@pytest.fixture
def tiny_file(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "commit", lambda: "c0ffee")
    return write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q8_0")


def test_accuracy_of_a_file(tmp_path, tiny_file, monkeypatch):
    """The format that the file has costs nothing in the layers; one of 4 bits costs more than one of 8."""
    monkeypatch.setattr(
        accuracy, "tokens_of", lambda source: [i * 7 % source.config.vocab for i in range(20)]
    )
    words = ("--weight-format", "int8-g32,int4-g32", "--quantise-head", "none", "--device", "cpu")
    assert lab("bench", "accuracy", tiny_file, *words, "--out", tmp_path / "out") == 0
    found = schema.read(tmp_path / "out")
    same, worse = found.of_kind("accuracy")
    assert (same.weight_format, worse.weight_format) == ("int8-g32, lm_head fp32", "int4-g32, lm_head fp32")
    assert same.products == {use: 0.0 for use in same.products} and same.kl < 1e-6 and same.top1 == 1
    assert worse.kl > 1e-4 and worse.products["qkv"] > 0.02 and worse.tokens == 20
    assert same.stored == "Q8_0" and same.bytes < same.bytes_before and not found.of_kind("model")
    assert report(tmp_path / "out") == 0
    words = " ".join("".join(Page((tmp_path / "out/index.html").read_text()).text).split())
    assert "its file stores them as Q8_0" in words and "what a weight format costs in accuracy" in words
    assert "int8-g32, lm_head fp32 costs least accuracy" in words


def test_accuracy_of_what_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(card, "commit", lambda: "c0ffee")
    words = ("--weight-format", "fp8", "--device", "cpu", "--out", tmp_path)
    assert lab("bench", "accuracy", "llama-3.2-1b", *words) == 1
    said = capsys.readouterr()
    assert "comes without weights" in said.out and "every row failed" in said.err


@pytest.mark.real_model
def test_the_text_is_read_with_the_models_tokens():
    source = open_source("smollm2-135m")
    ids = accuracy.tokens_of(source)
    assert len(ids) == accuracy.TOKENS
    bare = replace_tokenizer(source)
    with pytest.raises(LabError, match="no tokenizer"):
        accuracy.tokens_of(bare)


def replace_tokenizer(source):
    class Bare:
        where, config = source.where, source.config

        @staticmethod
        def tokenizer():
            return None

    return Bare()


# The report


def packed_row(backend, format, **fields):
    return schema.OpRow(
        **{
            "run": "r",
            "op": "linear",
            "backend": backend,
            "dtype": "bf16",
            "batch": 1,
            "role": "qkv",
            "models": ["m"],
            "shape": {"n": 8, "k": 8},
            "weight_format": format,
            "us": 10.0,
            "us_p10": 9.0,
            "us_p90": 11.0,
            "n": 20,
            "bytes": 20000000,
            "gbps": 2000.0,
            "of_ceiling": 0.66,
            "rms_error": 0.1,
            **fields,
        }
    )


def test_packed_rows_are_in_no_other_picture(tmp_path):
    plain = packed_row("cuda", None, rms_error=None)
    synthetic.write(tmp_path, [env(), plain, packed_row("cuda", "fp8"), packed_row("triton", "fp8", us=12.0)])
    run = report_load.load(tmp_path)[0]
    assert list(run.op["weight_format"]) == [""] and list(run.packed["weight_format"]) == ["fp8", "fp8"]
    both = format_figures.packed(run)
    assert list(both["format"]) == ["bf16", "fp8", "fp8"]
    figure = format_figures.products(run)
    assert "--weight-format none,fp8" in figure.command and len(figure.table) == 3
    assert format_figures.layer(run) is None  # one product of four, one batch
    caption, frame = format_figures.errors(run)
    assert frame.to_dict("list") == {"op": ["linear qkv"], "fp8": [10.0]}


def test_the_layers_products_are_added(tmp_path):
    rows = [
        packed_row("cuda", "fp8", role=role, batch=batch, shape={"n": i, "k": 8}, us=10.0 * batch + i)
        for batch in (1, 4)
        for i, role in enumerate(format_figures.LAYER, 1)
    ]
    synthetic.write(tmp_path, [env(), *rows, packed_row("cuda", "int8", batch=4)])
    figure = format_figures.layer(report_load.load(tmp_path)[0])
    assert list(figure.table["median (us)"]) == [50.0, 170.0]
    assert list(figure.table["weights"]) == ["fp8", "fp8"]  # of int8 one product of the four is known


def test_more_formats_than_a_picture_shows_are_named(tmp_path):
    rows = [packed_row("cuda", f"format-{i}", bytes=1000 * (i + 1)) for i in range(8)]
    synthetic.write(tmp_path, [env(), *rows])
    figure = format_figures.products(report_load.load(tmp_path)[0])
    assert figure.reading.endswith("Not drawn, but in the table: format-6, format-4, format-1.")


def test_a_format_looks_the_same_in_every_picture(tmp_path):
    synthetic.write(tmp_path, synthetic.make(models=["llama-3.2-1b"], batches=(1, 4), contexts=(1024,)))
    run = report_load.load(tmp_path)[0]
    every = list(synthetic.FORMATS)
    one, other = (format_figures.looks(run, formats) for formats in (every, ["bf16", *every[::-1]]))
    assert len(one) == len(other) == format_figures.DRAWN and other["bf16"].color == style.MUTED
    assert all(one[name] == look for name, look in other.items() if name in one)
    assert len({(look.color, look.marker) for look in one.values()}) == len(one)


def test_time_and_error_meet_in_one_picture(tmp_path):
    token = dict(
        plan="fused", mode="graph", dtype="bf16", batch=1, context=64, us_p10=1.0, us_p90=9000.0, n=9
    )
    cost = dict(dtype="bf16", text="t", tokens=9, bytes=10, bytes_before=20)
    rows = [
        schema.ModelRow("r", "m", "cuda", us=5000.0, **token),
        schema.ModelRow("r", "m", "cuda", us=2000.0, weight_format="fp8", **token),
        schema.Accuracy("r", "m", "fp8", kl=0.01, top1=0.9, **cost),
        schema.Accuracy("r", "m", "int8", kl=0.001, top1=0.99, **cost),  # its token was not timed
    ]
    synthetic.write(tmp_path, [env(), *rows])
    figure = format_figures.accuracy(report_load.load(tmp_path)[0], "m")
    assert list(figure.table["weights"]) == ["fp8", "int8"]
    assert figure.table["CUDA (us a token)"].tolist()[0] == 2000.0
    assert figure.table["same best token (%)"].tolist() == [90.0, 99.0]


def test_steps_in_other_formats_are_models_of_their_own(tmp_path):
    """Pictures, sentences and commands say in which formats weights and KV cache were."""
    token = dict(plan="fused", mode="graph", dtype="bf16", batch=1, context=64, weights="random")
    token |= dict(us_p10=1.0, us_p90=9000.0, n=9)
    packed = dict(weight_format="fp8, lm_head int8", weight_bytes=9)
    rows = [
        schema.ModelRow("r", "m", "cuda", us=5000.0, weight_bytes=20, **token),
        schema.ModelRow(
            "r", "m", "cuda", us=2000.0, weight_bytes=9, weight_format="fp8, lm_head int8", **token
        ),
        schema.ModelRow("r", "m", "triton", us=4000.0, weight_bytes=20, kv_dtype="int8", **token),
    ]
    synthetic.write(tmp_path, [env(), *rows])
    run = report_load.load(tmp_path)[0]
    plain, packed, cache = names = ["m", "m (fp8, lm_head int8)", "m (KV cache int8)"]
    assert sorted(sides.models(run)) == sorted(names) and sides.main_model(run) == plain
    assert [sides.series(run, name)["us"].tolist() for name in names] == [[5000.0], [2000.0], [4000.0]]
    commands = [model_figures.latency(run, name).command for name in names]
    assert all(command.startswith("lab bench model m --dtype bf16 ") for command in commands)
    assert "--weight-format fp8 " in commands[1] and "--kv-dtype int8 " in commands[2]
    assert "-format" not in commands[0] + commands[2] and "--kv-dtype" not in commands[0] + commands[1]
    figure = overview_figures.overview(run)
    assert sorted(set(figure.table["model"])) == sorted(names)
    assert "--weight-format none,fp8 " in figure.command or "--weight-format fp8,none " in figure.command
