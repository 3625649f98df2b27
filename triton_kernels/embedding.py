"""embedding: out[r,:] = table[ids[r],:]

ids [rows] int32   table [vocab, cols]   out [rows, cols]     row-major, contiguous
mapping   a program owns ROWS rows (one on a GPU) times BLOCK columns
traffic   one row of the table and one of out per id: latency, not bandwidth
contract  lab/ops/embedding.py          twin  cuda_src/embedding.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch

CONFIGS = {
    "sm_90": dict(rows=1, block=1024, num_warps=4),
    "sm_80": dict(rows=1, block=1024, num_warps=4),
    "interpreter": dict(rows=64, block=8192, num_warps=1),
}


@triton.jit
def embedding_kernel(ids, table, out, rows, cols, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Locate: an id outside the vocabulary gives a row of NaN, which is noticed, and no invalid access.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = (row < rows)[:, None] & (col < cols)
    token = tl.load(ids + row, mask=row < rows, other=-1)
    known = (token >= 0) & (token < vocab)

    # 2. Copy: contiguous lanes read 16 bytes each; the compiler makes the vectors.
    source = table + token.to(tl.int64)[:, None] * cols + col
    value = tl.load(source, mask=live & known[:, None], other=float("nan"))
    tl.store(out + row.to(tl.int64)[:, None] * cols + col, value, mask=live)


def embedding(ids, table, out):
    """Launch out = table[ids]."""
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
