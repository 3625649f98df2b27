"""Quantised checkpoints of Hugging Face: what the quantization_config of config.json says, and the tensors in
which each scheme stores a matrix W [n, k], in the place of the tensor NAME.weight.

AWQ (AutoAWQ, version gemm)      W[n, k] = scales[g, n] * (qweight[k, n] - qzeros[g, n])      g = k / group
    qweight int32 [k, n / 8], qzeros int32 [groups, n / 8]: eight outputs of four bits in a word, output 8 c +
    (0, 2, 4, 6, 1, 3, 5, 7)[i] in bits 4 i ..; scales [groups, n]
GPTQ (AutoGPTQ, GPTQModel)       W[n, k] = scales[g, n] * (qweight[k, n] - qzeros[g, n])
    qweight int32 [k / 8, n]: inputs 8 r + i in bits 4 i ..; qzeros int32 [groups, n / 8]: outputs 8 c + i in
    bits 4 i .., stored less one unless checkpoint_format is gptq_v2; scales [groups, n]; g_idx int32 [k], the
    group of each input, which must be k / group
compressed-tensors               W[n, k] = weight_scale[n, g] * (code[n, k] - zero[n, g])
    pack-quantized    weight_packed int32 [n, k bits / 32]: value + 2^(bits - 1), value i of a word in bits
                      bits * i ..; weight_zero_point int32 [n bits / 32, groups], packed by rows in the same
                      way; weight_shape [2]: n, k
    int-quantized     weight int8 [n, k]
    float-quantized   weight float8_e4m3fn [n, k]
    kv_cache_scheme   of fp8 with one scale: self_attn.k_scale and v_scale [1] of each layer, of its keys and
                      values: number = scale * float8_e4m3fn
fp8, fbgemm_fp8                  W[n, k] = weight_scale[n] * weight[n, k], float8_e4m3fn; one scale a row, or
    one for all
fp8 with weight_block_size       W[n, k] = weight_scale_inv[n / 128, k / 128] * weight[n, k], float8_e4m3fn: a
    scale for a block of (for example) 128 x 128; the last blocks may have fewer rows
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lab.errors import LabError
from lab.formats import FORMATS, PackedMatrix
from lab.model.sources.store import check_scales
from lab.model.unsupported import quoted

AWQ_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word the code of output 8 c + i is
# (kind of code, columns that share a scale or None for a row, has a zero) -> the format that holds it exactly
FORMAT_OF = {
    ("int4", 32, False): "int4-g32",
    ("int4", 128, False): "int4-g128",
    ("int4", 128, True): "int4-g128-zero",
    ("int8", 32, False): "int8-g32",
    ("int8", None, False): "int8",
    ("fp8", None, False): "fp8",
    ("fp8", 128, False): "fp8-g128",
}


@dataclass
class Codes:
    """A matrix as a checkpoint stores it.

    codes uint8 [n, k]: of int4 value + 8, or the unsigned value where there is a zero; otherwise the bits of
    the number. scales and zeros, those of unsigned values, float [n, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint stores the matrices that it quantises."""

    type: str  # for users
    kind: str  # int4, int8 or fp8
    group: int | None  # columns that share a scale; None: a row
    has_zero: bool
    marker: str  # NAME.marker is there for each matrix that is quantised
    read: Callable[[_Tensors, Scheme], Codes]
    note: str | None = None  # what is computed in another way than the checkpoint asks for
    kv_scales: bool = False  # whether there are scales for keys and values in fp8

    @property
    def format(self) -> str | None:
        return FORMAT_OF.get((self.kind, self.group, self.has_zero))

    def groups(self, k: int) -> int:
        return 1 if self.group is None else k // self.group


class _Tensors:
    """The tensors of one matrix; get() checks their dtype and shape."""

    def __init__(self, stem: str, shape: tuple[int, int], where: str, find: Callable):
        self.stem, self.shape, self.where, self.find = stem, shape, where, find

    def refuse(self, ending: str, why: str):
        raise LabError(f"{self.where}: tensor {self.stem}.{ending} {why}")

    def get(self, ending: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...], optional=False):
        """The tensor of one of the dtypes and shapes; None where it is optional and not there."""
        found = self.find(f"{self.stem}.{ending}")
        if found is None:
            return None if optional else self.refuse(ending, "is missing")
        if found.dtype not in dtypes:
            self.refuse(ending, f"is {found.dtype}; {' or '.join(map(str, dtypes))} is needed")
        if tuple(found.shape) not in shapes:
            self.refuse(ending, f"is {list(found.shape)}; this scheme and model ask for {list(shapes[0])}")
        return found


SCALES = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


def values_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns * 32 / bits] of int32 [rows, columns]: value i of a word in bits bits * i .."""
    by_byte = words.contiguous().view(torch.uint8)
    return by_byte if bits == 8 else torch.stack((by_byte & 15, by_byte >> 4), -1).flatten(-2)


def require_order(t: _Tensors, ending: str, groups: int, ordered: bool) -> None:
    """Raises LabError where the tensor that says the group of each input has another order than that of the
    inputs, or is missing although the checkpoint calls its inputs ordered."""
    k = t.shape[1]
    found = t.get(ending, WORDS, (k,), optional=True)
    if found is None and ordered:
        t.refuse(ending, "is missing, although the checkpoint says that its inputs are ordered (act-order)")
    if found is not None and not torch.equal(found, torch.arange(k, dtype=torch.int32) // (k // groups)):
        t.refuse(ending, "orders the inputs by activation (act-order), which is not supported")


def read_awq(t: _Tensors, scheme: Scheme) -> Codes:
    n, k = t.shape
    groups = scheme.groups(k)

    def by_output(words):
        return values_of(words, 4).unflatten(-1, (-1, 8))[..., AWQ_COLUMN].flatten(-2).T

    codes = by_output(t.get("qweight", WORDS, (k, n // 8)))
    zeros = by_output(t.get("qzeros", WORDS, (groups, n // 8)))
    return Codes(codes, t.get("scales", SCALES, (groups, n)).T, zeros)


def read_gptq(t: _Tensors, scheme: Scheme, stored_less: int, ordered: bool) -> Codes:
    """stored_less: what must be added to the zeros that are stored. ordered: whether g_idx must be there."""
    n, k = t.shape
    groups = scheme.groups(k)
    require_order(t, "g_idx", groups, ordered)
    codes = values_of(t.get("qweight", WORDS, (k // 8, n)).T, 4)
    zeros = values_of(t.get("qzeros", WORDS, (groups, n // 8)), 4).T.float() + stored_less
    scales = t.get("scales", SCALES, (groups, n)).T
    if not scheme.has_zero:
        if not bool((zeros == 8).all()):
            t.refuse("qzeros", "is not 8 throughout, although the checkpoint calls itself symmetric")
        zeros = None
    return Codes(codes, scales, zeros)


def read_packed(t: _Tensors, scheme: Scheme, ordered: bool = False) -> Codes:
    """ordered: whether weight_g_idx must be there."""
    n, k = t.shape
    bits = 4 if scheme.kind == "int4" else 8
    groups = scheme.groups(k)
    shape = t.get("weight_shape", (torch.int64, torch.int32), (2,))
    if shape.tolist() != [n, k]:
        t.refuse("weight_shape", f"is {shape.tolist()}; the model's shape asks for {[n, k]}")
    codes = values_of(t.get("weight_packed", WORDS, (n, -(-k * bits // 32))), bits)[:, :k]
    scales = t.get("weight_scale", SCALES, (n, groups))
    if bits == 8:
        codes = codes ^ 128  # of value + 128, the bits of the signed byte
    zeros = None
    if scheme.has_zero:
        packed = t.get("weight_zero_point", WORDS, (-(-n * bits // 32), groups))
        zeros = values_of(packed.T, bits).T[:n]
    require_order(t, "weight_g_idx", groups, ordered)
    return Codes(codes, scales, zeros)


def read_unpacked(t: _Tensors, scheme: Scheme) -> Codes:
    n, k = t.shape
    dtype = torch.int8 if scheme.kind == "int8" else torch.float8_e4m3fn
    weight = t.get("weight", (dtype,), (n, k))
    shapes = ((n, scheme.groups(k)), (n,), (1,), ()) if scheme.group is None else ((n, scheme.groups(k)),)
    scales = t.get("weight_scale", SCALES, *shapes)
    for ending in ("input_scale", "input_zero_point"):  # of activations, which are kept: see Scheme.note
        t.find(f"{t.stem}.{ending}")
    zeros = t.find(f"{t.stem}.weight_zero_point")
    if zeros is not None and bool((zeros != 0).any()):
        t.refuse("weight_zero_point", "is not 0 throughout, although the checkpoint calls itself symmetric")
    if scheme.kind == "fp8":
        refuse_nan(t, weight)
    return Codes(weight.view(torch.uint8), scales.reshape(-1, scheme.groups(k)).expand(n, -1))


def read_blocks(t: _Tensors, scheme: Scheme, rows: int) -> Codes:
    """rows: of a block that shares a scale; its columns are scheme.group."""
    n, k = t.shape
    weight = t.get("weight", (torch.float8_e4m3fn,), (n, k))
    scales = t.get("weight_scale_inv", SCALES, (-(-n // rows), scheme.groups(k)))
    t.find(f"{t.stem}.input_scale")  # of activations, which are kept: see Scheme.note
    refuse_nan(t, weight)
    return Codes(weight.view(torch.uint8), scales.repeat_interleave(rows, 0)[:n])


def refuse_nan(t: _Tensors, weight: torch.Tensor) -> None:
    """Raises LabError where a float8_e4m3fn is NaN."""
    if bool((weight.view(torch.uint8) & 127 == 127).any()):
        t.refuse("weight", "holds NaN; the file is mangled")


# --- what a config.json says ---


class _Config:
    """A quantization_config, or a part of it; get() checks the type of a value."""

    def __init__(self, values, where: str):
        if not isinstance(values, Mapping):
            raise LabError(f"{where} must be an object")
        self.values, self.where = values, where

    def get(self, key: str, kind, default=...):
        value = self.values.get(key)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            wanted = "an object" if kind is Mapping else kind.__name__
            raise LabError(f"{self.where}: {key} is {quoted(value)}; expected {wanted}")
        return value

    def require(self, key: str, kind, *wanted, default=...):
        value = self.get(key, kind, default)
        if value not in wanted:
            listed = " or ".join(map(quoted, wanted))
            raise LabError(f"{self.where}: {key} {quoted(value)} is not supported; supported: {listed}")
        return value

    def refuse(self, *keys: str) -> None:
        """Raises LabError where one of these is set: each changes what the tensors mean."""
        for key in keys:
            if self.values.get(key):
                raise LabError(f"{self.where}: {key} {quoted(self.values[key])} is not supported")

    def group(self, key: str = "group_size") -> int:
        size = self.get(key, int)
        if size < 1 or size % 8:
            raise LabError(f"{self.where}: {key} {size} is not supported; it must be a multiple of 8")
        return size


def _awq(config: _Config) -> Scheme:
    config.require("bits", int, 4)
    config.require("zero_point", bool, True)
    for key in ("version", "format", "checkpoint_format"):  # of AutoAWQ, and of GPTQModel
        config.require(key, str, "gemm", "GEMM", default="gemm")
    group = config.group()
    return Scheme(f"AWQ of group {group}", "int4", group, True, "qweight", read_awq)


def _gptq(config: _Config) -> Scheme:
    config.require("bits", int, 4)
    config.refuse("dynamic", "is_marlin_format")
    given = {config.get(key, str, None) for key in ("checkpoint_format", "format")} - {None}
    if not given <= {"gptq", "gptq_v2"} or len(given) > 1:
        raise LabError(
            f"{config.where}: checkpoint_format {' and '.join(sorted(map(quoted, given)))} is not supported; "
            "supported: 'gptq' or 'gptq_v2'"
        )
    layout = given.pop() if given else "gptq"
    group, symmetric = config.group(), config.get("sym", bool, False)

    ordered = config.get("desc_act", bool, False)

    def read(tensors, scheme):
        return read_gptq(tensors, scheme, 1 if layout == "gptq" else 0, ordered)

    return Scheme(f"GPTQ of group {group}", "int4", group, not symmetric, "qweight", read)


def _compressed_tensors(config: _Config) -> Scheme:
    config.require("quantization_status", str, "compressed", default="compressed")
    kv_scales = _kv_scales(config)
    for key in ("sparsity_config", "transform_config"):
        inner = _Config(config.get(key, Mapping, {}), f"{config.where}: {key}")
        if inner.values and inner.values.get("format") != "dense":
            config.refuse(key)
    groups = list(config.get("config_groups", Mapping).values())
    parts = [_Config(group, f"{config.where}: config_groups") for group in groups]
    weights = [part.get("weights", Mapping) for part in parts]
    if not weights or any(other != weights[0] for other in weights):
        raise LabError(f"{config.where}: config_groups must be one scheme for all weights")
    w = _Config(weights[0], f"{config.where}: config_groups: weights")
    layouts = {part.get("format", str, None) or config.get("format", str) for part in parts}
    layout = layouts.pop() if len(layouts) == 1 else "mixed-precision"
    kind = f"{w.require('type', str, 'int', 'float')}{w.require('num_bits', int, 4, 8)}"
    supported = {
        ("pack-quantized", "int4"): ("weight_packed", read_packed),
        ("pack-quantized", "int8"): ("weight_packed", read_packed),
        ("int-quantized", "int8"): ("weight_scale", read_unpacked),
        ("float-quantized", "float8"): ("weight_scale", read_unpacked),
        ("naive-quantized", "int8"): ("weight_scale", read_unpacked),
        ("naive-quantized", "float8"): ("weight_scale", read_unpacked),
    }
    if (layout, kind) not in supported:
        raise LabError(
            f"{config.where}: format {quoted(layout)} of {kind} is not supported; supported: "
            + ", ".join(f"{name} of {one}" for name, one in supported)
        )
    marker, read = supported[layout, kind]
    if read is read_packed and _orders_inputs(w):
        read = functools.partial(read_packed, ordered=True)
    symmetric = w.get("symmetric", bool, True)
    if not symmetric and kind != "int4":
        raise LabError(f"{w.where}: symmetric false is not supported in {kind}")
    w.refuse("block_structure", "dynamic")
    strategy = w.require("strategy", str, "group", "channel", "tensor")
    if strategy == "tensor" and layout == "pack-quantized":
        raise LabError(f"{w.where}: strategy 'tensor' is not supported in {layout}")
    group = w.group() if strategy == "group" else None
    rounds = any(part.values.get(f"{end}_activations") for part in parts for end in ("input", "output"))
    notes = [ACTIVATIONS] * rounds + [KV_SCALES] * kv_scales
    return Scheme(
        f"compressed-tensors {layout} {kind}" + (f" of group {group}" if group else ""),
        "fp8" if kind == "float8" else kind,
        group,
        not symmetric,
        marker,
        read,
        "; ".join(notes) or None,
        kv_scales,
    )


def _orders_inputs(weights: _Config) -> bool:
    """Whether actorder says that weight_g_idx gives the group of each input. With "weight" (or "static") the
    order only mattered while the weights were rounded."""
    order = weights.values.get("actorder")
    if not (order is None or isinstance(order, bool)):
        weights.require("actorder", str, "group", "dynamic", "weight", "static")
    return order in (True, "group", "dynamic")


ACTIVATIONS = (
    "the checkpoint asks for rounded activations too; they are not rounded here, which is more exact"
)
KV_SCALES = "the checkpoint's scales for keys and values in fp8 are used with --kv-dtype fp8"


def _kv_scales(config: _Config) -> bool:
    """Whether the checkpoint has scales for keys and values in fp8, one for a layer's K and one for its V."""
    scheme = config.get("kv_cache_scheme", Mapping, None)
    if scheme is None:
        return False
    kv = _Config(scheme, f"{config.where}: kv_cache_scheme")
    kv.require("type", str, "float")
    kv.require("num_bits", int, 8)
    kv.require("strategy", str, "tensor", default="tensor")
    kv.require("symmetric", bool, True, default=True)
    kv.refuse("dynamic")
    return True


def _fp8(config: _Config) -> Scheme:
    config.require("fmt", str, "e4m3", default="e4m3")
    block = config.get("weight_block_size", list, None)
    if block is None:
        return Scheme("FP8", "fp8", None, False, "weight_scale", read_unpacked, ACTIVATIONS)
    if len(block) != 2 or not all(type(size) is int and size >= 1 for size in block) or block[1] % 8:
        raise LabError(
            f"{config.where}: weight_block_size {quoted(block)} is not supported; it must be two numbers, "
            "rows and columns, the columns a multiple of 8"
        )
    rows, columns = block
    return Scheme(
        f"FP8 of blocks of {rows} x {columns}",
        "fp8",
        columns,
        False,
        "weight_scale_inv",
        lambda tensors, scheme: read_blocks(tensors, scheme, rows),
        ACTIVATIONS,
    )


def _fbgemm_fp8(config: _Config) -> Scheme:
    config.refuse("weight_block_size")
    return _fp8(config)


METHODS = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
}


def scheme_of(settings: Mapping, where: str) -> Scheme | None:
    """The scheme of a config.json, None for a checkpoint of plain numbers. Raises LabError for one that is
    not known, and for a setting of it that is not supported. A group for which no weight format exists is
    no error: its matrices are expanded."""
    given = settings.get("quantization_config") or settings.get("compression_config")
    if not given:
        return None
    where = f"{where}: quantization_config"
    config = _Config(given, where)
    method = given.get("quant_method", "compressed-tensors" if "config_groups" in given else None)
    if not isinstance(method, str) or method not in METHODS:
        raise LabError(
            f"{where}: quant_method {quoted(method)} is not supported; supported: {', '.join(METHODS)}"
        )
    return METHODS[method](config)


# --- one matrix ---


def read(scheme: Scheme, stem: str, shape: tuple[int, int], where: str, find: Callable) -> Codes:
    """The matrix NAME.weight [n, k] of a checkpoint, stem: NAME. find(name): the tensor of that name in the
    file, or None.

    Raises LabError for a tensor that is missing or of another shape or dtype, and for scales that are not
    numbers, or zero where the weights are not.
    """
    n, k = shape
    if scheme.group is not None and k % scheme.group:
        raise LabError(f"{where}: {stem}.weight: the group size {scheme.group} does not divide {k} columns")
    if scheme.marker == "qweight" and n % 8:
        raise LabError(f"{where}: {stem}.weight: {n} rows are no multiple of 8, as {scheme.type} needs them")
    found = scheme.read(_Tensors(stem, shape, where, find), scheme)
    check_scales(found.scales, f"{stem}.weight", where)
    zero = found.scales == 0
    if bool(zero.any()):
        there = (_offset(scheme, found) != 0).unflatten(1, (scheme.groups(k), -1)).any(-1)
        if bool((zero & there).any()):
            raise LabError(
                f"{where}: tensor {stem}.weight has scales of zero for weights that are not; the file is "
                "mangled"
            )
    return found


def _offset(scheme: Scheme, found: Codes) -> torch.Tensor:
    """float32 [n, k]: the weights before the scale."""
    if scheme.kind == "fp8":
        return found.codes.view(torch.float8_e4m3fn).float()
    if scheme.kind == "int8":
        return found.codes.view(torch.int8).float()
    if found.zeros is None:
        return found.codes.float() - 8
    width = found.codes.shape[1] // found.zeros.shape[1]
    return found.codes.float() - found.zeros.float().repeat_interleave(width, 1)


def expanded(scheme: Scheme, found: Codes) -> torch.Tensor:
    """The weights in float32 [n, k]."""
    width = found.codes.shape[1] // found.scales.shape[1]
    return _offset(scheme, found) * found.scales.float().repeat_interleave(width, 1)


def packed(scheme: Scheme, found: Codes, stem: str, where: str) -> PackedMatrix:
    """The same in the scheme's format. Raises LabError where the format's scales cannot hold those of the
    file exactly."""
    format = FORMATS[scheme.format]
    scales = found.scales.to(format.scale_dtype)
    if not torch.equal(scales.double(), found.scales.double()):
        raise LabError(
            f"{where}: {stem}.weight has scales in {found.scales.dtype} that {format.name} cannot hold in "
            f"{format.scale_dtype}: use --weights-as bf16"
        )
    entries = [scales] if found.zeros is None else [scales, found.zeros.to(format.scale_dtype)]
    return format.from_codes(found.codes, torch.stack(entries, -1))
