"""What a weight format is, and the layout in which every kernel reads packed weights.

    weight[n, k] = scale[n, k / group] * (decode(code[n, k]) - zero) + minimum

A row's codes are packed in segments of 64 bytes, so that a lane of a tensor-core tile finds its weights in
one load of 16 bytes. The segments of 8 rows lie together, 512 bytes that a warp loads at once. A segment
holds 128 columns of 4 bits, or 64 of 8 bits, in runs of 32 columns. Lane t of the four lanes that share a row
takes the bytes 16 t to 16 t + 15, which are 8 codes of each run:

    code j of run i of lane t     column 32 i + 16 (j / 4) + 4 t + j % 4 of the segment

The 8 codes are in the order in which two of them at a time can be cut out with one mask:

    4 bits, one word of 32 bits   code 2p in bits 4p .. 4p + 3, code 2p + 1 in bits 16 + 4p ..
    8 bits, two words             codes 0, 2, 1, 3 in the bytes of the first, 4, 6, 5, 7 of the second

Codes of 6 bits have a segment of 96 bytes for 128 columns. The first 64 bytes hold the lower four bits of
each code, as above; of the other 32 lane t takes 8, two words of two runs each, with the upper two bits:

    6 bits, upper two             run i is in word i / 2, code 2p + h of it in bits 16 h + 8 (i % 2) + 2p ..

The scales of a row are stored in pieces. A piece belongs to a group, or to several groups whose scales are
small integers times a number that they share (GGUF's super-blocks). If a piece is for more columns than a
segment has, the segments of a row are filled up to whole pieces: such segments form a span.

Columns past k fill the last span with codes that stand for 0 (or for a minimum); kernels multiply them by
zeros of x. Rows past the last fill its block of 8; no kernel uses them.

    codes   uint8 [row / 8, segment, row % 8, bytes of a segment]
    scales  [row / 8, span, row % 8, items]: the pieces of the span. A span is one segment, unless a piece is
            for more columns. A piece is one number for each group, or two, if the format has a minimum or a
            zero, where the format does not say otherwise; with one scale a row, [row / 8, 1, row % 8, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lab.contract import dtype_name
from lab.errors import LabError

SEGMENT = 64  # bytes that hold 4 or 8 bits of each code of a segment
RUN = 32  # columns
BLOCK = 8  # rows whose segments lie together
EXPANDED_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights: what stays in a cache; what fills a GPU
QUANTISED_AT_ONCE = 1 << 24  # weights; rounding takes several times their memory
# Root mean square of weights from which on the rounding of their scales cannot make them noise: float16
# scales are rounded by 3e-8, and the numbers that they multiply go up to 127 * 32 (q6_k).
SMALL = 1e-3


@dataclass(frozen=True)
class Format:
    """The contract of one weight format: how numbers are stored, and what they are worth.

    `encode` and `decode` are the reference in torch; the kernels' files of the same name unpack the same
    codes in registers.
    """

    name: str
    summary: str
    number: int  # what kernels know it by: Format of cuda_src/launchers/arguments.h
    bits: int  # of a code: 4, 6 or 8
    group: int | None  # columns that share a scale; None: the whole row
    scale_dtype: torch.dtype  # of the numbers of a piece
    # (codes uint8) -> float64: the number that a code stands for, before zero, scale and minimum
    decode: Callable[[torch.Tensor], torch.Tensor]
    # (w float32 [rows, pieces, columns of a piece]) -> (codes uint8 of that shape, scales [rows, pieces,
    # items]): round to nearest
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    second: str | None = None  # the second entry of a scale: "minimum", "zero", or none
    blank: int = 0  # the code of the columns past k
    # (scales as stored [rows, pieces, items]) -> float64 [rows, groups, entries]
    scale_value: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double
    # (columns, items) of a piece that is for several groups
    piece: tuple[int, int] | None = None

    @property
    def entries(self) -> int:
        return 2 if self.second else 1

    @property
    def piece_columns(self) -> int | None:
        return self.piece[0] if self.piece else self.group

    @property
    def items(self) -> int:
        """Numbers of a piece."""
        return self.piece[1] if self.piece else self.entries

    @property
    def columns(self) -> int:
        """Columns in a segment."""
        return 64 if self.bits == 8 else 128

    @property
    def segment_bytes(self) -> int:
        return self.columns * self.bits // 8

    @property
    def span(self) -> int:
        """Segments in a span."""
        return max(1, (self.piece_columns or 0) // self.columns)

    @property
    def bits_a_weight(self) -> float:
        """With the scales of groups; the scale of a whole row hardly counts."""
        of_piece = self.items * self.scale_dtype.itemsize * 8
        return self.bits + (of_piece / self.piece_columns if self.group else 0)

    def segments(self, k: int) -> int:
        return -(-k // (self.columns * self.span)) * self.span

    def pieces(self, k: int) -> int:
        return 1 if self.group is None else -(-k // self.piece_columns)

    def codes_shape(self, rows: int, k: int) -> tuple[int, int, int, int]:
        return -(-rows // BLOCK), self.segments(k), BLOCK, self.segment_bytes

    def scales_shape(self, rows: int, k: int) -> tuple[int, int, int, int]:
        blocks = -(-rows // BLOCK)
        if self.group is None:
            return blocks, 1, BLOCK, self.entries
        in_span = self.columns * self.span // self.piece_columns * self.items
        return blocks, self.segments(k) // self.span, BLOCK, in_span

    def bytes_of(self, rows: int, k: int) -> int:
        """Bytes of a packed matrix [rows, k], scales included."""
        scales = math.prod(self.scales_shape(rows, k)) * self.scale_dtype.itemsize
        return math.prod(self.codes_shape(rows, k)) + scales

    def quantise(self, w: torch.Tensor) -> PackedMatrix:
        """w [rows, k] of any float dtype, rounded to the nearest codes of this format.

        Rows much smaller than the largest ones of w may become zeros. Raises LabError for weights that are
        not finite, or too large for the format's scales, and where w as a whole is so small that the scales
        are rounded to nothing.
        """
        matrix = PackedMatrix.stacked(
            [self._rounded(rows) for rows in w.split(max(1, QUANTISED_AT_ONCE // w.shape[1]))]
        )
        size = float(torch.linalg.vector_norm(w, dtype=torch.float64)) ** 2
        # With scales as they should be, rounding to nearest loses at most 0.4 of the sum of squares: in a
        # group of 128 with codes up to 7, one weight of 7 steps and all others half a step.
        if size < w.numel() * SMALL**2 and matrix.squared_error(w) > size / 2:
            raise LabError(
                f"format {self.name}: the weights, {float(w.abs().max()):.1g} at most, are too small for its "
                "scales and would become zeros or noise; use a format whose scales are float32 (int8, fp8), "
                "or plain weights"
            )
        return matrix

    def _rounded(self, w: torch.Tensor) -> PackedMatrix:
        """quantise() of some rows, without the look at how much is lost."""
        rows, k = w.shape
        if not bool(w.isfinite().all()):
            raise LabError(f"format {self.name}: the weights hold NaN or inf, which it cannot store")
        # Padding with zeros changes no group's largest weight.
        width = self.piece_columns or k
        padded = torch.zeros(rows, -(-k // width) * width, dtype=torch.float32, device=w.device)
        padded[:, :k] = w
        codes, scales = self.encode(padded.unflatten(1, (-1, width)))
        if not bool(self.scale_value(scales).isfinite().all()):
            raise LabError(f"format {self.name}: a weight is too large for its scale")
        return self.from_codes(codes.flatten(1)[:, :k], scales)

    def from_codes(self, codes: torch.Tensor, scales: torch.Tensor) -> PackedMatrix:
        """Packs codes uint8 [rows, k] with scales [rows, pieces, items], which are kept as they are, or
        rounded to scale_dtype if they are floating-point numbers of another dtype.

        Raises LabError if their sizes do not belong together, and for scales that scale_dtype cannot hold.
        """
        rows, k = codes.shape
        needed = self.pieces(k)
        if scales.shape != (rows, needed, self.items):
            raise LabError(
                f"format {self.name}: scales {list(scales.shape)} do not fit codes {list(codes.shape)}: "
                f"{[rows, needed, self.items]} are needed"
            )
        scales = self._as_stored(scales)
        blocks, spans, _, in_span = self.scales_shape(rows, k)
        padded = codes.new_full((blocks * BLOCK, self.segments(k) * self.columns), self.blank)
        padded[:rows, :k] = codes
        all_scales = torch.zeros(blocks * BLOCK, spans * in_span, dtype=self.scale_dtype, device=codes.device)
        all_scales[:rows, : needed * self.items] = scales.flatten(1)
        packed = by_blocks(pack(padded, self.bits), self.segment_bytes)
        return PackedMatrix(self.name, rows, k, packed, by_blocks(all_scales, in_span))

    def _as_stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales [rows, pieces, items] in scale_dtype. Those that are in it already are not looked at, which
        would make the host wait for a GPU."""
        if scales.dtype == self.scale_dtype:
            return scales
        stored, dtype = scales.to(self.scale_dtype), dtype_name(self.scale_dtype)
        if not (self.scale_dtype.is_floating_point and scales.dtype.is_floating_point):
            raise LabError(f"format {self.name}: scales must be {dtype}; they are {dtype_name(scales.dtype)}")
        if not bool(stored.isfinite().all()):
            raise LabError(
                f"format {self.name}: a scale of {float(scales.abs().max()):.3g} is too large for {dtype}"
            )
        # Not the second entry: a minimum that becomes 0 changes its weights by less than the dtype can hold.
        lost = ((stored == 0) & (scales != 0))[..., 0]
        if bool(lost.any()):
            raise LabError(
                f"format {self.name}: a scale of {float(scales[..., 0][lost][0]):.3g} is too small for "
                f"{dtype}; its weights would be 0"
            )
        return stored


