"""Weights, shape and tokenizer from a GGUF file
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from lab.errors import LabError, Unavailable, named
from lab.files import regular_file
from lab.formats import FORMATS, PackedMatrix, q4_k, q6_k
from lab.model.config import from_gguf, with_held_biases
from lab.model.families import FAMILIES, Family
from lab.model.sources.store import Stored, check_scales, check_shape, store

try:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
    from gguf.quants import dequantize
except ImportError as error:
    raise Unavailable(
        f"reading GGUF files needs the package gguf ({error}): run `pip install gguf`"
    ) from None

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MOST_ENTRIES = 20000
CONVERTED_AT_ONCE = 1 << 24  # weights
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


# Types of numbers, and the weight format that holds a quantised type exactly.
PLAIN = {"F64", "F32", "F16", "BF16"}
FORMAT_OF = {"Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32-min", "Q4_K": "q4_k", "Q6_K": "q6_k"}


def gguf_name(family: Family, name: str) -> str:
    """The GGUF name of a tensor named as Hugging Face names it, in a file of the family."""
    stem, _, kind = name.rpartition(".")
    if stem in OTHER_NAMES:
        return f"{OTHER_NAMES[stem]}.{kind}"
    _, _, index, stem = stem.split(".", 3)
    return f"blk.{index}.{family.gguf_names.get(stem) or LAYER_NAMES[stem]}.{kind}"


class _Reader(GGUFReader):
    """GGUFReader that refuses to read past the end, and keeps an array as one part of its field.

    The stock one gives short arrays, loops over a mangled count, and makes an object of every item of an
    array, which takes 10 microseconds and 400 bytes each.
    """

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays, which no model's file has")
        if item == GGUFValueType.STRING:
            order = ">" if self.byte_order == "S" else "<"
            values = self._get(start, np.uint8, _strings_size(self.data, start, count, order))
        else:
            values = self._get(start, self.gguf_scalar_to_np[item], count)
        return 12 + values.nbytes, [values], [0], [GGUFValueType.ARRAY, item]

    def _build_fields(self, offs, count):
        return super()._build_fields(offs, _plausible(count, "metadata entries"))

    def _build_tensor_info(self, offs, count):
        return super()._build_tensor_info(offs, _plausible(count, "tensors"))

    def _get(self, offset, dtype, count=1, override_order=None):
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.nbytes:
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)


def _plausible(count: int, things: str) -> int:
    """`count`, where the parser can afford it: real files have under 100 entries and 2,000 tensors."""
    if count > MOST_ENTRIES:
        raise ValueError(f"it claims {count} {things}; at most {MOST_ENTRIES} are read")
    return count


def _strings_size(data: np.ndarray, start: int, count: int, order: str) -> int:
    """The bytes that `count` strings take from `start` on: each is its length in 8 bytes, then its UTF-8."""
    if count > (data.nbytes - start) // 8:
        raise ValueError("it ends too early")
    length, at, end = struct.Struct(order + "Q").unpack_from, start, data.nbytes - 8
    buffer = memoryview(data)
    for _ in range(count):
        if at > end:
            raise ValueError("it ends too early")
        at += 8 + length(buffer, at)[0]
    return at - start


def _strings(data: np.ndarray) -> list[str]:
    """The strings that fill `data`, laid out as `_strings_size` says."""
    length, at, raw, found = struct.Struct("<Q").unpack_from, 0, data.tobytes(), []
    while at < len(raw):
        end = at + 8 + length(raw, at)[0]
        found.append(raw[at + 8 : end].decode("utf-8"))
        at = end
    return found


class GGUFSource:
    """A source (see lab/model/sources/__init__.py). Raises LabError for a file that it cannot read."""

    def __init__(self, path: Path):
        self.path, self.name, self.where = Path(path), Path(path).stem, f"GGUF file {path}"
        regular_file(self.path)
        try:
            self.reader = _Reader(self.path)
            scalars = {
                key: field.contents()
                for key, field in self.reader.fields.items()
                if field.types and field.types[0] != GGUFValueType.ARRAY
            }
            self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
            self.shapes = {
                name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()
            }
        except OSError as error:
            raise LabError(f"{self.where} cannot be read: {error.strerror}") from error
        except Exception as error:  # the parser raises whatever it trips over: all of it means a bad file
            raise LabError(f"{self.where} is truncated or mangled: {_first_line(error)}") from error
        if self.reader.byte_order != "I":
            raise LabError(f"{self.where} is of the other byte order; convert it on a machine of that order")
        if scalars.get("split.count", 1) not in (0, 1):
            raise LabError(
                f"{self.where} is one part of a split model; merge the parts with llama-gguf-split --merge"
            )
        self.scalars = scalars
        freqs = None
        if "rope_freqs.weight" in self.tensors:
            shape = self.shapes["rope_freqs.weight"]
            if len(shape) != 1 or shape[0] > 4096:  # before its values become a list
                raise LabError(
                    f"{self.where}: tensor rope_freqs.weight is {list(shape)}; expected [head_dim/2]"
                )
            freqs = tuple(self._dequantize("rope_freqs.weight").tolist())
        architecture = f"{scalars.get('general.architecture')}."
        layered = {
            key: self.array(key)
            for key in self.reader.fields
            if key.startswith(architecture) and key not in scalars
        }
        config = from_gguf(scalars | layered, self.shapes, freqs, self.name, self.where)
        self.family = FAMILIES[config.architecture]
        self.config = with_held_biases(config, self.family.biases, self.tensors, self._stored, self.where)
        self.asked, self.notes = {"rope_freqs.weight"}, ()

    def array(self, key: str) -> list | None:
        """The values of an array in the metadata; None where there is none of that name."""
        field = self.reader.fields.get(key)
        if field is None:
            return None
        if field.types[0] != GGUFValueType.ARRAY:
            raise LabError(f"{self.where}: {named(key)} is no array")
        try:
            values = field.parts[field.data[0]]
            return _strings(values) if field.types[1] == GGUFValueType.STRING else values.tolist()
        except Exception as error:
            raise LabError(f"{self.where}: {named(key)} is mangled: {_first_line(error)}") from error

    def _stored(self, name: str) -> str:
        return gguf_name(self.family, name)

    def holds(self, name: str) -> bool:
        return self._stored(name) in self.tensors

    def unread(self) -> list[str]:
        return sorted(self.tensors.keys() - self.asked)

    def stored(self, name: str) -> Stored:
        kind = GGMLQuantizationType(self.tensors[self._found(name)].tensor_type).name
        return Stored(kind, kind not in PLAIN, FORMAT_OF.get(kind))

    def fill(self, name: str, out: torch.Tensor) -> None:
        stored = self._asked(name, out.shape)
        values = self._rows_in_order(name, torch.from_numpy(self._dequantize(stored)))
        store(values, out, stored, self.where)

    def packed(self, name: str, shape: tuple[int, int], device: torch.device) -> PackedMatrix:
        stored = self._asked(name, shape)
        tensor = self.tensors[stored]
        kind = GGMLQuantizationType(tensor.tensor_type).name
        format = FORMATS[FORMAT_OF[kind]]
        try:
            blocks = torch.from_numpy(np.array(tensor.data)).view(shape[0], format.pieces(shape[1]), -1)
        except (OSError, ValueError, RuntimeError) as error:
            raise LabError(f"{self.where}: tensor {stored} is mangled: {_first_line(error)}") from error
        parts = []
        # Some rows at a time: codes take a byte each on the way, and an output head is larger than a layer.
        for some in self._rows_in_order(name, blocks).split(max(1, CONVERTED_AT_ONCE // shape[1])):
            codes, scales = codes_and_scales(kind, some.to(device))
            check_scales(format.scale_value(scales), stored, self.where)
            parts.append(format.from_codes(codes, scales))
        return PackedMatrix.stacked(parts)

    def _found(self, name: str) -> str:
        stored = self._stored(name)
        if stored not in self.tensors:
            raise LabError(f"{self.where}: tensor {stored} is missing")
        return stored

    def _asked(self, name: str, shape) -> str:
        """The file's name of a tensor that is now read. Its shape is checked before it is dequantized, which
        makes it up to 16 times as large."""
        stored = self._found(name)
        self.asked.add(stored)
        check_shape(self.shapes[stored], shape, stored, self.where)
        return stored

    def _rows_in_order(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if self.family.gguf_pairs_rows and ("q_proj" in name or "k_proj" in name):
            heads = self.config.q_heads if "q_proj" in name else self.config.kv_heads
            return rotate_half_order(values, heads)
        return values

    def tokenizer(self):
        from lab.model.text.tokenizer import from_gguf as tokenizer_from_gguf

        return tokenizer_from_gguf(self.scalars, self.array, self.where)

    def _dequantize(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            return np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, "CW")
        except NotImplementedError:
            kind = GGMLQuantizationType(tensor.tensor_type).name
            raise LabError(
                f"{self.where}: tensor {name} is {kind}, which the gguf package cannot dequantize"
            ) from None
        except Exception as error:
            raise LabError(f"{self.where}: tensor {name} is mangled: {_first_line(error)}") from error


def codes_and_scales(kind: str, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [rows, k], scales [rows, blocks, items]) of blocks uint8 [rows, blocks, bytes], as the
    format of FORMAT_OF stores them.

    A block (ggml-common.h of llama.cpp) of Q8_0, Q4_0 and Q4_1 is a scale, in Q4_1 a minimum, and 32 codes:
    signed bytes in Q8_0, otherwise 16 bytes of which byte j holds code j in its low half and code j + 16 in
    its high half.
    """
    if kind == "Q4_K":
        return q4_k_blocks(blocks)
    if kind == "Q6_K":
        return q6_k_blocks(blocks)
    head = 4 if kind == "Q4_1" else 2
    scales, codes = blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:]
    if kind != "Q8_0":
        codes = torch.cat((codes & 15, codes >> 4), -1)
    return codes.flatten(1), scales


