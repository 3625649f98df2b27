"""Device code of the products with packed weights: rows of w times the rows of x, on tensor cores, in any
format.

Packed rows are read as words of 32 bits. The 16 words of a segment belong to four lanes, four words each, and
lab/formats/format.py gives the columns of their codes. Unpacked, a lane's codes are those that a lane of a
tensor-core tile holds, so they go from the load to the multiplication without leaving their thread.

Tensor cores serve every number of rows of x, one row included: the multiplication itself is nearly free then,
and the instructions that remain are those that unpack.
"""

import torch
import triton
import triton.language as tl

from triton_kernels.formats import numbers, scale_number

WORDS = tl.constexpr(16)  # of 32 bits, in a segment


@triton.jit
def packed_product(
    x,
    words,
    scales,
    row,
    live,
    rows,
    k,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows `row` [BLOCK_N] of w, of which only `live` ones are read, times the rows of x: float32 sums
    [BLOCK_B, BLOCK_N].

    GROUP: columns that share a scale, or 0 for the whole row. SECOND: "minimum", "zero" or "". A step takes
    SEGMENTS segments of each row, of which every warp multiplies its own: warps divide k, so that few rows of
    w are enough to occupy a program. EVEN_K: whole steps cover k.
    """
    # 1. Locate. The part of a segment that shares a scale is the unit of multiplication: PARTS of WIDTH
    # columns. A step multiplies UNITS of them at once, numbered so that those of one segment go to the same
    # warp.
    COLUMNS: tl.constexpr = 512 // BITS
    PARTS: tl.constexpr = COLUMNS // GROUP if GROUP else 1
    WIDTH: tl.constexpr = COLUMNS // PARTS
    UNITS: tl.constexpr = PARTS * SEGMENTS
    segments = tl.cdiv(k, COLUMNS)
    segment = tl.arange(0, SEGMENTS)[:, None, None]
    unit = tl.arange(0, UNITS)
    part = (unit % SEGMENTS) * PARTS + unit // SEGMENTS
    row = row.to(tl.int64)
    word_at = words + (row * (segments * WORDS))[None, :, None] + segment * WORDS
    word_at += tl.arange(0, WORDS)[None, None, :]
    b = tl.arange(0, BLOCK_B)[None, :, None]
    column = part[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    x_at = x + b * k + column
    ENTRIES: tl.constexpr = 1 if SECOND == "" else 2
    entry_at = scales + (row * (segments * PARTS * ENTRIES))[None, :] + part[:, None] * ENTRIES
    acc = tl.zeros([SEGMENTS, BLOCK_N, BLOCK_B], tl.float32)

    for first in tl.range(0, segments, SEGMENTS, num_stages=STAGES):
        # 2. Load: w is read only once (evict_first), x by every program (evict_last). The compiler makes a
        # cp.async ring of STAGES steps from these loads. Past the end of a row everything is 0.
        there, known = live[None, :, None], live[None, :]
        if EVEN_K:
            inside = b < rows
        else:
            there &= first + segment < segments
            known &= first * PARTS + part[:, None] < segments * PARTS
            inside = (b < rows) & (first * COLUMNS + column < k)
        packed = tl.load(word_at + first * WORDS, mask=there, other=0, eviction_policy="evict_first")
        xv = tl.load(x_at + first * COLUMNS, mask=inside, other=0.0, eviction_policy="evict_last")
        if GROUP:
            at = entry_at + first * (PARTS * ENTRIES)
            scale = scale_number(tl.load(at, mask=known, other=0), FORMAT)[:, :, None]

        # 3. Unpack and multiply: the numbers are exact in x's dtype, the sums of one scale are float32.
        tile = unpack(packed, x.dtype.element_ty, FORMAT, BITS, PARTS)
        if SECOND == "zero":
            zero = tl.load(at + 1, mask=known, other=0)
            tile -= zero.to(tile.dtype)[:, :, None]
        xt = tl.permute(xv, 0, 2, 1)
        if GROUP:
            sums = tl.dot(tile, xt, input_precision="ieee") * scale
            if SECOND == "minimum":
                # A minimum counts once for each column, so it is multiplied by the sum of x over the group.
                ones = tl.full([UNITS, BLOCK_N, WIDTH], 1.0, xv.dtype)
                minimum = tl.load(at + 1, mask=known, other=0).to(tl.float32)
                sums += tl.dot(ones, xt, input_precision="ieee") * minimum[:, :, None]
            acc += tl.sum(tl.reshape(sums, [PARTS, SEGMENTS, BLOCK_N, BLOCK_B]), axis=0)
        else:
            acc = tl.dot(tile, xt, acc, input_precision="ieee")

    # 4. Reduce: over the warps. A scale of the whole row is applied here.
    total = tl.sum(acc, axis=0)
    if not GROUP:
        total *= tl.load(scales + row, mask=live, other=0)[:, None]
    return tl.trans(total)


@triton.jit
def unpack(packed, T: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr):
    """Numbers [PARTS * segments, rows, columns of a part] in T, from words [segments, rows, 16].

    The axes that the comments name are those of lab/formats/format.py: lane t, word i, and code j of a word,
    which is 2 p + h, of pair p. A word has the codes of 4 columns, or of 8 in two quarters q, 16 columns
    apart.
    """
    S: tl.constexpr = packed.shape[0]
    N: tl.constexpr = packed.shape[1]
    QUARTERS: tl.constexpr = 8 // BITS
    # 1. Cut out two codes at a time: [s, n, t, i, p], p = 2 q + u.
    lanes = tl.expand_dims(tl.reshape(packed, [S, N, 4, 4]), 4)
    shift = (BITS * tl.arange(0, 16 // BITS))[None, None, None, None, :]
    MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    pairs = (lanes >> shift) & MASK
    # 2. Make them numbers: [s, n, t, i, p, h].
    values = numbers(pairs, T, FORMAT)
    # 3. Name the axes in the order of the columns, i q t u h, with the part of the segment (the first axis of
    # i) in front. No number moves to another thread.
    named = tl.reshape(values, [S, N, 4, PARTS, 4 // PARTS, QUARTERS, 2, 2])
    ordered = tl.permute(named, 3, 0, 1, 4, 5, 2, 6, 7)
    return tl.reshape(ordered, [PARTS * S, N, 512 // BITS // PARTS])


def operands(w):
    """(words, scales) of a PackedMatrix as kernels take them: codes as int32 [rows, 16 * segments]."""
    return w.codes.view(torch.int32), w.scales
