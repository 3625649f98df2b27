"""Exercise grouped_queries: scores[h, t] = q[h] . k[t] for the query heads that share one KV head.

Question: the result is right. How often is each key loaded, how often would be enough, and what must a
program take instead of one query head?

Mend it here, then: lab exercise check grouped_queries --language triton
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def scores_kernel(q, k, out, tokens, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    t, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    key = tl.load(k + t[:, None] * D + d[None, :], mask=t[:, None] < tokens, other=0.0)
    query = tl.load(q + h[:, None] * D + d[None, :])
    score = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
    tl.store(out + h[:, None] * tokens + t[None, :], score, mask=t[None, :] < tokens)


def scores(q, k, out):
    """q [4, D], k [tokens, D], out [4, tokens]"""
    heads, (tokens, dim) = 1, k.shape
    grid = (triton.cdiv(tokens, 16), q.shape[0] // heads)
    launch(scores_kernel, grid, q, k, out, tokens, HEADS=heads, D=dim, BLOCK=16)
