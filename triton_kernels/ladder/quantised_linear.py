"""The ladder of quantised_linear: y[b,n] = sum_k x[b,k] * w[n,k] (+ bias[n]), with w packed as int4-g128: w =
scale * (code - 8), codes of 4 bits and a scale for 128 columns. From weights that are expanded in memory to
tensor cores.

Each rung changes one thing of the rung before it. What it should gain, and why: lab/rungs/.
Rungs 1 to 3 read rows of codes as one would write them down first (lab/formats/row_major.py); from rung 4 on
codes lie as lab/formats/format.py has them. Codes are read as words of 32 bits, 8 codes each.
No rung rounds a weight: x's dtype holds code - 8 exactly, and scales are multiplied in float32.
twin  cuda_src/ladder/quantised_linear.cu          the op's own kernel  triton_kernels/linear.py
"""

import torch
import triton
import triton.language as tl

from triton_kernels.common import launch
from triton_kernels.core.packed_rows import load_lanes, unpack
from triton_kernels.ladder.linear import put

GROUP = tl.constexpr(128)  # columns that share a scale; also those of a segment of the packed layout
WORDS = tl.constexpr(16)  # of such columns
MIDDLE = tl.constexpr(8)  # the code of zero
ROWS = tl.constexpr(8)  # whose segments lie together
INT4_G128 = tl.constexpr(5)  # Format.number of lab/formats


@triton.jit
def scalar_numbers(words, shift):
    """float32: the number of the code that lies `shift` bits up in a word: shift, mask, subtract as integers,
    convert."""
    return (((words >> shift) & 15) - MIDDLE).to(tl.float32)


@triton.jit
def numbers_in_place(words, shift, place):
    """float32: the number of the code in the bits 4 place .. of words >> shift, which stays there.

    2^(23 - 4 place) has a mantissa whose bit 4 place counts 1, so its exponent with the code's bits is that
    power plus the code. To mask and to put in the exponent is one instruction (LOP3)."""
    # No launch has a third axis, but the compiler does not know that it subtracts 0. So it keeps the exponent
    # in a register, which one LOP3 needs. (It would take a sum apart again: it sees that no bits overlap.)
    exponent = ((127 + 23 - 4 * place) << 23) - tl.program_id(2)
    power = (1 << (23 - 4 * place)).to(tl.float32)
    bits = ((words >> shift) & (15 << 4 * place)) | exponent
    return bits.to(tl.float32, bitcast=True) - (power + MIDDLE)


@triton.jit
def quantised_linear_expand_kernel(words, expanded, count, BLOCK: tl.constexpr):
    # What rung 1 launches first: a program writes the numbers of BLOCK words.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    code = tl.arange(0, 8)[None, :]
    number = scalar_numbers(tl.load(words + i, mask=i < count, other=0), 4 * code)
    tl.store(expanded + i * 8 + code, number.to(expanded.dtype.element_ty), mask=i < count)


