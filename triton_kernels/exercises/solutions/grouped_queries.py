"""Solution of grouped_queries: scores[h, t] = q[h] . k[t] for the query heads that share one KV head.

With a program for each query head all keys are loaded once for each head: four times, and in a decode step
the keys are what costs time. A program takes all heads of the group: it loads a tile of keys once and
multiplies it with every query. (In the ops' own kernels that product is tl.dot, on tensor cores.)
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
    heads, (tokens, dim) = q.shape[0], k.shape
    grid = (triton.cdiv(tokens, 16), q.shape[0] // heads)
    launch(scores_kernel, grid, q, k, out, tokens, HEADS=heads, D=dim, BLOCK=16)
