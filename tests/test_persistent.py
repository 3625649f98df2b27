"""The persistent plan against the basic plan: within rounding the same logits, their best token, in one
kernel."""

import random
from dataclasses import replace

import pytest
import torch
from test_fused import NAMES, STEPS, backend  # noqa: F401 (backend is a fixture)
from test_quantised_model import WIDTHS, q4_k_m
from tiny_models import CONFIGS, LLAMA, write_gguf

from lab.dispatch import Trace, select
from lab.errors import LabError
from lab.formats import FORMATS, kv
from lab.harness import model_bench, shapes
from lab.model import decoder as decoders
from lab.model.decoder import Decoder
from lab.model.families import PRESETS
from lab.model.matrix import Matrix
from lab.model.sampling import GREEDY, Sampling
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import Storage
from lab.model.weights import load
from lab.ops.decode_step import StepModel
from lab.ops.step_layout import MATRICES

HALVES = pytest.mark.parametrize("backend", ["cuda", "triton"])  # what is launched, and its workspace
BF16 = torch.bfloat16
PROMPT = random.Random(1).choices(range(272), k=15)  # the steps cross the end of a page


def decoder(
    config, backend, device, plan="persistent", dtype=BF16, prompt=PROMPT, trace=None, o_bias=False, **options
):
    weights = load(RandomSource(config, seed=1), dtype, device)
    if o_bias:
        for layer in weights.layers:
            layer.bo = torch.linspace(-1, 1, config.hidden, device=device).to(dtype)
    d = Decoder(weights, select(backend, device, trace=trace), max_context=64, plan=plan, **options)
    if prompt:
        d.admit(0, prompt)
    return d


def agree(name, dtype, backend, device, o_bias=False):
    """Steps both plans over the same tokens. Half precision's bound is test_fused.py's: the roundings are the
    same."""
    d = decoder(CONFIGS[name], backend, device, dtype=dtype, o_bias=o_bias)
    basic = decoder(CONFIGS[name], "torch", device, "basic", torch.float32, o_bias=o_bias)
    for _ in range(STEPS):
        assert d.step().tolist() == d.logits.argmax(1).tolist()
        basic.step()
        assert (d.logits - basic.logits).abs().max() < 16 * torch.finfo(dtype).eps * basic.logits.abs().max()
        assert torch.equal(d.state, basic.state)
        basic.ids.copy_(d.ids)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("name", NAMES)
def test_plans_agree(name, dtype, backend, device):
    agree(name, dtype, backend, device)


def test_the_bias_of_the_output_projection(backend, device):
    agree("llama", torch.float16, backend, device, o_bias=True)


def test_sampling_draws_from_the_logits(backend, device):
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)
    d = decoder(CONFIGS["llama"], backend, device)
    for _ in range(STEPS):
        position = d.positions.clone()
        token = d.step(sampling).tolist()
        assert token == d.ops.sample(d.logits, position, 0.8, 20, 0.9, 3).tolist()


def test_runs_repeat_bit_for_bit(backend, device):
    first, second = (decoder(CONFIGS["qwen3"], backend, device) for _ in range(2))
    for _ in range(STEPS):
        assert first.step().tolist() == second.step().tolist() and torch.equal(first.logits, second.logits)


@HALVES
def test_one_kernel_a_step(backend, device):
    trace = Trace()
    d = decoder(CONFIGS["llama"], backend, device, trace=trace)
    d.step(), d.step()
    assert [(op, by, count) for (op, by, _), count in trace.counts.items()] == [("decode_step", backend, 2)]


@pytest.mark.parametrize("kv_dtype", [None, *kv.DTYPES])
def test_an_idle_row_writes_nothing_and_leaves_all_ready(kv_dtype, backend, device):
    d, fresh = (decoder(CONFIGS["qwen3"], backend, device, prompt=None, kv_dtype=kv_dtype) for _ in range(2))
    d.cache.fill_random()
    held = (d.ids.fill_(5), d.logits.fill_(7), *d.cache.tensors(), d.state)
    before = [tensor.clone() for tensor in held]
    with torch.inference_mode():
        d.run_plan(GREEDY)
    assert all(map(torch.equal, held, before))
    for one in (d, fresh):
        one.admit(0, PROMPT)
    assert d.step().tolist() == fresh.step().tolist() and torch.equal(d.logits, fresh.logits)


@pytest.mark.parametrize("wrong", [-1, LLAMA.vocab])
def test_an_id_outside_the_vocabulary_gives_no_token(wrong, backend, device):
    d = decoder(CONFIGS["llama"], backend, device)
    d.ids.fill_(wrong)
    assert d.step().tolist() == [-1] and d.logits.isnan().all()
    assert d.step().tolist() == [-1]  # which -1 itself is


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(batch=2),
            "plan persistent decodes one sequence, not a batch of 2: use --batch 1, or --plan fused",
        ),
        (
            dict(dtype=torch.float64),
            "plan persistent takes models in .*bf16 alone: use --dtype bf16, or --plan fused",
        ),
    ],
)
def test_what_the_plan_does_not_take_is_refused_before_memory_is_taken(options, said, monkeypatch):
    monkeypatch.setattr(decoders, "PagedKVCache", None)
    with pytest.raises(LabError, match=said):
        decoder(LLAMA, "torch", "cpu", **options)


def test_a_model_with_too_many_query_heads_is_refused():
    with pytest.raises(LabError, match="decode_step: 9 query and 1 KV heads of 64: .* at most 8 query heads"):
        decoder(replace(LLAMA, q_heads=9, kv_heads=1), "torch", "cpu")


