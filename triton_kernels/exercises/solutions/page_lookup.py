"""Solution of page_lookup: reads a sequence's tokens, one number each, out of a paged cache.

A tile of 32 tokens spans two pages of 16, but its page was looked up once, for its first token. The table's
load must be a block, too: one entry for each token. (If a page is never smaller than a tile, one lookup a
tile is right, and cheaper; then the launcher must refuse smaller pages.)
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def gather_kernel(cache, table, out, tokens, page_size, BLOCK: tl.constexpr):
    t0 = tl.program_id(0) * BLOCK
    t = t0 + tl.arange(0, BLOCK)
    page = tl.load(table + t // page_size, mask=t < tokens, other=0)
    value = tl.load(cache + page * page_size + t % page_size, mask=t < tokens)
    tl.store(out + t, value, mask=t < tokens)


def gather(cache, table, out):
    """cache [pages, page_size], table [pages of the sequence]"""
    tokens = out.numel()
    launch(gather_kernel, (triton.cdiv(tokens, 32),), cache, table, out, tokens, cache.shape[1], BLOCK=32)
