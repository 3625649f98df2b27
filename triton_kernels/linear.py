"""linear: y[b,n] = sum_k x[b,k] * w[n,k] (+ bias[n]), accumulated in float32, rounded once

  x [rows, k], rows 1..64   w [n, k]   bias [n] or None   y [rows, n] of x's dtype or float32
  all row-major and contiguous
  mapping   a program owns BLOCK_N rows of w for every row of x, and walks along k
  traffic   w once whatever the batch (nearly all of it: 2nk bytes in bfloat16); x from L2, once per program;
            y once
  contract  lab/ops/linear.py          twin  cuda_src/linear.cu

The launcher chooses one of two ways to multiply. For few rows: plain float32 arithmetic on the loaded
weights. For more rows, where that arithmetic would take longer than the loads: tensor cores, with w as the
left operand (its rows fill the tile, which a small batch cannot) and x transposed as the right one, padded to
BLOCK_B columns.

Packed weights have a kernel of their own, for every format: core/packed_rows.py unpacks and multiplies them.
"""

import functools

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels import settings
from triton_kernels.common import architecture, config, launch
from triton_kernels.core.packed_rows import PACKED, operands, packed_product
from triton_kernels.core.packed_splits import split_product
from triton_kernels.settings import measured

# sum_rows: the most rows of x that the plain path takes. Each path has a list of (most rows, largest n,
# settings); the first entry that fits is used. Small n needs small tiles, so that every multiprocessor has a
# program; more rows need larger ones, because each program reads all of x. STAGES tiles are in flight through
# shared memory; with 1, loads go directly to registers. A warp of the plain path reads 512 bytes of a row at
# a time.
ANY = 1 << 31
SM_80 = {
    "sum_rows": 4,
    "sum": [
        (1, ANY, dict(BLOCK_N=2, num_warps=4, STAGES=1, UNROLL=1)),
        (4, ANY, dict(BLOCK_N=4, num_warps=1, STAGES=1, UNROLL=2)),
    ],
    "dot": [
        (16, 4096, dict(BLOCK_N=16, BLOCK_K=256, num_warps=2, STAGES=5, UNROLL=1)),
        (64, ANY, dict(BLOCK_N=64, BLOCK_K=128, num_warps=4, STAGES=5, UNROLL=1)),
    ],
    # float32 on CUDA cores: the tensor cores would round the operands to TF32.
    "dot_f32": [(64, ANY, dict(BLOCK_N=32, BLOCK_K=32, num_warps=4, STAGES=4, UNROLL=1))],
}
CONFIGS = {"sm_90": SM_80, "sm_80": SM_80, "interpreter": {"sum_rows": 4}}


@triton.jit
def linear_kernel(
    x,
    w,
    bias,
    y,
    rows,
    n,
    k,
    DOT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # 1. Locate: BLOCK_N rows of w. Rows past the end, of w (only in the last program) and of x, read row 0
    # again, which is cheaper than a mask, and store nothing. (For tensor cores core/fused_product.py masks
    # rows of x instead; _columns there says why.) The plain path has three-dimensional addresses [batch, n,
    # k], so that both loads and the sum have the same layout and no data move between threads in the loop.
    b = tl.arange(0, BLOCK_B)
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_K)
    w_row = w + tl.where(out < n, out, 0).to(tl.int64) * k
    x_row = x + tl.where(b < rows, b, 0) * k
    if DOT:
        w_at, x_at, col = w_row[:, None], x_row[:, None], col[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    else:
        w_at, x_at, col = w_row[None, :, None], x_row[:, None, None], col[None, None, :]
        acc = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_K], tl.float32)

    # 2. Multiply: w is read only once (evict_first), x by every program (evict_last). The twin has a kernel
    # for each path, and a hand-written cp.async ring for tensor cores; here the compiler makes the ring from
    # num_stages.
    for k0 in tl.range(0, k, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        at = k0 + col
        if EVEN_K:
            wv = tl.load(w_at + at, eviction_policy="evict_first")
            xv = tl.load(x_at + at, eviction_policy="evict_last")
        else:
            wv = tl.load(w_at + at, mask=at < k, other=0.0, eviction_policy="evict_first")
            xv = tl.load(x_at + at, mask=at < k, other=0.0, eviction_policy="evict_last")
        if DOT:
            acc = tl.dot(wv, tl.trans(xv), acc, input_precision=PRECISION)
        else:
            acc += wv.to(tl.float32) * xv.to(tl.float32)

    # 3. Reduce: each lane has summed its own columns; one reduction at the end adds the lanes. A dot
    # has already done it.
    if DOT:
        total = tl.trans(acc)
    else:
        total = tl.sum(acc, axis=2)

    # 4. Store: bias added in float32, rounded once.
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)[None, :]
    where = y + b.to(tl.int64)[:, None] * n + out[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(b < rows)[:, None] & (out < n)[None, :])


