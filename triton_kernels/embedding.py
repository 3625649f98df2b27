"""embedding: out[r,:] = table[ids[r],:]

ids [rows] int32   table [vocab, cols]   out [rows, cols]     row-major, contiguous
mapping   a program owns ROWS rows (one on a GPU) times BLOCK columns
traffic   one row of the table and one of out per id: latency, not bandwidth
contract  lab/ops/embedding.py          twin  cuda_src/embedding.cu

A packed table has a kernel of its own, for every format: core/packed_rows.py unpacks it.
"""

import triton
import triton.language as tl

from lab.formats import PackedMatrix
from triton_kernels.common import config, launch
from triton_kernels.core.packed_rows import operands, unpacked_rows
from triton_kernels.settings import packed_format

CONFIGS = {
    "sm_90": dict(rows=1, block=1024, num_warps=4),
    "sm_80": dict(rows=1, block=1024, num_warps=4),
    "interpreter": dict(rows=64, block=8192, num_warps=1),
}


@triton.jit
def inside(token, vocab):
    """Whether an id is in the vocabulary."""
    return (token >= 0) & (token < vocab)


@triton.jit
def embedding_kernel(ids, table, out, rows, cols, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Locate: an id outside the vocabulary gives a row of NaN, which is noticed, and no invalid access.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = (row < rows)[:, None] & (col < cols)
    token = tl.load(ids + row, mask=row < rows, other=-1)
    known = inside(token, vocab)

    # 2. Copy: contiguous lanes read 16 bytes each; the compiler makes the vectors.
    source = table + token.to(tl.int64)[:, None] * cols + col
    value = tl.load(source, mask=live & known[:, None], other=float("nan"))
    tl.store(out + row.to(tl.int64)[:, None] * cols + col, value, mask=live)


@triton.jit
def packed_embedding_kernel(
    ids,
    words,
    scales,
    out,
    rows,
    cols,
    vocab,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    # 1. Locate: as above; a program owns SEGMENTS segments of a row.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SEGMENTS
    token = tl.load(ids + row, mask=row < rows, other=-1)
    known = inside(token, vocab)

    # 2. Copy: unpacked in float32, so that the numbers are rounded once.
    value, col = unpacked_rows(
        words,
        scales,
        token,
        live=known,
        first=first,
        k=cols,
        FORMAT=FORMAT,
        BITS=BITS,
        GROUP=GROUP,
        SECOND=SECOND,
        BLOCK_N=ROWS,
        SEGMENTS=SEGMENTS,
    )
    value = tl.where(known[None, :, None], value, float("nan"))
    live = (row < rows)[None, :, None] & (col < cols)
    tl.store(out + row.to(tl.int64)[None, :, None] * cols + col, value.to(out.dtype.element_ty), mask=live)


def packed_embedding(ids, table, out):
    """The same for a PackedMatrix."""
    cfg = config(CONFIGS, out)
    rows, (vocab, cols) = ids.numel(), table.shape
    tile, f = min(cfg["rows"], triton.next_power_of_2(rows)), table.format
    segments = min(max(cfg["block"] // f.columns, 1), triton.next_power_of_2(f.segments(cols)))
    launch(
        packed_embedding_kernel,
        (triton.cdiv(rows, tile), triton.cdiv(f.segments(cols), segments)),
        ids,
        *operands(table),
        out,
        rows,
        cols,
        vocab,
        ROWS=tile,
        SEGMENTS=segments,
        num_warps=1,  # so that a thread reads 16 bytes of codes
        **packed_format(f),
    )


def embedding(ids, table, out):
    """Launch out = table[ids]; the table may be a PackedMatrix."""
    if type(table) is PackedMatrix:
        packed_embedding(ids, table, out)
        return
    cfg = config(CONFIGS, table)
    rows, (vocab, cols) = ids.numel(), table.shape
    tile = min(cfg["rows"], triton.next_power_of_2(rows))
    block = min(cfg["block"], triton.next_power_of_2(cols))
    launch(
        embedding_kernel,
        (triton.cdiv(rows, tile), triton.cdiv(cols, block)),
        ids,
        table,
        out,
        rows,
        cols,
        vocab,
        ROWS=tile,
        BLOCK=block,
        num_warps=cfg["num_warps"],
    )
