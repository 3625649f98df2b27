"""Matrix product of x with packed rows of w by programs that divide k too: for many rows of x and a narrow w.

Each program of core/packed_rows.py reads all of x. With few rows of w for each program, so that every
multiprocessor has one, that is more than w: 128 programs that own 32 rows of a 4096 x 14336 matrix in int4
read 29 MB of it, and 64 rows of x 128 times, 235 MB. As many that own 128 rows of w, and a quarter of
k each, read a quarter of that. Their sums go to memory in float32, and a second kernel adds them in the order
of k, so that results are the same in every run.
"""

import torch
import triton
import triton.language as tl

from triton_kernels import settings
from triton_kernels.common import architecture, launch
from triton_kernels.core.fused_product import wait_for_inputs
from triton_kernels.core.packed_rows import operands, packed_product, prefetch_rows


@triton.jit
def packed_split_kernel(
    x,
    words,
    scales,
    partial,
    rows,
    n,
    k,
    PDL: tl.constexpr,
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
    # 1. Locate: BLOCK_N rows of w, and a share of k.
    b = tl.arange(0, BLOCK_B)[:, None]
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)

    # 2. Multiply: packed weights are unpacked in registers and multiplied on tensor cores, for any number of
    # rows.
    if split == 0:
        prefetch_rows(words, out, out < n, k, BITS, SEGMENTS, PDL)
    wait_for_inputs(PDL)
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
        split=split,
        splits=tl.num_programs(1),
    )

    # 3. Store: the sums of this share, in float32.
    where = partial + (split * rows + b) * n + out[None, :]
    tl.store(where, total, mask=(b < rows) & (out < n)[None, :])


@triton.jit
def sum_splits_kernel(
    partial,
    bias,
    y,
    size,
    n,
    PDL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Locate: BLOCK outputs, in the order of memory.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size

    # 2. Sum: in the order of k.
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=live, other=0.0)

    # 3. Store: bias, and for linear_add what was there, added in float32; rounded once.
    if HAS_BIAS:
        total += tl.load(bias + at % n, mask=live, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(y + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live)


def split_product(x, w, bias, y, programs, splits, meta, add=False):
    """Launch y = x @ w.T + bias, or with `add` y += that: `splits` programs for each BLOCK_N rows of w, then
    the sum.

    x [rows, k]   w a PackedMatrix [n, k]   bias [n] or None   y [rows, n] of x's dtype or float32
    programs, meta: of settings.packed.
    """
    (rows, k), n = x.shape, w.shape[0]
    partial = torch.empty(splits, rows, n, dtype=torch.float32, device=x.device)
    pdl = settings.dependent_launch(x)
    launch(packed_split_kernel, (programs, splits), x, *operands(w), partial, rows, n, k, **meta, **pdl)
    block = 1 << 17 if architecture(x) == "interpreter" else 1 << 10
    launch(
        sum_splits_kernel,
        (triton.cdiv(rows * n, block),),
        partial,
        bias,
        y,
        rows * n,
        n,
        HAS_BIAS=bias is not None,
        ADD=add,
        SPLITS=splits,
        BLOCK=block,
        num_warps=4,
        **pdl,
    )
