"""Device code of the fused matrix products: the wait for the preceding kernel, the norm, the multiply.

Programmatic dependent launch (sm_90): a kernel starts while the preceding one still runs. It loads the first
tile of its weights, which no kernel writes, into registers, and waits before it reads an activation. On other
GPUs PDL is False.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Waits for the preceding kernel: its results may now be read. Lets the dependent kernel launch."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_rows(w, row, live, col, k, EVEN_K: tl.constexpr):
    """w[row, col], zero past k; the values of rows that are not live must not be used. Read only once, so
    evict_first."""
    at = w + row.to(tl.int64) * k + col
    if EVEN_K:
        values = tl.load(at, mask=live, eviction_policy="evict_first")
    else:
        values = tl.load(at, mask=live & (col < k), other=0.0, eviction_policy="evict_first")
    return values


@triton.jit
def normed(v, scale, weight):
    """v scaled and weighted with rmsnorm's rounding points: to T before the weight and after it."""
    return ((v.to(tl.float32) * scale).to(v.dtype).to(tl.float32) * weight.to(tl.float32)).to(v.dtype)


@triton.jit
def normed_rows(x, weight, rows, k, eps, b, col):
    """Whole rows of x, normalised: [BLOCK_B, 1, BLOCK_K], BLOCK_K >= k.

    b [BLOCK_B, 1, 1], col and weight [1, 1, BLOCK_K].
    """
    v = tl.load(x + b * k + col, mask=(b < rows) & (col < k), other=0.0, eviction_policy="evict_last")
    wide = v.to(tl.float32)
    return normed(v, tl.rsqrt(tl.sum(wide * wide, axis=2, keep_dims=True) / k + eps), weight)


@triton.jit
def dot_rows(
    first,
    w,
    row,
    live,
    x,
    rows,
    k,
    b,
    col,
    FULL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of w times the rows of x: float32 sums [BLOCK_N, BLOCK_B]; `first` is w's tile at column 0.

    On tensor cores w is the left operand, because its rows fill the tile, which a small batch cannot. FULL: x
    has BLOCK_B rows. float32 stays on CUDA cores (ieee), because tensor cores would round it to TF32.
    """
    acc = tl.dot(first, _columns(x, rows, k, b, col, FULL, EVEN_K), input_precision="ieee")
    for k0 in tl.range(BLOCK_K, k, BLOCK_K, num_stages=STAGES):
        tile = load_rows(w, row, live, k0 + col, k, EVEN_K)
        acc = tl.dot(tile, _columns(x, rows, k, b, k0 + col, FULL, EVEN_K), acc, input_precision="ieee")
    return acc


@triton.jit
def _columns(x, rows, k, b, col, FULL: tl.constexpr, EVEN_K: tl.constexpr):
    """x[b, col] transposed, zero past the end. Masked: tensor cores pad a few rows to 16, and if all programs
    read row 0 for the padding, they would all read the same lines of L2. (Row 0 is what linear.py reads.)"""
    at = x + b * k + col
    if FULL and EVEN_K:
        v = tl.load(at, eviction_policy="evict_last")
    else:
        v = tl.load(at, mask=(b < rows) & (col < k), other=0.0, eviction_policy="evict_last")
    return tl.trans(v)
