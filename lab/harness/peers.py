"""The vendor's and other projects' kernels for the same work, as calls on the arguments of an op's contract.

`peers(op, args)` lists Peer objects. `make(sets)` takes a list of argument tuples of one shape, prepares
whatever the peer needs outside the timing (its own KV layout, its plan) and returns one call per set. A peer
that is not installed is not listed; the env record says so. Peers run on a GPU only.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Peer:
    """own: it copies the bulk of the data into a layout of its own, so it has no in-model time and no
    caller's time."""

    name: str
    op: str
    make: Callable
    own: bool = False
    module: str | None = None  # the package it needs


def peers(op: str, args) -> list[Peer]:
    return [
        p
        for p in TABLE
        if p.op == op and fits(p, args) and (p.module is None or importlib.util.find_spec(p.module))
    ]


def fits(peer, args):
    """Peers take 16-bit floats, except cuBLAS; Liger has no residual add and no norm of heads inside a packed
    row."""
    if peer.name == "cublas":
        return True
    if peer.name == "liger" and (args[0].ndim != 2 or len(args) > 3):
        return False
    return args[0].dtype in (torch.float16, torch.bfloat16)


def each(make_one):
    """make(sets) from a function of one set's arguments."""
    return lambda sets: [make_one(*args) for args in sets]


def cublas(x, w, bias=None, *_):
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    if bias is None:
        return lambda: torch.mm(x, w.t(), out=out)
    return lambda: torch.addmm(bias, x, w.t(), out=out)


def contiguous_kv(cache, block_table, context):
    """[batch, kv_heads, context, head_dim] of one paged cache [pages, kv_heads, page_size, head_dim]."""
    paged = cache[block_table.long()]  # [batch, pages, kv_heads, page_size, head_dim]
    batch, pages, heads, page, dim = paged.shape
    return paged.permute(0, 2, 1, 3, 4).reshape(batch, heads, pages * page, dim)[:, :, :context].contiguous()


def sdpa(backend, q, k_cache, v_cache, block_table, context_lens, scale, *_):
    """torch's scaled_dot_product_attention by one of its backends, on contiguous KV of one common length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context = uniform(context_lens)
    k, v = (contiguous_kv(c, block_table, context) for c in (k_cache, v_cache))
    query = q.unsqueeze(2)  # [batch, q_heads, 1, head_dim]
    gqa = q.shape[1] != k.shape[1]
    only = [getattr(SDPBackend, backend)]

    def call():
        with sdpa_kernel(only):
            return F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=gqa)

    return call


def uniform(context_lens):
    lengths = set(context_lens.tolist())
    if len(lengths) != 1:
        raise ValueError("this peer needs sequences of one length")
    return lengths.pop()


def flashinfer(sets):
    """FlashInfer's paged decode on the very same cache (layout "HND"), planned once: the sets share a block
    table."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, k_cache, _, block_table, context_lens, scale = sets[0][:6]
    page_size = k_cache.shape[2]
    pages = -(-uniform(context_lens) // page_size)
    indptr = torch.arange(0, q.shape[0] * pages + 1, pages, dtype=torch.int32, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND"
    )
    wrapper.plan(
        indptr,
        block_table[:, :pages].contiguous().view(-1),
        (context_lens - 1) % page_size + 1,
        q.shape[1],
        k_cache.shape[1],
        q.shape[2],
        page_size,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
        sm_scale=scale,
    )

    def bind(q, k_cache, v_cache):
        query, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return lambda: wrapper.run(query, (k_cache, v_cache), out=out)

    return [bind(*args[:3]) for args in sets]


def liger_rmsnorm(x, w, eps):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)


def liger_silu_mul(gate_up, *_):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (part.contiguous() for part in gate_up.chunk(2, dim=-1))
    return lambda: LigerSiLUMulFunction.apply(gate, up)


TABLE = (
    Peer("cublas", "linear", each(cublas)),
    Peer("sdpa_flash", "decode_attention", each(functools.partial(sdpa, "FLASH_ATTENTION")), own=True),
    Peer("cudnn", "decode_attention", each(functools.partial(sdpa, "CUDNN_ATTENTION")), own=True),
    Peer("flashinfer", "decode_attention", flashinfer, module="flashinfer"),
    Peer("liger", "rmsnorm", each(liger_rmsnorm), module="liger_kernel"),
    Peer("liger", "silu_mul", each(liger_silu_mul), own=True, module="liger_kernel"),
)
