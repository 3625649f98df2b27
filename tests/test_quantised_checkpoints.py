"""Hugging Face checkpoints of each quantised scheme, written by hand to its documented layout: they keep the
format that holds them exactly, and give the logits of the numbers that they stand for."""

import json
from dataclasses import replace

import pytest
import quantised_checkpoints as made
import torch
from tiny_models import CONFIGS, reference_logits, tensors

from lab.dispatch import select
from lab.errors import LabError
from lab.model.decoder import Decoder
from lab.model.generate import teacher_forced_logits
from lab.model.sources import open_source
from lab.model.weight_formats import EXPANDED, storage_of
from lab.model.weights import load

CONFIG = replace(CONFIGS["qwen2"], hidden=256, intermediate=384, rope_theta=10000.0)
IDS = [5, 9, 200, 31, 7, 64]
SCHEMES = {  # name: (what writes it, the format of its matrices)
    "awq": (made.awq, "int4-g128-zero"),
    "gptq": (made.gptq, "int4-g128-zero"),
    "gptq_v2": (lambda w: made.gptq(w, version="gptq_v2"), "int4-g128-zero"),
    "gptq symmetric": (lambda w: made.gptq(w, sym=True), "int4-g128"),
    "gptq symmetric, groups of 32": (lambda w: made.gptq(w, 32, sym=True), "int4-g32"),
    "pack-quantized": (made.pack_quantized, "int4-g128"),
    "pack-quantized, scales in bf16": (lambda w: made.pack_quantized(w, dtype=torch.bfloat16), "int4-g128"),
    "pack-quantized, groups of 32": (lambda w: made.pack_quantized(w, group=32), "int4-g32"),
    "pack-quantized, asymmetric": (lambda w: made.pack_quantized(w, symmetric=False), "int4-g128-zero"),
    "pack-quantized, 8 bits": (lambda w: made.pack_quantized(w, 8, None), "int8"),
    "pack-quantized, 8 bits, groups of 32": (lambda w: made.pack_quantized(w, 8, 32), "int8-g32"),
    "int-quantized": (made.int_quantized, "int8"),
    "float-quantized": (made.float_quantized, "fp8"),
    "float-quantized, one scale": (lambda w: made.float_quantized(w, "tensor"), "fp8"),
    "fbgemm_fp8": (made.fp8, "fp8"),
    "fp8, blocks": (made.fp8_blocks, "fp8-g128"),
    "fp8, blocks with scales in bf16": (lambda w: made.fp8_blocks(w, dtype=torch.bfloat16), "fp8-g128"),
    "fp8, blocks of few rows": (lambda w: made.fp8_blocks(w, 48), "fp8-g128"),
    "fp8, one scale": (lambda w: made.fp8(w, "fp8", activation_scheme="static"), "fp8"),
}
# Schemes for whose groups there is no format: they are expanded, and that is said.
WITHOUT = {
    "awq, groups of 64": (lambda w: made.awq(w, 64), "AWQ of group 64"),
    "awq, groups of 32": (lambda w: made.awq(w, 32), "AWQ of group 32"),
    "gptq, groups of 64": (lambda w: made.gptq(w, 64), "GPTQ of group 64"),
    "8 bits, groups of 128": (
        lambda w: made.pack_quantized(w, 8, 128),
        "compressed-tensors pack-quantized int8 of group 128",
    ),
    "fp8, blocks of 64 columns": (lambda w: made.fp8_blocks(w, 128, 64), "FP8 of blocks of 128 x 64"),
    "4 bits, a scale for a row": (
        lambda w: made.pack_quantized(w, 4, None),
        "compressed-tensors pack-quantized int4",
    ),
}


def linear(weights):
    return {name: w for name, w in weights.items() if made.is_linear(name)}


def check_numbers(loaded, means):
    for index, layer in enumerate(loaded.layers):
        at = f"model.layers.{index}."
        want = {
            "wqkv": [f"self_attn.{x}_proj" for x in "qkv"],
            "wo": ["self_attn.o_proj"],
            "w_gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "w_down": ["mlp.down_proj"],
        }
        for part, names in want.items():
            got = torch.cat([one.data.to(loaded.dtype) for one in getattr(layer, part).apart()])
            assert torch.equal(got, torch.cat([means[f"{at}{name}.weight"] for name in names])), part