def q4_k_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Q4_K, blocks of 256 codes: d and dmin; 12 bytes with the 6-bit scales and minima of 8
    groups; 4 times 32 bytes, of which each holds a code of one group in its low half and of the next in its
    high half.

    Of the 12 bytes, byte j has the scale of group j, and byte 4 + j its minimum, below two bits of those of
    group 4 + j: their upper ones; byte 8 + j has the lower four bits of both.
    """
    d = blocks[..., :4].contiguous().view(torch.float16)
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    codes = blocks[..., 16:].unflatten(-1, (4, 1, 32))
    return torch.cat((codes & 15, codes >> 4), -2).flatten(1), q4_k.pieces(d, scales, minima)


def q6_k_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Q6_K, blocks of 256 codes: 128 bytes with their lower four bits, 64 with the upper two, 16
    scales, d.

    Either half of the codes has 64 of the first bytes and 32 of the second. For j from 0 to 31, codes j and
    j + 32 are in the low halves of its first bytes j and j + 32, codes j + 64 and j + 96 in their high
    halves; the upper two bits of the four are in bits 0, 2, 4 and 6 of its second byte j.
    """
    low, high, scales, d = blocks.split((128, 64, 16, 2), -1)
    low = low.unflatten(-1, (2, 1, 64))
    low = torch.cat((low & 15, low >> 4), -2).flatten(-2)
    high = high.unflatten(-1, (2, 1, 32))
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -2).flatten(-2)
    d = d.contiguous().view(torch.float16)
    return (low | high << 4).flatten(1), q6_k.pieces(d, scales.contiguous().view(torch.int8))


def rotate_half_order(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes GGUF's reordering of the rows of q and k (Family.gguf_pairs_rows): RoPE pairs are (i, i +
    head_dim/2).

    llama.cpp stores pair i as rows 2i and 2i + 1 of a head.
    """
    if values.shape[0] % (2 * heads):
        return values  # a wrong shape; store() says so
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)


def _first_line(error: Exception) -> str:
    return named((str(error).splitlines() or [""])[0] or type(error).__name__, 200)