@dataclass(eq=False)
class PackedMatrix:
    """A matrix [rows, k] of packed weights: what the ops take in the place of a tensor `w`.

    codes and scales: see above. It answers those questions of a tensor that contracts ask: shape, device,
    numel, nbytes, double.
    """

    format_name: str
    rows: int
    k: int
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def format(self) -> Format:
        from lab.formats import FORMATS

        return FORMATS[self.format_name]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.k

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.rows * self.k

    def get_device(self) -> int:
        return self.codes.get_device()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes, self.scales

    def raw_codes(self) -> torch.Tensor:
        """uint8 [rows, k], one code each."""
        return unpack(by_rows(self.codes)[: self.rows], self.format.bits)[:, : self.k]

    def scales_by_row(self) -> torch.Tensor:
        """As stored: [rows, pieces of whole spans, items]."""
        return by_rows(self.scales)[: self.rows].unflatten(1, (-1, self.format.items))

    def scale_values(self) -> torch.Tensor:
        """What they are worth: float64 [rows, groups of whole spans, entries]."""
        return self.format.scale_value(self.scales_by_row())

    def double(self) -> torch.Tensor:
        """The weights, exactly: float64 [rows, k]."""
        return self.double_padded()[:, : self.k]

    def double_padded(self) -> torch.Tensor:
        """The same with the columns past k that fill the last span."""
        f = self.format
        value = f.decode(unpack(by_rows(self.codes)[: self.rows], f.bits))
        scales = self.scale_values()
        value = value.unflatten(1, (scales.shape[1], -1))
        if f.second == "zero":
            value = (value - scales[:, :, 1:]) * scales[:, :, :1]
        elif f.second == "minimum":
            value = value * scales[:, :, :1] + scales[:, :, 1:]
        else:
            value = value * scales
        return value.flatten(1)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights as a tensor: rounded to float32, then to dtype. Expands a few rows at a time, so that
        hardly more memory is taken than that of the result."""
        out = torch.empty(self.rows, self.k, dtype=dtype, device=self.device)
        for some, values in self._expanded():
            out[some] = values
        return out

    def squared_error(self, w: torch.Tensor) -> float:
        """The sum of the squared differences from w [rows, k]."""
        return sum(float((values - w[some].double()).square_().sum()) for some, values in self._expanded())

    def largest(self) -> float:
        """The largest weight without its sign, in float32."""
        return max(float(values.abs().max()) for _, values in self._expanded())

    def bound(self) -> float:
        """What no weight without its sign is above, by the scales alone, so that nothing is expanded."""
        f = self.format
        every = f.decode(torch.arange(1 << f.bits, dtype=torch.uint8, device=self.device))
        scale, *second = (float(one.abs().max()) for one in self.scale_values().unbind(-1))
        code = float(every.nan_to_num(0).abs().max())
        if f.second == "zero":
            return scale * (code + second[0])
        return scale * code + sum(second)

    def _expanded(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which rows, their weights in float32 [rows, k]), a few rows at a time."""
        step = max(1, EXPANDED_AT_ONCE[self.device.type] // self.k // BLOCK)
        blocks = zip(self.codes.split(step), self.scales.split(step))
        for first, (codes, scales) in zip(range(0, self.rows, step * BLOCK), blocks):
            values = self._float(by_rows(codes), by_rows(scales).unflatten(1, (-1, self.format.items)))
            some = slice(first, min(first + step * BLOCK, self.rows))
            yield some, values[: some.stop - first, : self.k]

    def _float(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Some rows in float32. Only the last operation rounds: an integer has at most 8 bits, and a scale
        that is followed by a minimum or multiplied by an integer for its group at most 17, so that their
        product is exact."""
        f = self.format
        every = torch.arange(1 << f.bits, dtype=torch.uint8, device=codes.device)
        number = f.decode(every).float()
        value = number.index_select(0, unpack(codes, f.bits).flatten().int())
        worth = f.scale_value(scales).float()
        value = value.view(*worth.shape[:2], -1)
        if f.second == "zero":
            value.sub_(worth[:, :, 1:])
        value.mul_(worth[:, :, :1])
        if f.second == "minimum":
            value.add_(worth[:, :, 1:])
        return value.flatten(1)

    def same(self, other: object) -> bool:
        """Whether `other` is a packed matrix of the same format with the same codes and scales."""
        return (
            type(other) is PackedMatrix
            and (self.format_name, self.shape) == (other.format_name, other.shape)
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scales, other.scales)
        )

    @staticmethod
    def stacked(matrices: list[PackedMatrix]) -> PackedMatrix:
        """One matrix with the rows of all, which have the same format and k."""
        first = matrices[0]
        if len(matrices) == 1:
            return first
        rows = sum(m.rows for m in matrices)
        if all(m.rows % BLOCK == 0 for m in matrices[:-1]):
            tensors = [torch.cat(parts) for parts in zip(*(m.tensors() for m in matrices))]
        else:  # blocks of 8 rows begin elsewhere
            tensors = []
            for parts in zip(*(m.tensors() for m in matrices)):
                together = torch.cat([by_rows(t)[: m.rows] for t, m in zip(parts, matrices)])
                padded = together.new_zeros(-(-rows // BLOCK) * BLOCK, together.shape[1])
                padded[:rows] = together
                tensors.append(by_blocks(padded, parts[0].shape[-1]))
        return PackedMatrix(first.format_name, rows, first.k, *tensors)

    def some_rows(self, ids: torch.Tensor) -> PackedMatrix:
        """The rows of these numbers, [len(ids), k]."""
        codes, scales = (by_rows(t)[ids.long()] for t in self.tensors())
        f = self.format
        pieces = scales.unflatten(1, (-1, f.items))[:, : f.pieces(self.k)]
        return f.from_codes(unpack(codes, f.bits)[:, : self.k], pieces)

    def rows_from(self, first: int, count: int) -> PackedMatrix:
        """Rows `first` to `first + count - 1` as a view of the same memory. `first` is a multiple of 8."""
        blocks = slice(first // BLOCK, -(-(first + count) // BLOCK))
        return PackedMatrix(self.format_name, count, self.k, *(t[blocks] for t in self.tensors()))

    def part(self, dim: int, first: int, count: int) -> PackedMatrix:
        """Rows (dim 0) or columns (dim 1) `first` to `first + count - 1`, exactly, in new memory. Columns
        begin and end between pieces, unless a row has one scale."""
        f = self.format
        if dim == 0 and first % BLOCK:
            return self.some_rows(torch.arange(first, first + count, device=self.device))
        if dim == 0:
            view = self.rows_from(first, count)
            return replace(view, codes=view.codes.clone(), scales=view.scales.clone())
        width = f.piece_columns
        pieces = slice(None) if width is None else slice(first // width, first // width + f.pieces(count))
        step, parts = max(1, EXPANDED_AT_ONCE[self.device.type] // self.k // BLOCK), []
        for codes, scales in zip(self.codes.split(step), self.scales.split(step)):
            some = unpack(by_rows(codes), f.bits)[:, first : first + count]
            parts.append(f.from_codes(some, by_rows(scales).unflatten(1, (-1, f.items))[:, pieces]))
        whole = PackedMatrix.stacked(parts)
        return PackedMatrix(self.format_name, self.rows, count, *whole.tensors())


def by_blocks(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[blocks, segments, 8, width] from [rows, segments * width]; rows are a multiple of 8."""
    return rows.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, width)).transpose(1, 2).contiguous()


