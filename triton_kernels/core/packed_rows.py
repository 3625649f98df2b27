"""Matrix product of x with packed rows of w (formats/) on tensor cores, for any number of rows of x; and the
unpacking alone, for embedding.

Packed rows are read as words of 32 bits. The 16 words of a segment belong to four lanes, four words each, and
lab/formats/format.py gives the columns of their codes. The segments of 8 rows lie together, so the 32 threads
of a warp, four for each row, read 512 contiguous bytes. (Codes of 6 bits have 8 words more, with their upper
two bits.) Unpacked, a lane's codes are those that a lane of a tensor-core tile holds, so no code is moved to
another thread after the copy to shared memory.

Sums of one group of columns are multiplied by its scale in float32, so that a weight is never rounded.

Tensor cores serve every number of rows of x, one row included: the multiplication itself is nearly free then,
and the instructions that remain are those that unpack.
"""

import torch
import triton
import triton.language as tl

from triton_kernels import settings
from triton_kernels.formats import (
    in_words,
    items_of,
    load_words,
    numbers,
    scale_number,
    scales_of_words,
    second_number,
    span_of,
)
from triton_kernels.formats.q6_k import q6_k_pairs

WORDS = tl.constexpr(16)  # of 32 bits, in a segment of codes of 4 or 8 bits
HIGH_WORDS = tl.constexpr(8)  # that follow in one of 6 bits
ROWS = tl.constexpr(8)  # whose segments lie together: a row's next segment is ROWS segments further on
LINE = tl.constexpr(32)  # words that one prefetch brings to L2


@triton.constexpr_function
def columns_of(bits):
    """Columns in a segment."""
    return 64 if bits == 8 else 128