@pytest.mark.parametrize("name", SCHEMES)
def test_a_checkpoint_keeps_its_format_and_gives_the_logits_of_its_numbers(tmp_path, name, capsys):
    write, format = SCHEMES[name]
    file, means, config = write(tensors(CONFIG))
    path = made.write(tmp_path / "tiny", CONFIG, file, config)
    loaded = load(open_source(path))
    assert {matrix.format for matrix in loaded.matrices()} == {format}
    assert loaded.formats == f"{format}, lm_head fp32" and loaded.embed.format is None
    check_numbers(loaded, means)
    check_numbers(load(open_source(path), storage=EXPANDED), means)
    decoder = Decoder(loaded, select("torch", "cpu"), max_context=32)
    want = reference_logits(CONFIG, means, IDS).float()
    torch.testing.assert_close(teacher_forced_logits(decoder, IDS, 2), want[2:], rtol=1e-4, atol=1e-4)
    rounds = config.get("quant_method") in ("fbgemm_fp8", "fp8") or name == "int-quantized"
    said = capsys.readouterr().err
    assert ("activations too; they are not rounded here" in said) == rounds
    assert said.count("\n") == 2 * rounds  # each time that it was loaded


@pytest.mark.parametrize("name", WITHOUT)
def test_groups_without_a_format_are_expanded_and_that_is_said(tmp_path, name, capsys):
    write, says = WITHOUT[name]
    file, means, config = write(tensors(CONFIG))
    loaded = load(open_source(made.write(tmp_path / "tiny", CONFIG, file, config)))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 + ("activations" in said)
    assert f"expanded to fp32, for there is no weight format yet: {says} (14 tensors)" in said
    check_numbers(loaded, means)
    assert not loaded.packed


def test_what_a_checkpoint_leaves_unquantised_is_read_as_it_is(tmp_path, capsys):
    """modules_to_not_convert and ignore: the tensors themselves tell."""
    weights = tensors(CONFIG)
    file, means, config = made.awq(weights)
    for stem in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        for ending in ("qweight", "qzeros", "scales"):
            del file[f"{stem}.{ending}"]
        file[f"{stem}.weight"] = means[f"{stem}.weight"] = weights[f"{stem}.weight"]
    loaded = load(open_source(made.write(tmp_path / "tiny", CONFIG, file, config)))
    check_numbers(loaded, means)
    assert loaded.layers[0].w_down.format is None and loaded.layers[1].w_down.format == "int4-g128-zero"
    assert [m.format for m in loaded.layers[1].wqkv.apart()] == ["int4-g128-zero", None]
    assert capsys.readouterr().err == ""


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path):
    file, _, config = made.awq(tensors(CONFIG))
    path = made.write(tmp_path / "tiny", CONFIG, file, config)
    with pytest.raises(LabError, match="quantised already .AWQ of group 128.; leave out --quantise"):
        load(open_source(path), storage=storage_of(None, "fp8"))
    assert load(open_source(path), storage=storage_of("fp32", "fp8")).formats == "fp8, lm_head int8"


STEM = "model.layers.1.mlp.down_proj."


def first(file, ending, change):
    """Replaces a tensor of one matrix by change(it)."""
    file[STEM + ending] = change(file[STEM + ending].clone()).contiguous()


def at_zero(value):
    def change(t):
        t.view(-1)[0] = value
        return t

    return change


