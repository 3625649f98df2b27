"""Tiny checkpoints of each quantised scheme of Hugging Face, value by value as documented.

Each function takes float32 weights by name and returns (tensors of the file, quantization_config of
config.json, the weights that they stand for).
"""

import json

import torch
from safetensors.torch import save_file
from tiny_models import huggingface_config

INT32 = torch.int32


def is_linear(name: str) -> bool:
    return "_proj.weight" in name


def words(values: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """int32 [rows, columns * bits / 32]: value order[i] of each 32 / bits goes to bits bits * i .."""
    count = 32 // bits
    order = order or range(count)
    rows, columns = values.shape
    packed = torch.zeros(rows, -(-columns // count), dtype=torch.int64)
    for column in range(packed.shape[1]):
        for i, at in enumerate(order):
            if column * count + at < columns:
                packed[:, column] |= values[:, column * count + at].long() << (bits * i)
    return (packed - ((packed >> 31) << 32)).to(INT32)  # as a signed word


def rounded(w: torch.Tensor, group: int, bits: int, symmetric: bool, dtype=torch.float16):
    """(value [n, k], scale [n, groups], zero [n, groups]): weight = scale * (value - zero), values from 0 if
    not symmetric."""
    by_group = w.unflatten(1, (-1, group))
    if symmetric:
        most = (1 << (bits - 1)) - 1
        scale = (by_group.abs().amax(-1) / most).to(dtype)
        value = (by_group / scale.float()[..., None]).round().clamp(-most - 1, most)
        return value.flatten(1).int(), scale, torch.zeros_like(scale).int()
    least, most = by_group.amin(-1), by_group.amax(-1)
    scale = ((most - least) / ((1 << bits) - 1)).to(dtype)
    zero = (-least / scale.float()).round().clamp(0, (1 << bits) - 1)
    value = (by_group / scale.float()[..., None]).round() + zero[..., None]
    return value.clamp(0, (1 << bits) - 1).flatten(1).int(), scale, zero.int()


def numbers(value, scale, zero) -> torch.Tensor:
    width = value.shape[1] // scale.shape[1]
    offset = value - zero.repeat_interleave(width, 1)
    return offset.float() * scale.float().repeat_interleave(width, 1)


def converted(weights, convert):
    """(file, stand for): convert(name without .weight, w) gives (tensors by their ending, the weights)."""
    file, means = {}, {}
    for name, w in weights.items():
        if is_linear(name):
            stem = name.removesuffix(".weight")
            tensors, means[name] = convert(stem, w)
            file |= {f"{stem}.{ending}": t.contiguous() for ending, t in tensors.items()}
        else:
            file[name] = means[name] = w
    return file, means


def awq(weights, group=128, **changes):
    def convert(stem, w):
        value, scale, zero = rounded(w, group, 4, symmetric=False)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words(value.T, 4, order), "qzeros": words(zero.T, 4, order), "scales": scale.T}
        return tensors, numbers(value, scale, zero)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return *converted(weights, convert), config | changes


def gptq(weights, group=128, sym=False, version="gptq", **changes):
    def convert(stem, w):
        value, scale, zero = rounded(w, group, 4, symmetric=sym)
        if sym:
            value, zero = value + 8, zero + 8
        else:  # a stored zero of -1 would not fit into four bits
            zero = zero.clamp(1)
        stored = zero - 1 if version == "gptq" else zero
        tensors = {
            "qweight": words(value, 4).T,
            "qzeros": words(stored.T, 4),
            "scales": scale.T,
            "g_idx": torch.arange(w.shape[1], dtype=INT32) // group,
        }
        return tensors, numbers(value, scale, zero)

    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": version,
    }
    return *converted(weights, convert), config | changes


def compressed(layout, weights_config, activations=None, **changes):
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights_config,
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | changes


def pack_quantized(weights, bits=4, group=128, symmetric=True, dtype=torch.float16, **changes):
    def convert(stem, w):
        value, scale, zero = rounded(w, group or w.shape[1], bits, symmetric, dtype)
        stored = value + (1 << (bits - 1)) if symmetric else value
        tensors = {
            "weight_packed": words(stored, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zero.T, bits).T
        return tensors, numbers(value, scale, zero)

    described = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    return *converted(weights, convert), compressed("pack-quantized", described | changes)


def int_quantized(weights):
    def convert(stem, w):
        value, scale, zero = rounded(w, w.shape[1], 8, True, torch.bfloat16)
        return {"weight": value.to(torch.int8), "weight_scale": scale}, numbers(value, scale, zero)

    described = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return *converted(weights, convert), compressed("int-quantized", described, activations)


def eight_bit_floats(w, rows: bool):
    scale = (w.abs().amax(1, keepdim=True) if rows else w.abs().amax().view(1, 1)) / 448
    value = (w / scale).to(torch.float8_e4m3fn)
    return value, scale, value.float() * scale


def float_quantized(weights, strategy="channel"):
    def convert(stem, w):
        value, scale, means = eight_bit_floats(w, strategy == "channel")
        return {"weight": value, "weight_scale": scale if strategy == "channel" else scale.view(1)}, means

    described = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    return *converted(weights, convert), compressed("float-quantized", described)


def fp8(weights, method="fbgemm_fp8", **changes):
    def convert(stem, w):
        value, scale, means = eight_bit_floats(w, method == "fbgemm_fp8")
        if method == "fbgemm_fp8":
            return {"weight": value, "weight_scale": scale}, means
        return {"weight": value, "weight_scale": scale.view(()), "input_scale": torch.tensor(0.5)}, means

    return *converted(weights, convert), {"quant_method": method} | changes


def fp8_blocks(weights, rows=128, columns=128, dtype=torch.float32):
    """As DeepSeek-V3 and Qwen3-FP8 are published: a scale for each block, weight = value * scale_inv."""

    def convert(stem, w):
        n, k = w.shape
        scale = torch.stack(
            [
                torch.stack([block.abs().amax() / 448 for block in some.split(columns, 1)])
                for some in w.split(rows)
            ]
        ).to(dtype)
        each = scale.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        value = (w / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": value, "weight_scale_inv": scale}, value.float() * each

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [rows, columns],
    }
    return *converted(weights, convert), config


def write(folder, config, file, quantization_config):
    folder.mkdir(exist_ok=True)
    settings = huggingface_config(config) | {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(file, folder / "model.safetensors")
    return str(folder)