@triton.jit
def packed_linear_kernel(
    x,
    words,
    scales,
    bias,
    y,
    rows,
    n,
    k,
    HAS_BIAS: tl.constexpr,
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
    # 1. Locate: BLOCK_N rows of w.
    b = tl.arange(0, BLOCK_B)[:, None]
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    # 2. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number of
    # rows.
    # 3. Reduce: the warps of a program divide k, and their sums are added at the end.
    total = packed_product(
        x,
        words,
        scales,
        out,
        live=out < n,
        rows=rows,
        k=k,
        FORMAT=FORMAT,
        BITS=BITS,
        GROUP=GROUP,
        SECOND=SECOND,
        EVEN_K=EVEN_K,
        BLOCK_B=BLOCK_B,
        BLOCK_N=BLOCK_N,
        SEGMENTS=SEGMENTS,
        STAGES=STAGES,
    )

    # 4. Store: bias added in float32, rounded once.
    if HAS_BIAS:
        total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)[None, :]
    where = y + b.to(tl.int64) * n + out[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(b < rows) & (out < n)[None, :])


@functools.lru_cache(maxsize=None)
def _interpreter_tile(depth, n, k):
    """BLOCK_N and BLOCK_K that take the interpreter the least time, for `depth` rows of x in a tile.

    Measured costs: 1.5 ms a program, 0.5 ms an iteration, 5 ns an element (8 if masked), for tiles of up to
    2^17 elements, which fit in the cache.
    """

    def cost(tile):
        block_n, block_k = tile
        programs, steps = triton.cdiv(n, block_n), triton.cdiv(k, block_k)
        element = 8e-9 if k % block_k else 5e-9
        return programs * (1.5e-3 + steps * (0.5e-3 + element * depth * block_n * block_k))

    sizes = [1 << i for i in range(4, 18)]
    return min(((bn, bk) for bn in sizes for bk in sizes if depth * bn * bk <= 1 << 17), key=cost)


def linear(x, w, bias, y):
    """Launch y = x @ w.T + bias; w may be a PackedMatrix, bias None or [n], y of x's dtype or float32."""
    if type(w) is PackedMatrix:
        packed_linear(x, w, bias, y)
        return
    cfg = config(CONFIGS, x)
    (rows, k), n = x.shape, w.shape[0]
    block_b = triton.next_power_of_2(rows)
    meta = measured("linear", x, rows, n=n, k=k)
    dot = meta.pop("path") == "dot" if meta else rows > cfg["sum_rows"]
    if architecture(x) == "interpreter":
        block_n, block_k = _interpreter_tile(1 if dot else block_b, n, k)
        meta = dict(BLOCK_N=block_n, BLOCK_K=block_k, STAGES=1, UNROLL=1)
    elif meta is None:
        path = "sum"
        if dot:
            path = "dot_f32" if x.itemsize == 4 else "dot"
        meta = next(dict(m) for most_rows, most_n, m in cfg[path] if rows <= most_rows and n <= most_n)
        meta.setdefault("BLOCK_K", 512 // x.itemsize * meta["num_warps"])
    if dot and architecture(x) != "interpreter":
        block_b = max(block_b, 16)
    launch(
        linear_kernel,
        (triton.cdiv(n, meta["BLOCK_N"]),),
        x,
        w,
        bias,
        y,
        rows,
        n,
        k,
        DOT=dot,
        HAS_BIAS=bias is not None,
        EVEN_K=k % meta["BLOCK_K"] == 0,
        PRECISION="ieee",
        BLOCK_B=block_b,
        **meta,
    )


def packed_linear(x, w, bias, y):
    """The same for a PackedMatrix."""
    (rows, k), n = x.shape, w.shape[0]
    programs, meta = settings.packed("linear", PACKED, x, w, n)
    if (splits := meta.pop("SPLITS", 1)) > 1:
        split_product(x, w, bias, y, programs, splits, meta)
        return
    meta["HAS_BIAS"] = bias is not None
    launch(packed_linear_kernel, (programs,), x, *operands(w), bias, y, rows, n, k, **meta)