DAMAGE = {
    "a scale that is NaN": (
        made.awq,
        "scales",
        at_zero(torch.nan),
        r"down_proj.weight has scales that are NaN",
    ),
    "a scale whose largest weight is beyond float32": (
        made.fp8,
        "weight_scale",
        at_zero(3e38),
        r"down_proj.weight has a scale above 8e\+35",
    ),
    "a scale that is inf": (
        made.pack_quantized,
        "weight_scale",
        at_zero(torch.inf),
        "scales that are NaN or inf",
    ),
    "a scale of zero": (made.pack_quantized, "weight_scale", at_zero(0.0), "scales of zero for weights"),
    "codes of another size": (made.awq, "qweight", lambda t: t[:-1], r"qweight is \[383, 32\].* \[384, 32\]"),
    "too few groups": (made.awq, "scales", lambda t: t[:-1], r"scales is \[2, 256\].* \[3, 256\]"),
    "codes of another type": (
        made.gptq,
        "qweight",
        lambda t: t.long(),
        "qweight is torch.int64; torch.int32",
    ),
    "act-order": (made.gptq, "g_idx", lambda t: t.flip(0), "g_idx orders the inputs by activation"),
    "zeros that are not": (
        lambda w: made.gptq(w, sym=True),
        "qzeros",
        at_zero(0),
        "qzeros is not 8 throughout, although",
    ),
    "another shape": (
        made.pack_quantized,
        "weight_shape",
        lambda t: t.flip(0),
        r"weight_shape is \[384, 256\]",
    ),
    "NaN": (
        made.fp8,
        "weight",
        lambda t: at_zero(0x7F)(t.view(torch.uint8)).view(torch.float8_e4m3fn),
        "weight holds NaN",
    ),
    "a scale of a block that is NaN": (
        made.fp8_blocks,
        "weight_scale_inv",
        at_zero(torch.nan),
        r"down_proj.weight has scales that are NaN",
    ),
    "a scale of a block that is zero": (
        made.fp8_blocks,
        "weight_scale_inv",
        at_zero(0.0),
        "scales of zero for weights",
    ),
    "too few blocks": (
        made.fp8_blocks,
        "weight_scale_inv",
        lambda t: t[:1],
        r"weight_scale_inv is \[1, 3\].* \[2, 3\]",
    ),
    "floats where there are codes": (
        made.int_quantized,
        "weight",
        lambda t: t.float(),
        "weight is torch.float32",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_one_line(tmp_path, name):
    write, ending, change, says = DAMAGE[name]
    file, _, config = write(tensors(CONFIG))
    first(file, ending, change)
    path = made.write(tmp_path / "tiny", CONFIG, file, config)
    for storage in (storage_of(), EXPANDED):
        with pytest.raises(LabError, match=says) as caught:
            load(open_source(path), storage=storage)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "write, ending", [(made.awq, "qzeros"), (made.gptq, "scales"), (made.pack_quantized, "weight_shape")]
)
def test_a_tensor_that_is_missing_is_named(tmp_path, write, ending):
    file, _, config = write(tensors(CONFIG))
    del file[STEM + ending]
    with pytest.raises(LabError, match=f"tensor {STEM}{ending} is missing"):
        load(open_source(made.write(tmp_path / "tiny", CONFIG, file, config)))


def test_tensors_that_no_scheme_reads_are_refused(tmp_path):
    file, _, config = made.awq(tensors(CONFIG))
    file[STEM + "weight"] = torch.zeros(256, 384)  # beside its codes
    with pytest.raises(LabError, match="down_proj.weight in it belongs to no part"):
        load(open_source(made.write(tmp_path / "tiny", CONFIG, file, config)))


def test_scales_that_a_format_cannot_hold_are_said_with_what_helps(tmp_path):
    file, means, config = made.pack_quantized(tensors(CONFIG), dtype=torch.float32)
    path = made.write(tmp_path / "tiny", CONFIG, file, config)
    with pytest.raises(LabError, match="torch.float32 that int4-g128 cannot hold .*--weights-as bf16"):
        load(open_source(path))
    check_numbers(load(open_source(path), storage=EXPANDED), means)


def test_a_group_that_does_not_divide_the_columns_is_refused(tmp_path, capsys):
    file, _, config = made.awq(tensors(CONFIG))
    path = made.write(tmp_path / "tiny", CONFIG, file, config | {"group_size": 160})
    with pytest.raises(LabError, match="the group size 160 does not divide 256 columns"):
        load(open_source(path))
    assert capsys.readouterr().err == ""  # not that its matrices are expanded, either


W = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    "config, says",
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: awq"),
        ({"bits": 4}, "quant_method None is not supported"),
        ([4], "quantization_config must be an object"),
        ({"quant_method": "awq", "bits": 8}, "bits 8 is not supported; supported: 4"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False is not supported"),
        (made.awq({}, version="gemv")[2], "version 'gemv' is not supported; supported: 'gemm'"),
        (made.awq({}, group_size=-1)[2], "group_size -1 is not supported"),
        (made.awq({}, group_size="128")[2], "group_size is '128'; expected int"),
        (made.gptq({}, bits=3)[2], "bits 3 is not supported"),
        (made.gptq({}, checkpoint_format="marlin")[2], "checkpoint_format 'marlin' is not supported"),
        (made.gptq({}, format="gptq_v2")[2], "checkpoint_format 'gptq' and 'gptq_v2' is not supported"),
        (made.awq({}, format="gemv_fast")[2], "format 'gemv_fast' is not supported"),
        (made.gptq({}, dynamic={"-:lm_head": {}})[2], "dynamic .* is not supported"),
        (made.fp8({}, weight_block_size=[128, 128])[2], r"weight_block_size \[128, 128\] is not supported"),
        (
            made.fp8({}, "fp8", weight_block_size=[128])[2],
            r"weight_block_size \[128\] is not supported; it must",
        ),
        (made.fp8({}, "fp8", weight_block_size=[128, 0.5])[2], r"weight_block_size \[128, 0.5\] is not supp"),
        (
            made.fp8({}, "fp8", weight_block_size="128x128")[2],
            "weight_block_size is '128x128'; expected list",
        ),
        (made.fp8({}, "fp8", fmt="e5m2")[2], "fmt 'e5m2' is not supported"),
        (made.compressed("marlin-24", W), "format 'marlin-24' of int4 is not supported"),
        (made.compressed("float-quantized", W), "format 'float-quantized' of int4 is not supported"),
        (made.compressed("pack-quantized", W | {"num_bits": 3}), "num_bits 3 is not supported"),
        (made.compressed("pack-quantized", W | {"actorder": "column"}), "actorder 'column' is not supported"),
        (made.compressed("pack-quantized", W | {"strategy": "block"}), "strategy 'block' is not supported"),
        (made.compressed("pack-quantized", W, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (made.compressed("pack-quantized", W, transform_config={"u": 1}), "transform_config"),
        (made.compressed("pack-quantized", W, config_groups={}), "one scheme for all weights"),
        (
            made.compressed("pack-quantized", W, config_groups={"a": {"weights": W}, "b": {"weights": {}}}),
            "one scheme",
        ),
        (made.compressed("pack-quantized", W, quantization_status="frozen"), "quantization_status 'frozen'"),
    ],
)
def test_unknown_schemes_and_settings_are_one_line(tmp_path, config, says):
    path = made.write(tmp_path / "tiny", CONFIG, tensors(CONFIG), config)
    with pytest.raises(LabError, match=says) as caught:
        open_source(path)
    assert "\n" not in str(caught.value) and "config.json: quantization_config" in str(caught.value)


def test_act_order_without_its_order_is_refused(tmp_path):
    file, _, config = made.gptq(tensors(CONFIG), desc_act=True)
    load(open_source(made.write(tmp_path / "kept", CONFIG, file, config)))  # its order is that of the inputs
    file = {name: t for name, t in file.items() if not name.endswith("g_idx")}
    with pytest.raises(LabError, match="g_idx is missing, although the checkpoint says"):
        load(open_source(made.write(tmp_path / "lost", CONFIG, file, config)))


@pytest.mark.parametrize(
    "order, needed",
    [("group", True), ("dynamic", True), (True, True)]
    + [("weight", False), ("static", False), (False, False)],
)
def test_act_order_of_compressed_tensors_needs_its_order_where_it_says_so(tmp_path, order, needed):
    file, means, config = made.pack_quantized(tensors(CONFIG), actorder=order)
    path = made.write(tmp_path / "lost", CONFIG, file, config)
    if needed:
        with pytest.raises(LabError, match="weight_g_idx is missing, although the checkpoint says"):
            load(open_source(path))
        for name, words in list(file.items()):
            if name.endswith("weight_packed"):
                order = torch.arange(words.shape[1] * 8, dtype=torch.int32) // 128  # that of the inputs
                file[name.replace("weight_packed", "weight_g_idx")] = order
        path = made.write(tmp_path / "kept", CONFIG, file, config)
    check_numbers(load(open_source(path)), means)


def test_rounded_outputs_that_a_checkpoint_asks_for_are_said(tmp_path, capsys):
    file, means, config = made.float_quantized(tensors(CONFIG))
    config["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8, "type": "float"}
    check_numbers(load(open_source(made.write(tmp_path / "tiny", CONFIG, file, config))), means)
    assert "rounded activations too; they are not rounded here" in capsys.readouterr().err


def test_an_older_name_of_the_config_is_read_too(tmp_path):
    file, means, config = made.pack_quantized(tensors(CONFIG))
    path = made.write(tmp_path / "tiny", CONFIG, file, config)
    settings = json.loads((tmp_path / "tiny" / "config.json").read_text())
    settings["compression_config"] = settings.pop("quantization_config")
    del settings["compression_config"]["quant_method"]
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(settings))
    check_numbers(load(open_source(path)), means)