@triton.jit
def quantised_linear_expanded_kernel(
    x, expanded, scales, bias, y, rows, n, k, HAS_BIAS: tl.constexpr, BLOCK_W: tl.constexpr
):
    # 1. Unpack to memory: one kernel has written code - 8 of every weight in x's dtype; this one
    # multiplies, a program of four warps per output, each lane 8 neighbouring columns at a time. Every
    # weight crosses DRAM three times: as 4 bits, written as 16, and read again.
    out, b = tl.program_id(0), tl.program_id(1)
    groups = tl.cdiv(k, GROUP)
    row = out.to(tl.int64) * groups
    code = tl.arange(0, 8)[None, :]
    acc = tl.zeros([BLOCK_W, 8], tl.float32)
    for w0 in range(0, tl.cdiv(k, 8), BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)[:, None]
        col = word * 8 + code
        number = tl.load(expanded + row * GROUP + col, mask=col < k, other=0.0).to(tl.float32)
        scale = tl.load(scales + row + word // WORDS, mask=word * 8 < k, other=0.0).to(tl.float32)
        xv = tl.load(x + b.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        acc += number * scale * xv
    put(y, bias, b, out, rows, n, tl.sum(tl.sum(acc, axis=1), axis=0), HAS_BIAS)


@triton.jit
def quantised_linear_row_kernel(
    x, words, scales, bias, y, rows, n, k, HAS_BIAS: tl.constexpr, BLOCK_W: tl.constexpr, BITS: tl.constexpr
):
    # 2. Scalar unpack: the multiplying kernel reads the codes themselves, 8 in one word, and makes numbers of
    # them in registers: shift, mask, subtract, convert.
    #
    # 3. Bit tricks: the same kernel with BITS: a code becomes bits of a float that is a large power of two
    # plus the code; the power and the 8 are subtracted at once. One LOP3 and one subtraction of floats
    # replace shift, mask, subtraction of integers and conversion.
    out, b = tl.program_id(0), tl.program_id(1)
    groups = tl.cdiv(k, GROUP)
    row = out.to(tl.int64) * groups
    code = tl.arange(0, 8)[None, :]
    acc = tl.zeros([BLOCK_W, 8], tl.float32)
    for w0 in range(0, tl.cdiv(k, 8), BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)[:, None]
        col = word * 8 + code
        packed = tl.load(words + row * WORDS + word, mask=word * 8 < k, other=0)
        if BITS:
            number = numbers_in_place(packed, 16 * (code // 4), code % 4)
        else:
            number = scalar_numbers(packed, 4 * code)
        scale = tl.load(scales + row + word // WORDS, mask=word * 8 < k, other=0.0).to(tl.float32)
        xv = tl.load(x + b.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        acc += number * scale * xv
    put(y, bias, b, out, rows, n, tl.sum(tl.sum(acc, axis=1), axis=0), HAS_BIAS)


@triton.jit
def quantised_linear_packed_kernel(
    x, words, scales, bias, y, rows, n, k, HAS_BIAS: tl.constexpr, SEGMENTS: tl.constexpr, REUSE: tl.constexpr
):
    # 4. Packed layout: a program has the 8 rows whose segments lie together, and its four warps a segment
    # each: 512 contiguous bytes, of which a lane loads 16. All rows use the same values of x. The axes are
    # segment, row, lane t of four, word i of the lane, and the word's 8 codes in two quarters of a run;
    # lab/formats/format.py says which columns these are.
    #
    # 5. Scales reused: the same kernel with REUSE: the sum of 4 products is multiplied by the scale, not
    # each weight. (In the twin the sum of 32; here the compiler gives a lane 4 neighbouring columns.)
    row0, b = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    segments = tl.cdiv(k, GROUP)
    t = tl.arange(0, 4)[None, None, :, None, None, None]
    i = tl.arange(0, 4)[None, None, None, :, None, None]
    quarter = tl.arange(0, 2)[None, None, None, None, :, None]
    code = tl.arange(0, 4)[None, None, None, None, None, :]
    column = 32 * i + 16 * quarter + 4 * t + code
    acc = tl.zeros([SEGMENTS, ROWS, 4, 4, 2, 1 if REUSE else 4], tl.float32)
    for s0 in range(0, segments, SEGMENTS):
        segment = s0 + tl.arange(0, SEGMENTS)[:, None]
        place = row0 * segments + segment * ROWS + tl.arange(0, ROWS)[None, :]
        live = segment < segments
        packed, _ = load_lanes(words + (place * WORDS)[:, :, None], live[:, :, None], BITS=4)
        number = numbers_in_place(packed[:, :, :, :, None, None], 16 * (code % 2), 2 * quarter + code // 2)
        col = segment[:, :, None, None, None, None] * GROUP + column
        xv = tl.load(x + b.to(tl.int64) * k + col, mask=col < k, other=0.0).to(tl.float32)
        scale = tl.load(scales + place, mask=live, other=0.0).to(tl.float32)[:, :, None, None, None, None]
        if REUSE:
            acc += tl.sum(number * xv, axis=5, keep_dims=True) * scale
        else:
            acc += number * scale * xv
    total = tl.sum(tl.sum(tl.sum(tl.sum(tl.sum(acc, axis=5), axis=4), axis=3), axis=2), axis=0)
    put(y, bias, b, row0 + tl.arange(0, ROWS), rows, n, total, HAS_BIAS)


@triton.jit
def quantised_linear_dot_kernel(
    x,
    words,
    scales,
    bias,
    y,
    rows,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    # 6. Tensor cores: codes are cut out two at a time, as pairs of x's dtype (core/packed_rows.py); w is
    # the left operand, whose 16 rows fill the tile, x, transposed and padded to 16 columns, the right one.
    # So w is read and unpacked once for up to 16 rows of x, and x is never converted.
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    segments = tl.cdiv(k, GROUP)
    row = tl.minimum(out, n - 1).to(tl.int64)
    in_block = row // ROWS * (segments * ROWS) + row % ROWS
    acc = tl.zeros([SEGMENTS, BLOCK_N, BLOCK_B], tl.float32)
    for s0 in range(0, segments, SEGMENTS):
        segment = s0 + tl.arange(0, SEGMENTS)[:, None]
        place = in_block[None, :] + segment * ROWS
        lanes = load_lanes(words + (place * WORDS)[:, :, None], (segment < segments)[:, :, None], BITS=4)
        tile = unpack(lanes, x.dtype.element_ty, INT4_G128, BITS=4, PARTS=1, FLAT=False)
        col = segment[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        of_x = x + b.to(tl.int64)[None, :, None] * k + col
        xv = tl.load(of_x, mask=(b < rows)[None, :, None] & (col < k), other=0.0)
        scale = tl.load(scales + place, mask=segment < segments, other=0.0).to(tl.float32)
        acc += tl.dot(tile, tl.permute(xv, 0, 2, 1)) * scale[:, :, None]
    total = tl.trans(tl.sum(acc, axis=0))
    put(y, bias, b[:, None], out[None, :], rows, n, total, HAS_BIAS)


def linear(rung, x, w, bias, y, expanded):
    """Launch rung 1 to 6 of y = x @ w.T + bias; bias None or [n], y of x's dtype or float32.

    w: a RowMajor for rungs 1 to 3, then a PackedMatrix. expanded: for rung 1 memory for w, in x's dtype."""
    (rows, k), n = x.shape, w.shape[0]
    rest, shared = (bias, y, rows, n, k), dict(HAS_BIAS=bias is not None)
    words, scales = w.codes.view(torch.int32), w.scales
    if rung == 1:
        count = words.numel()
        launch(quantised_linear_expand_kernel, (triton.cdiv(count, 128),), words, expanded, count, BLOCK=128)
        launch(
            quantised_linear_expanded_kernel,
            (n, rows),
            x,
            expanded,
            scales,
            *rest,
            **shared,
            BLOCK_W=128,
            num_warps=4,
        )
    elif rung <= 3:
        meta = dict(BLOCK_W=128, BITS=rung == 3, num_warps=4)
        launch(quantised_linear_row_kernel, (n, rows), x, words, scales, *rest, **shared, **meta)
    elif rung <= 5:
        grid, meta = (triton.cdiv(n, 8), rows), dict(SEGMENTS=4, REUSE=rung == 5, num_warps=4)
        launch(quantised_linear_packed_kernel, grid, x, words, scales, *rest, **shared, **meta)
    else:
        launch(
            quantised_linear_dot_kernel,
            (triton.cdiv(n, 16), triton.cdiv(rows, 16)),
            x,
            words,
            scales,
            *rest,
            **shared,
            BLOCK_B=16,
            BLOCK_N=16,
            SEGMENTS=4,
            num_warps=4,
        )
