"""The persistent plan with a quantised KV cache: the codes that it stores, and the basic plan's logits."""

import pytest
import torch
from test_persistent import BF16, PROMPT, decoder
from tiny_models import CONFIGS

from lab.check import check_case
from lab.contract import Rand
from lab.dispatch import select
from lab.formats import kv
from lab.ops import decode_step

FORMATS = pytest.mark.parametrize("kv_dtype", list(kv.DTYPES))
HALVES = pytest.mark.parametrize("backend", ["cuda", "triton"])
SIZES = dict(layers=1, hidden=72, intermediate=64, vocab=83, q_heads=4, kv_heads=2)


def stepped(backend, **sizes):
    """The arguments of one step by name, after it; the same weights for all formats of the cache."""
    args = decode_step.inputs(Rand("cpu", BF16), **SIZES, **sizes)
    select(backend, "cpu").decode_step(*args)
    return decode_step.op.bound(*args)


@FORMATS
@HALVES
@pytest.mark.parametrize("head_dim, position", [(64, 15), (128, 16), (96, 130)])
def test_the_codes_are_those_of_the_key_and_value_that_a_plain_cache_gets(
    backend, kv_dtype, head_dim, position
):
    """Position 15 is a page's last slot, 16 the first one of the next page, 130 is in a later split."""
    sizes = dict(head_dim=head_dim, position=position)
    plain, coded = stepped(backend, **sizes), stepped(backend, **sizes, kv_dtype=kv_dtype)
    before = decode_step.op.bound(*decode_step.inputs(Rand("cpu", BF16), **SIZES, **sizes, kv_dtype=kv_dtype))
    slot = 0, int(plain.block_table[0, position // 16]), slice(None), position % 16
    for name in ("k", "v"):
        new = getattr(plain, f"{name}_cache")[slot]
        scales = getattr(coded, f"{name}_scales")
        codes, own = kv.quantise(new, kv_dtype, scales[0])
        want, want_scales = (getattr(before, f"{name}_{what}").clone() for what in ("cache", "scales"))
        want[slot] = codes
        if own is not None:
            want_scales[slot] = own
        assert torch.equal(getattr(coded, f"{name}_cache"), want) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("given", ["k_scales", "v_scales"])
def test_scales_of_keys_alone_or_of_values_alone_are_refused(given):
    args = decode_step.op.bound(*decode_step.inputs(Rand("cpu", BF16), **SIZES, head_dim=64, position=3))
    coded = decode_step.inputs(Rand("cpu", BF16), **SIZES, head_dim=64, position=3, kv_dtype="fp8")
    half = {**vars(args), given: getattr(decode_step.op.bound(*coded), given)}
    with pytest.raises(ValueError, match="k_scales and v_scales go together"):
        select("cuda", "cpu").decode_step(**half)


@FORMATS
@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize("name, dtype", [("qwen3", BF16), ("llama", torch.float16)])
def test_plans_agree(name, dtype, backend, kv_dtype, device):
    """Over the end of a page, nearly the same logits and cache as the basic plan by torch: a key that is
    rounded the other way moves by a code, which attention of a few tokens shows."""
    made = [
        decoder(CONFIGS[name], by, device, plan, dtype, kv_dtype=kv_dtype)
        for by, plan in ((backend, "persistent"), ("torch", "basic"))
    ]
    d, basic = made
    for _ in range(3):
        assert d.step().tolist() == d.logits.argmax(1).tolist()
        basic.step()
        assert (d.logits - basic.logits).abs().max() < 0.03 * basic.logits.abs().max()
        assert torch.equal(d.state, basic.state)
        basic.ids.copy_(d.ids)
    page, row = d.cache.slots(0, 0, len(PROMPT) + 3)
    for layer in range(CONFIGS[name].layers):
        of_both = zip(d.cache.read(layer, (page, row)), basic.cache.read(layer, (page, row)), strict=True)
        for got, want in of_both:
            assert (got - want).abs().mean() < 0.01 * want.abs().mean()
            assert (got - want).abs().max() <= 0.13 * want.abs().max()  # by one code, 1/8


def test_a_number_half_way_between_two_codes_may_get_either(device):
    """In float16, whose steps are much smaller than those of codes, sums in another order moved such a number
    to the next code: in one of 81,920."""
    case = next(c for c in decode_step.op.cases if c.why.startswith("fp8: head 128, Qwen3"))
    launch = select("cuda", device, {"decode_step": "cuda"}).decode_step
    outcome = check_case(decode_step.op, launch, Rand(device, torch.float16, 0), case.sizes)
    assert outcome.error is None, outcome.error