@HALVES
@pytest.mark.parametrize(
    "layers",
    [
        ("int4-g32-min", "int4-g32-min"),
        ("int8", None),
        ("int4-g128", "fp8"),
        ("q4_k", "q6_k"),
        ("fp8-g128", "int8"),
    ],
)
def test_packed_weights_give_the_fused_plans_tokens(layers, backend, device):
    """Also where layers differ in format, or one is plain."""

    def tokens(plan):
        weights = load(RandomSource(CONFIGS["llama-3"], seed=1), BF16, device)
        for layer, name in zip(weights.layers, layers):
            for part in MATRICES if name else ():
                packed = FORMATS[name].quantise(getattr(layer, part).data.float())
                setattr(layer, part, Matrix(packed, BF16))
        weights.embed = Matrix(FORMATS["int8-g32"].quantise(weights.embed.data.float()), BF16)
        d = Decoder(weights, select(backend, device), max_context=64, plan=plan)
        d.admit(0, PROMPT)
        return [d.step().tolist() for _ in range(2)], d.logits

    (got, logits), (want, wanted) = tokens("persistent"), tokens("fused")
    assert got == want
    assert (logits - wanted).abs().max() < 16 * torch.finfo(BF16).eps * wanted.abs().max()


@HALVES
@pytest.mark.parametrize(
    "name, kind, kv_dtype",
    [
        ("llama-3", q4_k_m, None),
        ("llama-3", q4_k_m, "int8"),
        ("qwen2", lambda n: "Q8_0" if "k_proj" in n else "Q4_1", None),  # three formats; biases
        ("qwen3", lambda n: "F32" if "q_proj" in n else "Q4_K", None),  # q plain; norms of q and k
        ("llama-3", lambda n: "Q5_0" if "v_proj" in n and "layers.0" in n else "Q6_K", "fp8"),  # v plain
    ],
    ids=["Q4_K_M", "cache of codes", "three", "q plain", "v plain"],
)
def test_q_k_and_v_of_several_formats_give_the_fused_plans_tokens(
    tmp_path, name, kind, kv_dtype, backend, device
):
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", replace(CONFIGS[name], **WIDTHS), kind=kind)))
    weights = load(source, BF16, device)
    assert any(isinstance(layer.wqkv.data, tuple) for layer in weights.layers)

    def tokens(backend, plan):
        d = Decoder(weights, select(backend, device), max_context=64, plan=plan, kv_dtype=kv_dtype)
        d.admit(0, PROMPT)
        return [d.step().tolist() for _ in range(2)], d.logits

    (got, logits), (want, wanted) = tokens(backend, "persistent"), tokens("torch", "fused")
    assert got == want
    limit = 16 * torch.finfo(BF16).eps if kv_dtype is None else 0.03  # as in test_persistent_kv.py
    assert (logits - wanted).abs().max() < limit * wanted.abs().max()
    # By torch the persistent plan is the fused one.
    same = tokens("torch", "persistent")
    assert same[0] == want and torch.equal(same[1], wanted)


@pytest.mark.parametrize("rows", [(64, 64), (128, 32, 96)])
def test_matrices_that_are_not_q_k_and_v_are_refused(rows):
    weights = load(RandomSource(replace(LLAMA, q_heads=2, kv_heads=1, head_dim=64), seed=1), BF16).operands()
    weights.layers[1].wqkv = tuple(torch.zeros(n, LLAMA.hidden, dtype=BF16) for n in rows)
    with pytest.raises(LabError, match=r"wqkv must have the \[128, 64, 64\] rows of q, k and v"):
        StepModel.of(weights, torch.zeros(64, 64), 2, 1, 64, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [40, 3000])  # one split, and several of several tiles
@pytest.mark.parametrize("name", shapes.MODELS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_full_widths_on_a_gpu(backend, name, context):
    """Every block has rows, and the ring goes round many times: a tiny model's few rows leave that out."""
    weights = load(RandomSource(replace(PRESETS[name], layers=2)), BF16, "cuda")
    repeats_and_agrees(weights, backend, context)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_full_widths_of_a_mixed_file_on_a_gpu(backend, name):
    repeats_and_agrees(mixed(replace(PRESETS[name], layers=2), "cuda"), backend, 40)


def mixed(config, device):
    """Weights of two layers as GGUF's Q4_K_M has them: v and down of one in Q6_K, and the output head."""
    weights = load(RandomSource(config), BF16, device, Storage(quantise="q4_k", head="q6_k"))
    layer, more = weights.layers[1], FORMATS["q6_k"]
    qk, v = layer.wqkv.data.to(torch.float32).split([config.q_width + config.kv_width, config.kv_width])
    layer.wqkv = Matrix((FORMATS["q4_k"].quantise(qk), more.quantise(v)), BF16)
    layer.w_down = Matrix(more.quantise(layer.w_down.data.to(torch.float32)), BF16)
    return weights


def repeats_and_agrees(weights, backend, context):
    """The persistent plan gives the basic plan's logits by torch, and the same bits when run again."""

    def logits(backend, plan):
        d = Decoder(weights, select(backend, weights.device.type), max_context=context + 4, plan=plan)
        torch.manual_seed(0)
        model_bench.fill(d, 1, context)
        found = []
        for _ in range(STEPS):
            d.ids.fill_(7)  # the same tokens for all
            d.step()
            found.append(d.logits.clone())
        return torch.stack(found)

    got, want = logits(backend, "persistent"), logits("torch", "basic")
    assert (got - want).abs().max() < 16 * torch.finfo(BF16).eps * want.abs().max()
    assert torch.equal(got, logits(backend, "persistent"))
