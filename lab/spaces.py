"""What `lab tune` may try: lists of launch settings, by hand pruned to those that can be fast.

Each function takes the number of rows, the bytes of an element and the sizes that the op is tuned by; a
contract says which of them is its search space in a language (Op.spaces, Op.tuned_by).

Registers are counted a thread, in 32-bit words. CUDA's settings are explained in cuda_src/settings.h: its
kernels are compiled ahead, so they are few; Triton's are constexprs and compiler options.
"""

import itertools

from lab.tune import tuned

SHARED_BYTES = 200 << 10  # a program's tiles in flight must fit in a multiprocessor's shared memory
ALL = 64  # more blocks for each multiprocessor than any shape needs: every block then has one set of outputs


def of(op, backend, rows, itemsize, shape, format=None):
    """The settings that may be tried for a call of an op (a contract); [] where there is no choice. format:
    of packed weights, which all products of a language multiply in one way."""
    if backend not in op.spaces:
        return []
    if format is not None:
        n = shape["n"] if op.name in SPLIT_PRODUCTS else None
        return packed(rows, itemsize, n) if backend == "triton" else []
    return op.spaces[backend](rows, itemsize, **shape)


def power_of_two(n):
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


# ---- CUDA --------------------------------------------------------------------------------------------------


def shared_rows(rows, itemsize, n, k, parts=1):
    """For core/stream_rows.cuh: how many warps share a row of w, and blocks for each multiprocessor."""
    found = []
    for share in (1, 2, 4) if k * itemsize % 16 == 0 else (0,):
        blocks = -(-n * parts * max(share, 1) // 16)
        found += [dict(share=share, resident=p) for p in (1, 2, 3, 4, 6) if p * 108 < blocks]
        found.append(dict(share=share, resident=ALL))
    return found


def cuda_product(rows, itemsize, n, k, parts=1, mma=True):
    """mma: whether the op has a tensor-core kernel of its own. Without one, more rows than 2 run as rmsnorm
    and linear, with linear's settings."""
    if rows <= 2 or itemsize == 4:
        return shared_rows(rows, itemsize, n, k, parts)
    if not mma or rows > 16 or k * itemsize % 16:
        return []
    return [dict(tiles=1, stages=4), dict(tiles=1, stages=7), dict(tiles=2)]


def splits(rows, itemsize, **sizes):
    """Tokens of a split, for the tensor cores' attention."""
    return [dict(least=tokens) for tokens in (64, 128, 192, 256, 512, 1024)] if itemsize == 2 else []


# ---- Triton ------------------------------------------------------------------------------------------------


def products(rows, itemsize, n, k, parts=1, whole_rows=True):
    """For the fused matrix products: float32 arithmetic (`sums`) up to 8 rows, tensor cores (`dots`) from 4
    rows on. Between the two, both are tried."""
    found = []
    if rows <= 8:
        found += sums(rows, itemsize, n, k, parts, whole_rows)
    if rows >= 4:
        found += dots(rows, itemsize, n, k, parts)
    return found


def sums(rows, itemsize, n, k, parts, whole_rows):
    found = []
    block_b = power_of_two(rows)
    for warps, block_n in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        vector = 16 // itemsize * 32 * warps  # columns that the threads load at once
        widths = (
            [power_of_two(k)]
            if whole_rows
            else sorted({min(vector * i, power_of_two(k)) for i in (1, 2, 4, 8)})
        )
        for block_k in widths:
            lane = block_k * itemsize / (4 * 32 * warps)
            weights, x = block_n * parts * lane, block_b * lane
            if not (4 <= weights <= 64 and x <= 64 and weights + 2 * x <= 128):
                continue
            base = dict(path="sum", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps)
            tiles = -(-n // block_n)
            if whole_rows:
                resident = {0} | {p for p in (16 // warps, 32 // warps) if p and tiles > 108 * p}
                found += [dict(base, per_multiprocessor=p) for p in sorted(resident)]
            else:
                found += [dict(base, UNROLL=u) for u in ((1,) if block_k >= k else (2, 4))]
    return found


def dots(rows, itemsize, n, k, parts):
    found = []
    block_b = max(power_of_two(rows), 16)
    narrow = itemsize == 2
    for block_n, block_k, warps, stages in itertools.product(
        (16, 32, 64, 128), (64, 128, 256) if narrow else (16, 32, 64), (2, 4, 8), (3, 4, 6)
    ):
        rows_of_w = block_n * parts
        tile = (rows_of_w + block_b) * block_k * itemsize
        if (
            not 16 << 10 <= tile * (stages - 1) <= SHARED_BYTES
            or rows_of_w > 128
            or block_k > power_of_two(k)
        ):
            continue
        held = (2 * tile / 4 + rows_of_w * block_b) / (32 * warps)  # the first tile, x on its way, the sums
        if held > 160 or rows_of_w * block_k < 512 * warps:
            continue
        base = dict(path="dot", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, STAGES=stages)
        found += [base] + [dict(base, per_multiprocessor=p) for p in (2,) if -(-n // block_n) > 2 * 108 * p]
    return found


def basic_linear(rows, itemsize, n, k):
    found = []
    block_b = power_of_two(rows)
    if rows <= 8:
        for warps, block_n, wide, unroll in itertools.product(
            (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)
        ):
            block_k = 512 // itemsize * warps * wide
            lane = block_k * itemsize / (4 * 32 * warps)
            if block_k <= power_of_two(k) and 4 <= block_n * lane <= 32 and block_b * block_n * lane <= 128:
                found.append(
                    dict(
                        path="sum", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, STAGES=1, UNROLL=unroll
                    )
                )
    if rows >= 4:
        found += [
            dict({key: v for key, v in c.items() if key != "per_multiprocessor"}, UNROLL=1)
            for c in dots(rows, itemsize, n, k, 1)
            if "per_multiprocessor" not in c
        ]
    return found


SPLIT_PRODUCTS = ("linear", "linear_add", "norm_linear")  # whose packed weights may be narrow


def packed(rows, itemsize, n=None):
    """For core/packed_rows.py: how many rows of w a program takes, and how many segments of 64 bytes of each
    at once. With several segments every warp multiplies its own. n: rows of w, where programs may also divide
    k (core/packed_splits.py)."""
    if itemsize == 4:
        return [
            dict(BLOCK_N=block_n, SEGMENTS=1, STAGES=stages, num_warps=warps)
            for block_n, stages, warps in itertools.product((16, 32, 64), (2, 3), (4, 8))
        ]
    shapes = [
        (block_n, segments, segments)
        for block_n, segments in itertools.product((16, 32, 64), (2, 4, 8, 16))
        if block_n * power_of_two(rows) <= 1024
    ]
    if rows > 8:
        shapes += [(block_n, 1, warps) for block_n, warps in itertools.product((32, 64, 128), (4, 8))]
    x = max(power_of_two(rows), 8) * 128 * itemsize  # bytes of a segment's columns, which are 128 at most
    found = [
        dict(BLOCK_N=block_n, SEGMENTS=segments, STAGES=stages, num_warps=warps)
        for (block_n, segments, warps), stages in itertools.product(shapes, (2, 3, 4, 5, 6))
        if block_n * 64 * segments * (stages - 1) >= 8 << 10
        and (block_n * 64 + x) * segments * (stages - 1) <= SHARED_BYTES
    ]
    if n is not None and rows > tuned.WHOLE_K:
        found += [
            dict(base, SPLITS=splits)
            for base, splits in itertools.product(found, (2, 3, 4, 6, 8))
            if base["SEGMENTS"] == 1 and 108 <= -(-n // base["BLOCK_N"]) * splits <= 4 * 132
        ]
    return found


def attention(rows, itemsize, head_dim, **sizes):
    return [
        dict(tile=tile, min_rows=16, num_warps=warps, num_stages=stages)
        for tile, warps, stages in itertools.product((32, 64, 128), (1, 2, 4, 8), (3, 4, 5, 6))
        if 2 * tile * power_of_two(head_dim) * itemsize * (stages - 2) <= SHARED_BYTES
        and tile * power_of_two(head_dim) >= 1024 * warps
    ]
