"""Scales for keys and values in fp8 that a compressed-tensors checkpoint holds: --kv-dtype fp8 uses them."""

import pytest
import quantised_checkpoints as made
import torch
from tiny_models import CONFIGS, tensors

from lab.dispatch import select
from lab.errors import LabError
from lab.formats import kv
from lab.model.decoder import Decoder
from lab.model.sources import open_source
from lab.model.weights import load

CONFIG = CONFIGS["qwen2"]
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
SCALES = [(0.01, 0.02), (0.03, 0.0025)]


def checkpoint(folder, changes=None, scheme=SCHEME):
    file, _, config = made.float_quantized(tensors(CONFIG))
    for layer, pair in enumerate(SCALES):
        for kind, scale in zip("kv", pair):
            file[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([scale])
    for name, value in (changes or {}).items():
        if value is None:
            del file[name]
        else:
            file[name] = value
    return made.write(folder / "tiny", CONFIG, file, config | {"kv_cache_scheme": scheme})


def test_the_cache_has_the_scales_of_the_checkpoint(tmp_path, capsys):
    weights = load(open_source(checkpoint(tmp_path)))
    assert "scales for keys and values in fp8 are used with --kv-dtype fp8" in capsys.readouterr().err
    decoders = {
        kv_dtype: Decoder(weights, select("torch", "cpu"), max_context=32, kv_dtype=kv_dtype)
        for kv_dtype in (None, "fp8", "int8")
    }
    assert decoders[None].cache.k_scales is None
    cache = decoders["fp8"].cache
    assert torch.equal(cache.k_scales[:, 0], torch.tensor([k for k, _ in SCALES]))
    assert torch.equal(cache.v_scales[:, 0], torch.tensor([v for _, v in SCALES]))
    for decoder in decoders.values():
        decoder.admit(0, [5, 9, 200, 31])
    plain, (page, row) = decoders[None].cache, cache.slots(0, 0, 3)
    # Layer 0 alone: what follows has read its codes.
    for (codes, scale), (numbers, _) in zip(cache.of_layer(0), plain.of_layer(0)):
        want, _ = kv.quantise(numbers[page, :, row], "fp8", scale)
        assert torch.equal(codes[page, :, row], want) and codes.any()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model.layers.1.self_attn.v_scale": None}, "self_attn.v_scale is in none of the safetensors files"),
        ({"model.layers.1.self_attn.v_scale": torch.tensor([0.0])}, "v_scale is 0; a scale must be positive"),
        ({"model.layers.1.self_attn.k_scale": torch.tensor([torch.nan])}, "k_scale has scales that are NaN"),
        (
            {"model.layers.1.self_attn.k_scale": torch.tensor([1e-45])},
            "k_scale is 1.*e-45; .* cut off at its largest code",
        ),
        ({"model.layers.1.self_attn.v_scale": torch.tensor([1e30])}, r"v_scale is 1e\+30; .* would become 0"),
        ({"model.layers.1.self_attn.k_scale": torch.ones(2)}, "k_scale must be one floating-point number"),
        (
            {"model.layers.1.self_attn.k_scale": torch.tensor([1e300], dtype=torch.float64)},
            "k_scale must be .* torch.float64",
        ),
        (
            {"model.layers.1.self_attn.k_scale": torch.ones(1).to(torch.float8_e4m3fn)},
            "k_scale must be .* torch.float8_e4m3fn",
        ),
        ({"model.layers.0.self_attn.k_zero_point": torch.ones(1)}, "k_zero_point in it belongs to no part"),
    ],
)
def test_scales_that_are_none_are_one_line(tmp_path, changes, says):
    with pytest.raises(LabError, match=says) as caught:
        load(open_source(checkpoint(tmp_path, changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_bits": 4}, "num_bits 4 is not supported"),
        ({"type": "int"}, "type 'int' is not supported"),
        ({"strategy": "attn_head"}, "strategy 'attn_head' is not supported"),
        ({"symmetric": False}, "symmetric False is not supported"),
        ({"dynamic": True}, "dynamic True is not supported"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, change, says):
    with pytest.raises(LabError, match=f"kv_cache_scheme: {says}"):
        open_source(checkpoint(tmp_path, scheme=SCHEME | change))


def test_scales_without_a_scheme_are_refused(tmp_path):
    with pytest.raises(LabError, match="self_attn.k_scale, .* belongs to no part"):
        load(open_source(checkpoint(tmp_path, scheme=None)))
