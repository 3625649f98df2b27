"""Exercise page_lookup: reads a sequence's tokens, one number each, out of a paged cache.

Question: token t is number t % page_size of page table[t / page_size]. The result is right with pages of 32
and of 64 tokens. Which tokens come from the wrong page with pages of 16, and how does a program look up
several pages at once?

Mend it here, then: lab exercise check page_lookup --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def gather_kernel(cache, table, out, tokens, page_size, BLOCK: tl.constexpr):
    t0 = tl.program_id(0) * BLOCK
    t = t0 + tl.arange(0, BLOCK)
    page = tl.load(table + t0 // page_size)
    value = tl.load(cache + page * page_size + t % page_size, mask=t < tokens)
    tl.store(out + t, value, mask=t < tokens)


def gather(cache, table, out):
    """cache [pages, page_size], table [pages of the sequence]"""
    tokens = out.numel()
    launch(gather_kernel, (triton.cdiv(tokens, 32),), cache, table, out, tokens, cache.shape[1], BLOCK=32)
