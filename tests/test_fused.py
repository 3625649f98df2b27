"""The fused plan against the basic plan: the same tokens and, within rounding, the same logits."""

import functools
import random
from collections import Counter

import pytest
import torch
from tiny_models import CONFIGS

from lab.backends import load as load_backend
from lab.contract import DTYPE_CODES
from lab.dispatch import Trace, select
from lab.errors import Unavailable
from lab.model.decoder import Decoder
from lab.model.sampling import GREEDY, Sampling
from lab.model.sources.random import RandomSource
from lab.model.weights import load

NAMES = ["llama", "qwen2", "qwen3"]  # plain, with qkv bias, with per-head norms of q and k
BACKENDS = ["torch", "cuda", "triton"]
STEPS = 3
TOLERANCE = 2e-5  # float32 over two layers, as in test_model.py


def prompts(batch: int) -> dict[int, list[int]]:
    """One per live row; the second row stays idle. Lengths on both sides of a page's end."""
    draw = random.Random(batch)
    return {row: draw.choices(range(272), k=(15, 16, 17, 1, 33)[row % 5]) for row in range(batch) if row != 1}


def decode(
    name,
    plan,
    backend,
    device,
    batch=1,
    dtype=torch.float32,
    sampling=GREEDY,
    o_bias=False,
    trace=None,
    steps=STEPS,
):
    """(tokens, logits) of each step, a list of [batch] and of [batch, vocab], the idle row left out."""
    weights = load(RandomSource(CONFIGS[name], seed=1), dtype, device)
    if o_bias:
        for layer in weights.layers:
            layer.bo = torch.linspace(-1, 1, CONFIGS[name].hidden, device=device).to(dtype)
    decoder = Decoder(
        weights, select(backend, device, trace=trace), batch, max_context=64, plan=plan, splits=2
    )
    rows = prompts(batch)
    for row, ids in rows.items():
        decoder.admit(row, ids)
    tokens, logits = [], []
    for _ in range(steps):
        tokens.append(decoder.step(sampling)[list(rows)].tolist())
        logits.append(decoder.logits[list(rows)].clone())
    return tokens, torch.stack(logits)


decode_once = functools.cache(decode)  # for what more than one test compares with, none of which changes it


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    try:
        load_backend(request.param, torch.device(device))
    except Unavailable as missing:
        pytest.skip(str(missing))
    return request.param


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("name", NAMES)
def test_plans_agree(name, batch, backend, device):
    if batch > 3 and name != "qwen3" and backend == "triton" and device == "cpu":
        pytest.skip("slow when interpreted; qwen3 has this batch")
    tokens, logits = decode_once(name, "fused", backend, device, batch)
    want_tokens, want_logits = decode_once(name, "basic", "torch", device, batch)
    assert tokens == want_tokens
    torch.testing.assert_close(logits, want_logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9])
def test_plans_agree_in_half_precision(batch, dtype, backend, device):
    """Each of about 16 roundings a layer moves the residual stream by up to half an epsilon of its size."""
    if batch > 1 and backend == "triton" and device == "cpu":
        pytest.skip("slow when interpreted; the ops' own cases have this batch")
    _, logits = decode("qwen3", "fused", backend, device, batch, dtype, steps=1)
    _, want = decode_once("qwen3", "basic", "torch", device, batch, steps=1)
    assert (logits - want).abs().max() < 2 * 16 * torch.finfo(dtype).eps / 2 * want.abs().max()


def test_the_bias_of_the_output_projection(backend, device):
    _, logits = decode("llama", "fused", backend, device, o_bias=True)
    _, want = decode_once("llama", "basic", "torch", device, o_bias=True)
    _, without = decode_once("llama", "basic", "torch", device, 1)
    torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE)
    assert (want - without).abs().max() > 0.1


def test_sampling_draws_from_the_same_logits(backend, device):
    given = dict(batch=3, sampling=Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3))
    if backend == "triton" and device == "cpu":
        given["steps"] = 1  # interpreted thresholds are slow
    fused, basic = (decode("llama", plan, backend, device, **given)[0] for plan in ("fused", "basic"))
    assert fused == basic


def test_five_kernels_a_layer(device):
    trace = Trace()
    decode("llama", "fused", "cuda", device, trace=trace, steps=1)
    layers = CONFIGS["llama"].layers
    calls = Counter()
    for (op, backend, _), count in trace.counts.items():
        assert backend == "cuda"
        calls[op] += count
    assert calls == {
        "embedding": 1,
        "norm_linear": layers,
        "rope_append_attention": layers,
        "linear_add": 2 * layers,
        "norm_linear_silu_mul": layers,
        "norm_linear_argmax": 1,
    }


def test_runs_repeat_bit_for_bit(backend, device):
    first = decode_once("qwen3", "fused", backend, device, 3)
    second = decode("qwen3", "fused", backend, device, 3)
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_a_tensor_core_batch_needs_room_for_its_normed_rows(gpu_shapes):
    host = load_backend("cuda", torch.device("cpu")).extension
    x, w = torch.zeros(9, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    y, code = torch.empty(9, 4, dtype=torch.bfloat16), DTYPE_CODES[torch.bfloat16]
    with pytest.raises(ValueError, match="norm_linear: more than 2 rows of half precision need `normed`"):
        host.norm_linear(
            x=x.data_ptr(),
            norm_w=x.data_ptr(),
            w=(w.data_ptr(), 0, 0),
            bias=0,
            y=y.data_ptr(),
            normed=0,
            tiled=0,
            rows=9,
            n=4,
            k=8,
            eps=1e-5,
            dtype=code,
            out_dtype=code,
            stream=0,
        )