def by_rows(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of by_blocks()."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, bytes of whole segments] from codes uint8 [rows, whole segments]: see the layout above.

    Without lists of indices, which would be copied to the GPU: a graph that is captured does not take that.
    """
    lanes = _lanes(codes, bits)
    if bits == 8:
        return lanes.unflatten(-1, (2, 2, 2)).transpose(-1, -2).flatten(1)  # 0 2 1 3, 4 6 5 7
    # Byte b of the word holds bits 8b ..: codes 0 and 2, 4 and 6, 1 and 3, 5 and 7.
    halves = (lanes & 15).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)  # 0 4 1 5 2 6 3 7
    low = (halves[..., :4] | halves[..., 4:] << 4).flatten(2)  # row, segment, byte
    if bits == 4:
        return low.flatten(1).contiguous()
    high = (lanes >> 4).unflatten(4, (4, 2)).unflatten(3, (2, 2))  # row, segment, t, word, i % 2, p, h
    shift = 2 * torch.arange(4, dtype=torch.uint8, device=codes.device)[:, None]
    high = (high << shift).sum(5, dtype=torch.uint8).transpose(4, 5).flatten(2)  # t, word, h, i % 2
    return torch.cat((low, high), -1).flatten(1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of pack(): uint8 [rows, columns of whole segments]."""
    if bits == 6:
        by_segment = packed.unflatten(1, (-1, SEGMENT * 3 // 2))
        low, high = by_segment[..., :SEGMENT], by_segment[..., SEGMENT:]
        return unpack(low.flatten(1), 4) | _upper_two(high) << 4
    rows, runs = packed.shape[0], SEGMENT * 8 // bits // RUN
    word = packed.view(torch.int32).view(rows, -1, 4, runs * bits // 4)  # row, segment, t, run (and half)
    word = word.unflatten(3, (runs, -1)).permute(0, 1, 3, 4, 2)  # row, segment, run, half, t
    codes = torch.empty(*word.shape[:3], 2, 4, dtype=torch.int32, device=packed.device)
    for half in range(2):  # four codes, a byte each, are a word of the result
        if bits == 8:
            x = word[:, :, :, half]
            some = (x & ~0xFFFF00) | (x & 0xFF00) << 8 | (x >> 8) & 0xFF00  # bytes 1 and 2 change places
        else:
            x = word[:, :, :, 0] >> 8 * half
            some = (x & 0xF) | (x >> 8) & 0xF00 | (x & 0xF0) << 12 | (x & 0xF00000) << 4
        codes[:, :, :, half] = some
    return codes.view(torch.uint8).view(rows, -1)


def _upper_two(high: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns]: the upper two bits of codes of 6 bits, of bytes [rows, segments, 32]."""
    high = high.unflatten(2, (4, 2, 2, 2, 1))  # row, segment, t, word, h, i % 2
    shift = 2 * torch.arange(4, dtype=torch.uint8, device=high.device)
    pairs = (high >> shift & 3).unflatten(6, (2, 2))  # p = 2 * half + u
    return pairs.permute(0, 1, 3, 5, 6, 2, 7, 4).flatten(1)  # row, segment, word, i % 2, half, t, u, h


def _lanes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, segment, lane t, run i, code j] of codes [rows, columns]."""
    runs = (64 if bits == 8 else 128) // RUN
    by_column = codes.view(codes.shape[0], -1, runs, 2, 4, 4)  # segment, run, half, t, e
    return by_column.permute(0, 1, 4, 2, 3, 5).flatten(4)