@triton.constexpr_function
def parts_of(bits, group):
    """Parts of a segment: its columns that share a scale."""
    columns = 64 if bits == 8 else 128
    return max(columns // group, 1) if group else 1


@triton.constexpr_function
def words_of(bits):
    """Words in a segment."""
    return 24 if bits == 6 else 16


@triton.jit
def segments_of(k, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """Segments of a row of k columns: whole spans."""
    SPAN: tl.constexpr = span_of(FORMAT)
    return tl.cdiv(k, columns_of(BITS) * SPAN) * SPAN


@triton.jit
def load_entries(
    scales, row, first, segments, live, FORMAT: tl.constexpr, PARTS: tl.constexpr, SEGMENTS: tl.constexpr
):
    """What entry_numbers() makes the scales of SEGMENTS segments of, from `first` on: a tuple of one entry
    [units, BLOCK_N], or of words [SEGMENTS, BLOCK_N]."""
    SPAN: tl.constexpr = span_of(FORMAT)
    ITEMS: tl.constexpr = items_of(FORMAT, PARTS)
    in_block = row // ROWS * (segments // SPAN * ROWS) + row % ROWS
    at = scales + (in_block * ITEMS)[None, :]
    if in_words(FORMAT):
        segment = (first + tl.arange(0, SEGMENTS))[:, None]
        at += segment // SPAN * (ROWS * ITEMS)
        entry = load_words(at, segment % SPAN, live[None, :] & (segment < segments), FORMAT)
    else:
        unit = tl.arange(0, PARTS * SEGMENTS)[:, None]
        segment = first + unit % SEGMENTS
        at += segment // SPAN * (ROWS * ITEMS) + unit // SEGMENTS
        entry = (tl.load(at, mask=live[None, :] & (segment < segments), other=0),)
    return entry


@triton.jit
def entry_numbers(
    entry,
    part,
    first,
    FORMAT: tl.constexpr,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """(scale, minimum or zero), float32 [units, BLOCK_N]; without a minimum or zero the second means nothing.

    entry, first: of load_entries(). part: None; or of a single segment the part whose numbers, [BLOCK_N], are
    wanted."""
    N: tl.constexpr = entry[0].shape[1]
    if in_words(FORMAT):
        ONE: tl.constexpr = part is not None
        group = part if ONE else tl.arange(0, PARTS)[:, None, None]
        place = ((first + tl.arange(0, SEGMENTS)) % span_of(FORMAT))[None, :, None]
        a, b, c = entry
        scale, second = scales_of_words((a[None, :, :], b[None, :, :], c[None, :, :]), group, place, FORMAT)
        scale = tl.reshape(scale, [N] if ONE else [PARTS * SEGMENTS, N])
        second = tl.reshape(second, [N] if ONE else [PARTS * SEGMENTS, N])
    else:
        mine = entry[0]
        if part is not None:
            mine = pick_row(mine, part, PARTS)
        scale = scale_number(mine, FORMAT)
        second = scale
        if SECOND != "":
            second = second_number(mine)
    return scale, second


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
    split=None,
    splits=1,
):
    """Rows `row` [BLOCK_N] of w, of which only `live` ones are read, times the rows of x: float32 sums
    [BLOCK_B, BLOCK_N].

    GROUP: columns that share a scale, or 0 for the whole row. SECOND: "minimum", "zero" or "". A step takes
    SEGMENTS segments of each row. EVEN_K: whole steps cover k. split: the share of k that is multiplied, of
    `splits`; all of k where it is None.

    Who does what: with several segments, every warp multiplies its own ones. Warps divide k, so that few rows
    of w are enough to occupy a program. With one segment they divide the rows of w, and a program has more of
    them. That is for many rows of x, because each program reads all of x.
    """
    # 1. Locate. The part of a segment that shares a scale is the unit of multiplication: PARTS of WIDTH
    # columns, UNITS in a step. Those of one segment are numbered so that they go to the same warp.
    COLUMNS: tl.constexpr = columns_of(BITS)
    PARTS: tl.constexpr = parts_of(BITS, GROUP)
    WIDTH: tl.constexpr = COLUMNS // PARTS
    UNITS: tl.constexpr = PARTS * SEGMENTS
    STRIDE: tl.constexpr = words_of(BITS)
    segments = segments_of(k, FORMAT, BITS)
    segment = tl.arange(0, SEGMENTS)
    unit = tl.arange(0, UNITS)
    part = (unit % SEGMENTS) * PARTS + unit // SEGMENTS
    row = row.to(tl.int64)
    in_block = row // ROWS * (segments * ROWS) + row % ROWS
    word_at = words + (in_block * STRIDE)[None, :, None] + (segment * (ROWS * STRIDE))[:, None, None]
    b = tl.arange(0, BLOCK_B)
    if SEGMENTS == 1:
        column = tl.arange(0, WIDTH)[None, :]
        b = b[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    else:
        column = part[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        b = b[None, :, None]
        acc = tl.zeros([SEGMENTS, BLOCK_N, BLOCK_B], tl.float32)

    # 2. Load: the compiler makes a cp.async ring of STAGES steps from the loads of w, which is read only once
    # (evict_first), and of x. Not from those of the scales, so they are loaded a step ahead by hand. What
    # lies past the end of a row is 0.
    begin, end = 0, segments
    if split is not None:
        steps = tl.cdiv(tl.cdiv(segments, SEGMENTS), splits)
        begin = split * steps * SEGMENTS
        end = min(segments, begin + steps * SEGMENTS)
    entry = (0,)
    if GROUP:
        entry = load_entries(
            scales,
            row,
            first=begin,
            segments=segments,
            live=live,
            FORMAT=FORMAT,
            PARTS=PARTS,
            SEGMENTS=SEGMENTS,
        )
    for first in tl.range(begin, end, SEGMENTS, num_stages=STAGES):
        there = live[None, :, None]
        if not EVEN_K:
            there &= (first + segment < segments)[:, None, None]
        lanes = load_lanes(word_at + first * (ROWS * STRIDE), there, BITS)
        if GROUP:
            following = load_entries(scales, row, first + SEGMENTS, segments, live, FORMAT, PARTS, SEGMENTS)

        # 3. Unpack and multiply: one unit after the other, or all at once.
        if SEGMENTS == 1:
            for p in tl.static_range(PARTS):
                xv = load_columns(x, b, first * COLUMNS + p * WIDTH + column, rows, k, EVEN_K)
                mine = 1.0, 0.0
                if GROUP:
                    mine = entry_numbers(entry, p, first, FORMAT, SECOND, PARTS, SEGMENTS)
                words_p = pick_words(lanes, p, PARTS)
                acc = add_unpacked(
                    acc, words_p, xv, mine, PARTS=1, FORMAT=FORMAT, BITS=BITS, GROUP=GROUP, SECOND=SECOND
                )
        else:
            xv = load_columns(x, b, first * COLUMNS + column, rows, k, EVEN_K)
            mine = 1.0, 0.0
            if GROUP:
                mine = entry_numbers(
                    entry,
                    part=None,
                    first=first,
                    FORMAT=FORMAT,
                    SECOND=SECOND,
                    PARTS=PARTS,
                    SEGMENTS=SEGMENTS,
                )
            acc = add_unpacked(
                acc, lanes, xv, mine, PARTS=PARTS, FORMAT=FORMAT, BITS=BITS, GROUP=GROUP, SECOND=SECOND
            )
        if GROUP:
            entry = following

    # 4. Reduce: over the warps, if they divide k. A scale of the whole row is applied here.
    total = acc
    if SEGMENTS > 1:
        total = tl.sum(acc, axis=0)
    if not GROUP:
        total *= tl.load(scales + row, mask=live, other=0)[:, None]
    return tl.trans(total)


@triton.jit
def prefetch_rows(words, row, live, k, BITS: tl.constexpr, SEGMENTS: tl.constexpr, PDL: tl.constexpr):
    """Asks L2 for the weights of the first steps: before the wait for the preceding kernel, which writes x
    but no weights."""
    if PDL:
        line = words + first_lines(row, live, k, BITS, SEGMENTS)
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [line.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def first_lines(row, live, k, BITS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Where the lines of the first four steps (of 6 bits, two thirds of them) begin, in words: int64
    [BLOCK_N, 2 * SEGMENTS].

    The segments of a step are contiguous for the 8 rows of a block, and a line has segments of two rows. So
    each row asks for an eighth of what its block needs.
    """
    SHARE: tl.constexpr = 4 * SEGMENTS * 16  # words
    block_words = tl.cdiv(k, columns_of(BITS)) * (ROWS * words_of(BITS))
    row = tl.where(live, row, 0).to(tl.int64)[:, None]
    at = row % ROWS * SHARE + LINE * tl.arange(0, SHARE // LINE)[None, :]
    return row // ROWS * block_words + tl.where(at < block_words, at, 0)


@triton.jit
def load_columns(x, b, column, rows, k, EVEN_K: tl.constexpr):
    """x[b, column], 0 past the end. Every program reads it, so it should stay in the cache (evict_last)."""
    if EVEN_K:
        value = tl.load(x + b * k + column, mask=b < rows, other=0.0, eviction_policy="evict_last")
    else:
        inside = (b < rows) & (column < k)
        value = tl.load(x + b * k + column, mask=inside, other=0.0, eviction_policy="evict_last")
    return value


@triton.jit
def add_unpacked(
    acc,
    lanes,
    xv,
    scales,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
):
    """acc [segments, rows of w, rows of x] with the product of some columns added: scaled, unless the whole
    row has one scale.

    lanes: as load_lanes() gives them; xv [PARTS * segments, rows of x, columns of a part]; scales: scale, and
    minimum or zero, [PARTS * segments, rows of w]. If acc has no first axis, nor have xv and scales.
    """
    # The numbers are exact in x's dtype, so only the sums are rounded.
    FLAT: tl.constexpr = len(xv.shape) == 2
    xt = tl.trans(xv) if FLAT else tl.permute(xv, 0, 2, 1)
    tile = unpack(lanes, xv.dtype, FORMAT, BITS, PARTS, FLAT)
    if not GROUP:
        acc = tl.dot(tile, xt, acc, input_precision="ieee")
    else:
        if SECOND == "zero":
            tile -= tl.expand_dims(scales[1].to(tile.dtype), -1)
        sums = tl.dot(tile, xt, input_precision="ieee") * tl.expand_dims(scales[0], -1)
        if SECOND == "minimum":
            # A minimum counts once for each column, so it is multiplied by the sum of x over the group:
            # another dot, with ones. Only the compiler's last passes see that these are constants (code 1 in
            # every place): its first ones must take them for weights, or they would arrange x in two ways.
            one = ((lanes[0] & 0xFF) >> 8) | 0x11111111
            ones = unpack((one, one), xv.dtype, FORMAT, BITS, PARTS, FLAT)
            sums += tl.dot(ones, xt, input_precision="ieee") * tl.expand_dims(scales[1], -1)
        if not FLAT:
            sums = tl.sum(tl.reshape(sums, [PARTS, acc.shape[0], acc.shape[1], acc.shape[2]]), axis=0)
        acc += sums
    return acc


@triton.jit
def unpack(
    lanes, T: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr
):
    """Numbers [PARTS * segments, rows, columns of a part] in T, from lanes as load_lanes() gives them. FLAT:
    without the first axis, which is 1.

    The axes that the comments name are those of lab/formats/format.py: lane t, word i, and code j of a word,
    which is 2 p + h, of pair p. A word has the codes of 4 columns, or of 8 in two quarters q, 16 columns
    apart.
    """
    low, high = lanes
    S: tl.constexpr = low.shape[0]
    N: tl.constexpr = low.shape[1]
    # 1. Cut out two codes at a time: [s, n, t, i, p], p = 2 q + u. One word of `high` is of one quarter.
    PAIRS: tl.constexpr = 2 if BITS == 8 or (BITS == 6 and high.shape[3] == 1) else 4
    pair = tl.arange(0, PAIRS)[None, None, None, None, :]
    MASK: tl.constexpr = 0x00FF00FF if BITS == 8 else 0x000F000F
    # (With a reshape in place of expand_dims the compiler would pass the tile through shared memory.)
    pairs = (tl.expand_dims(low, 4) >> (8 if BITS == 8 else 4) * pair) & MASK
    if BITS == 6:
        pairs = q6_k_pairs(pairs, high_pairs(high, pair) & 0x00030003)
    # 2. Make them numbers: [s, n, t, i, p, h].
    values = numbers(pairs, T, FORMAT)
    # 3. Name the axes in the order of the columns, (i q) t u h, with the part (the first axis of i and q) in
    # front. No number moves to another thread.
    CHUNKS: tl.constexpr = low.shape[3] * PAIRS // 2  # of 16 columns
    named = tl.reshape(values, [S, N, 4, PARTS, CHUNKS // PARTS, 2, 2])
    ordered = tl.permute(named, 3, 0, 1, 4, 2, 5, 6)
    if FLAT:
        tile = tl.reshape(ordered, [N, CHUNKS * 16])
    else:
        tile = tl.reshape(ordered, [PARTS * S, N, CHUNKS // PARTS * 16])
    return tile


@triton.jit
def high_pairs(high, pair):
    """[s, n, t, i, p]: words of `high` whose lowest bits in either half are the upper two of a pair's
    codes."""
    S: tl.constexpr = high.shape[0]
    N: tl.constexpr = high.shape[1]
    if high.shape[3] == 1:
        result = tl.expand_dims(high, 4) >> 2 * pair
    else:
        run = 8 * tl.arange(0, 2)[None, None, None, None, :]
        by_run = tl.expand_dims(tl.expand_dims(high, 4) >> run, 5) >> 2 * tl.expand_dims(pair, 4)
        result = tl.reshape(by_run, [S, N, 4, 4, 4])
    return result


@triton.jit
def unpacked_rows(
    words,
    scales,
    row,
    live,
    first,
    k,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """(weights float32 [units, BLOCK_N, columns of a unit], their columns [units, 1, columns of a unit]) of
    the segments from `first` on. The weights are exact, or with a minimum rounded once."""
    COLUMNS: tl.constexpr = columns_of(BITS)
    PARTS: tl.constexpr = parts_of(BITS, GROUP)
    WIDTH: tl.constexpr = COLUMNS // PARTS
    STRIDE: tl.constexpr = words_of(BITS)
    segments = segments_of(k, FORMAT, BITS)
    segment = first + tl.arange(0, SEGMENTS)
    unit = tl.arange(0, PARTS * SEGMENTS)
    part = (first + unit % SEGMENTS) * PARTS + unit // SEGMENTS
    row = row.to(tl.int64)
    in_block = row // ROWS * (segments * ROWS) + row % ROWS
    word_at = words + (in_block * STRIDE)[None, :, None] + (segment * (ROWS * STRIDE))[:, None, None]
    lanes = load_lanes(word_at, live[None, :, None] & (segment < segments)[:, None, None], BITS)
    value = unpack(lanes, tl.float32, FORMAT, BITS, PARTS, FLAT=False)
    if not GROUP:
        value *= tl.load(scales + row, mask=live, other=0)[None, :, None]
    else:
        entry = load_entries(scales, row, first, segments, live, FORMAT, PARTS, SEGMENTS)
        scale, second = entry_numbers(
            entry, part=None, first=first, FORMAT=FORMAT, SECOND=SECOND, PARTS=PARTS, SEGMENTS=SEGMENTS
        )
        if SECOND == "zero":
            value -= second[:, :, None]
        value *= scale[:, :, None]
        if SECOND == "minimum":
            value += second[:, :, None]
    return value, part[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_lanes(word_at, there, BITS: tl.constexpr):
    """(low, high), int32 [segments, rows, 4, words of a lane]: high has the upper two of 6 bits; of other
    codes it means nothing. word_at [segments, rows, 1]: where the segments begin."""
    S: tl.constexpr = word_at.shape[0]
    N: tl.constexpr = word_at.shape[1]
    at = word_at + tl.arange(0, WORDS)[None, None, :]
    low = tl.load(at, mask=there, other=0, eviction_policy="evict_first")
    low = tl.reshape(low, [S, N, 4, 4])
    high = low
    if BITS == 6:
        at = word_at + WORDS + tl.arange(0, HIGH_WORDS)[None, None, :]
        high = tl.load(at, mask=there, other=0, eviction_policy="evict_first")
        high = tl.reshape(high, [S, N, 4, 2])
    return low, high


@triton.jit
def pick_row(v, p: tl.constexpr, COUNT: tl.constexpr):
    """Row p of v [COUNT, n]: a thread has all rows of its column, so nothing is computed. Integers become
    int32."""
    if v.dtype != tl.float32:
        v = v.to(tl.int32)
    return tl.sum(tl.where(tl.arange(0, COUNT)[:, None] == p, v, 0), axis=0)


@triton.jit
def pick_words(lanes, p: tl.constexpr, PARTS: tl.constexpr):
    """What unpack() needs for part p of PARTS, of lanes as load_lanes() gives them: the words of low that
    have it. A part of 16 columns is a quarter of a word, which goes to its lowest bits, and so do the two
    bits of high."""
    low, high = lanes
    if PARTS == 8:
        RUN: tl.constexpr = p // 2
        first, second = tl.split(high)
        word = second if RUN // 2 else first
        mine = (
            pick_run(low, RUN, PARTS=4) >> 8 * (p % 2),
            tl.expand_dims(word >> 8 * (RUN % 2) + 4 * (p % 2), 3),
        )
    else:
        run = pick_run(low, p, PARTS)
        mine = run, run
    return mine


@triton.jit
def pick_run(low, p: tl.constexpr, PARTS: tl.constexpr):
    """The words of part p: [1, n, 4, 4 / PARTS] of low [1, n, 4, 4]."""
    mine = low
    if PARTS > 1:
        first, second = tl.split(tl.permute(tl.reshape(low, [1, low.shape[1], 4, 2, 2]), 0, 1, 2, 4, 3))
        HALF: tl.constexpr = p * 2 // PARTS
        mine = second if HALF else first
    if PARTS > 2:
        first, second = tl.split(mine)
        mine = tl.expand_dims(second if p % 2 else first, 3)
    return mine


# The settings of all products until they are measured one by one: see settings.packed. A step of the ring
# holds BLOCK_N * SEGMENTS * 64 bytes of weights; BLOCK_N is a multiple of 8, so that whole blocks of rows are
# read. With one segment, `num_warps` warps divide the rows of w. One row of x: as the tuner found for
# int4-g128 on an H100, where many small programs read 28672 x 4096 weights in 24.3 us and fewer large ones in
# 29.6.
SM_80 = {
    "half": [
        (1, 8192, dict(BLOCK_N=16, SEGMENTS=8, STAGES=3)),
        (1, settings.ANY, dict(BLOCK_N=32, SEGMENTS=2, STAGES=3)),
        (8, 8192, dict(BLOCK_N=16, SEGMENTS=8, STAGES=4)),
        (8, settings.ANY, dict(BLOCK_N=32, SEGMENTS=4, STAGES=4)),
        (16, 8192, dict(BLOCK_N=16, SEGMENTS=8, STAGES=3)),
        (16, settings.ANY, dict(BLOCK_N=64, SEGMENTS=4, STAGES=3)),
        (64, 8192, dict(BLOCK_N=64, SEGMENTS=1, STAGES=5, num_warps=4)),
        (64, settings.ANY, dict(BLOCK_N=128, SEGMENTS=1, STAGES=4, num_warps=8)),
    ],
    # float32 on CUDA cores: the tensor cores would round the operands to TF32.
    "float": [
        (16, settings.ANY, dict(BLOCK_N=32, SEGMENTS=1, STAGES=2, num_warps=4)),
        (64, settings.ANY, dict(BLOCK_N=16, SEGMENTS=1, STAGES=2, num_warps=4)),
    ],
}
PACKED = {"sm_90": SM_80, "sm_80": SM_80}


def operands(w):
    """(words, scales) of a PackedMatrix as kernels take them.

    Both are integers: codes int32, and scales so that scale and minimum or zero, which are two float16, are
    one number of 32 bits. Only the scales of whole rows and of 128 columns of fp8 are float32.
    """
    scales = w.scales
    if scales.dtype == torch.float16:
        scales = scales.view(torch.int32 if w.format.second else torch.int16)
    return w.codes.view(torch.int32), scales
