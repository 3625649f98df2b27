"""A KV cache in fp8 and int8: rounding, all backends, a whole model, and what is refused."""

import itertools

import pytest
import tiny_models
import torch

from lab.check import check_case
from lab.contract import Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.formats import kv
from lab.model.decoder import Decoder
from lab.model.weights import load
from lab.ops import decode_attention, find, kv_append, rope_append_attention

BACKENDS = ("torch", "cuda", "triton")
FORMATS = tuple(kv.DTYPES)
ONE = torch.ones(1)


# ---- the formats -------------------------------------------------------------------------------------------


def test_fp8_rounds_to_the_nearest_number_and_saturates():
    """Every code is found again, numbers between two go to the nearer, halfway to the even code."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    numbers = kv.numbers(codes, ONE)
    assert torch.equal(kv.quantise(numbers, "fp8", ONE)[0], codes)
    positive = numbers[:127].double()
    for share, expected in ((0.49, torch.arange(126)), (0.51, torch.arange(1, 127))):
        between = (positive[:-1] + share * positive.diff()).float()
        assert torch.equal(kv.quantise(between, "fp8", ONE)[0].long(), expected)
    halfway = kv.quantise(((positive[:-1] + positive[1:]) / 2).float(), "fp8", ONE)[0]
    assert not (halfway & 1).any()
    beyond = torch.tensor([460.0, 1e30, torch.inf, torch.nan, -1e30, -torch.inf])
    assert kv.numbers(kv.quantise(beyond, "fp8", ONE)[0], ONE).tolist() == [448] * 4 + [-448] * 2


def test_int8_has_a_scale_for_each_head():
    x = torch.randn(5, 3, 64)
    codes, scales = kv.quantise(x, "int8")
    assert scales.dtype == torch.float16 and scales.shape == (5, 3)
    assert (codes.abs().amax(-1) >= 126).all()  # the scale is rounded, so the largest is 127 or next to it
    assert ((kv.numbers(codes, scales) - x).abs() <= scales.float()[..., None] * 0.57).all()
    zeros, scale = kv.quantise(torch.zeros(2, 64), "int8")
    assert not zeros.any() and not scale.any()
    for bad in (torch.nan, torch.inf, 1e8):  # 1e8 / 127 is beyond float16
        x[0, 0, 7] = bad
        assert kv.numbers(*kv.quantise(x, "int8"))[0, 0].isnan().all()
        assert kv.numbers(*kv.quantise(x, "int8"))[1:].isfinite().all()


# ---- the ops -----------------------------------------------------------------------------------------------


def appended(backend, kv_dtype, dtype, positions, odd=False, seed=0):
    args = kv_append.inputs(Rand("cpu", dtype, seed), positions, 4, 2, 64, kv_dtype=kv_dtype, odd=odd)
    select(backend, "cpu").kv_append(*args)
    return args


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_all_backends_append_the_same_codes(kv_dtype, dtype):
    """Bit for bit; and what is read back is k and v, rounded."""
    made = [appended(name, kv_dtype, dtype, tuple(range(3, 19)), odd=True) for name in BACKENDS]
    for other in made[1:]:
        for i in (2, 3, 6, 7):  # caches and scales
            assert torch.equal(other[i].nan_to_num(nan=7.0), made[0][i].nan_to_num(nan=7.0))
    k, v, *caches, table, positions, k_scales, v_scales = made[1]
    for b, position in enumerate(positions.tolist()):
        slot = table[b, position // 16].long(), slice(None), position % 16
        for new, cache, scales in ((k, caches[0], k_scales), (v, caches[1], v_scales)):
            codes, own = kv.quantise(new[b], kv_dtype, scales)
            assert torch.equal(cache[slot], codes)
            assert own is None or torch.equal(scales[slot].nan_to_num(nan=7.0), own.nan_to_num(nan=7.0))


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fused_op_is_append_and_attend(backend, kv_dtype):
    """It stores what kv_append stores and attends to the new token as it is stored, idle rows left out."""
    args = rope_append_attention.inputs(
        Rand("cpu", torch.float32), (0, 16, -1, 40), 4, 2, 64, splits=2, kv_dtype=kv_dtype, poison=True
    )
    q, k, v, _, _, eps, positions, cos_sin, k_cache, v_cache, table, scale, splits, _, *scales = args
    caches = [t.clone() for t in (k_cache, v_cache, *scales)]
    out = select(backend, "cpu").rope_append_attention(*args)
    ops = select("torch", "cpu")
    q, k = q.clone(), k.clone()
    ops.rope(q, k, positions, cos_sin)
    ops.kv_append(k, v, *caches[:2], table, positions, *caches[2:])
    for got, want in zip((k_cache, v_cache, *scales), caches, strict=True):
        assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    want = ops.decode_attention(q, *caches[:2], table, positions + 1, scale, splits, None, *caches[2:])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert not out[2].any()


@pytest.mark.parametrize("name", ("decode_attention", "rope_append_attention"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_fp8_by_the_conversion_of_a_gpu(name, dtype, monkeypatch):
    """What Triton runs on sm_89 and later: codes become float16, and so do queries in bfloat16."""
    module = pytest.importorskip(f"triton_kernels.{name}")
    monkeypatch.setattr(module, "format_of", lambda cache: 0 if cache.dtype == dtype else 3)
    op = find(name)
    for case in op.cases:
        if case.sizes.get("kv_dtype") == "fp8":
            outcome = check_case(op, getattr(select("triton", "cpu"), name), Rand("cpu", dtype), case.sizes)
            assert outcome.error is None, outcome.error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_int8_stays_visible(backend):
    args = decode_attention.inputs(Rand("cpu", torch.float32), (20, 9), 4, 2, 64, kv_dtype="int8")
    k_scales, table = args[-2], args[3]
    k_scales[table[0, 1].long(), 1, 2] = torch.nan
    out = select(backend, "cpu").decode_attention(*args)
    assert out[0, 2:].isnan().all() and out[0, :2].isfinite().all() and out[1].isfinite().all()


def test_bytes_are_those_of_the_format():
    rand = Rand("cpu", torch.bfloat16)
    made = {}
    for kv_dtype in (None, *FORMATS):
        op = find("decode_attention")
        made[kv_dtype] = op.nbytes(
            op.bound(*decode_attention.inputs(rand, (1000,), 4, 2, 64, kv_dtype=kv_dtype))
        )
    tokens = 2 * 2 * 1000
    assert made[None] - made["fp8"] == tokens * 64 and made["int8"] - made["fp8"] == tokens * 2


CALL = dict(positions=(5,), q_heads=4, kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(k_scales=None), "a cache in fp8 needs k_scales and v_scales, each fp32 \\[1\\]"),
        (dict(v_scales=torch.ones(2)), "a cache in fp8 needs"),
        (dict(k_scales=torch.ones(1, dtype=torch.float16)), "a cache in fp8 needs"),
        (dict(k_cache=torch.zeros(1, 2, 16, 64)), "of one dtype"),
    ],
)
def test_scales_must_fit_the_cache(change, says):
    op = find("kv_append")
    a = op.bound(*kv_append.inputs(Rand("cpu", torch.float32), **CALL, kv_dtype="fp8"))
    with pytest.raises(LabError, match=says):
        select("torch", "cpu").kv_append(**{**vars(a), **change})


def test_plain_caches_take_no_scales_and_codes_no_strange_dtype():
    ops, op = select("torch", "cpu"), find("kv_append")
    a = op.bound(*kv_append.inputs(Rand("cpu", torch.float32), **CALL))
    with pytest.raises(LabError, match="belong to a cache of codes"):
        ops.kv_append(**{**vars(a), "k_scales": ONE, "v_scales": ONE})
    for name in ("k_cache", "v_cache"):
        setattr(a, name, getattr(a, name).half())
    with pytest.raises(LabError, match="the cache is fp16 and the heads are fp32"):
        ops.kv_append(**vars(a))
    a = op.bound(*kv_append.inputs(Rand("cpu", torch.float32), **{**CALL, "head_dim": 320}, kv_dtype="int8"))
    with pytest.raises(LabError, match="heads of at most 256"):
        ops.kv_append(**vars(a))


@pytest.mark.parametrize("scale", (0.0, -1.0, torch.nan, torch.inf))
def test_a_scale_that_is_no_positive_number_is_found_where_contents_are_checked(scale):
    args = kv_append.inputs(Rand("cpu", torch.float32), **CALL, kv_dtype="fp8")
    args[-1].fill_(scale)
    with pytest.raises(LabError, match="v_scales is .*must be a positive number"):
        select("torch", "cpu", check_contents=True).kv_append(*args)


def test_rungs_take_no_quantised_cache():
    from lab import ladder, rungs

    args = decode_attention.inputs(Rand("cpu", torch.float32), (20,), 4, 2, 64, kv_dtype="fp8")
    rung = next(r for r in rungs.rungs("decode_attention") if not r.own_kernel)
    with pytest.raises(LabError, match="a cache that is not quantised"):
        ladder.bind(rung, "cuda", "cpu")(*args)


# ---- the model ---------------------------------------------------------------------------------------------


def decoded(kv_dtype, backend="torch", plan="basic", steps=6, rows=2, dtype=torch.float32, **options):
    """(ids, logits) of each step of two sequences, one idle row in front of them."""
    source = tiny_models.RandomSource(tiny_models.CONFIGS["qwen3"])
    decoder = Decoder(
        load(source, dtype),
        select(backend, "cpu"),
        batch=rows + 1,
        max_context=64,
        plan=plan,
        kv_dtype=kv_dtype,
        **options,
    )
    for row in range(rows):
        decoder.admit(row + 1, [(37 * i + 11 * row) % 272 for i in range(20 + row)])
    ids, logits = [], []
    for _ in range(steps):
        ids.append(decoder.step()[1:].tolist())
        logits.append(decoder.logits[1:].clone())
    return ids, torch.stack(logits)


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("backend, plan", [*itertools.product(("cuda", "torch"), ("basic", "fused"))])
def test_backends_and_plans_agree(backend, plan, kv_dtype):
    ids, logits = decoded(kv_dtype, backend, plan)
    want_ids, want = decoded(kv_dtype)
    assert ids == want_ids
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("plan", ("basic", "fused"))
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_triton_agrees(plan, kv_dtype):
    ids, logits = decoded(kv_dtype, "triton", plan, steps=2, rows=1)
    want_ids, want = decoded(kv_dtype, steps=2, rows=1)
    assert ids == want_ids
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_prefill_is_the_same_as_steps(kv_dtype):
    """Tokens of a prompt, too, attend to codes."""
    ids = [(37 * i) % 272 for i in range(12)]
    source = tiny_models.RandomSource(tiny_models.CONFIGS["qwen3"])
    weights, ops, made = load(source), select("torch", "cpu"), []
    for prompt in (ids, ids[:1]):
        decoder = Decoder(weights, ops, max_context=32, kv_dtype=kv_dtype)
        decoder.admit(0, prompt)
        decoder.step()
        for token in ids[len(prompt) :]:
            decoder.ids[0] = token
            decoder.step()
        made.append(decoder.logits.clone())
    torch.testing.assert_close(*made, rtol=0, atol=2e-3)
