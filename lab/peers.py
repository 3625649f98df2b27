"""The vendor's and other projects' kernels for the same work as an op's, as calls on its arguments.

A contract says which of them are its peers (Op.peers). They run on a GPU only; one whose package is not
installed is left out, and the env record says so.
"""

import functools

import torch
import torch.nn.functional as F

from lab.contract import Peer


def each(make_one):
    """Peer.make from a function that takes the arguments of one call."""
    return lambda sets: [make_one(*args) for args in sets]


def cublas(x, w, bias=None, *_):
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    if bias is None:
        return lambda: torch.mm(x, w.t(), out=out)
    return lambda: torch.addmm(bias, x, w.t(), out=out)


def int4_mm(x, w, *_):
    """torch's _weight_int4pack_mm on weights of int4-g128, repacked in its own layout.

    It wants weight = (code - 8) * scale + zero, scale and zero in bfloat16 [groups, n, 2]: so the scale is
    rounded, which lets its result differ a little from the reference.
    """
    codes = w.raw_codes()
    scales = w.scales_by_row()[:, : -(-w.k // w.format.group), 0].to(torch.bfloat16).t()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
    if x.is_cuda:
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # of two columns the first in the upper 4 bits
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        run = torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
        run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda: run(x, packed, w.format.group, scales_and_zeros)


def fp8_mm(x, w, *_):
    """torch's _scaled_mm on weights of fp8, a scale a row. It multiplies fp8 by fp8, so x is rounded to it as
    well, here and not in its time; its rows are padded to a multiple of 16."""
    rows = x.shape[0]
    padded = torch.zeros(-(-rows // 16) * 16, x.shape[1], device=x.device)
    padded[:rows] = x
    scale = (padded.abs().amax(1, keepdim=True) / FP8_LARGEST).clamp_(min=1e-12)
    x8 = (padded / scale).to(torch.float8_e4m3fn)
    w8 = w.raw_codes().contiguous().view(torch.float8_e4m3fn).t()
    scale_w = w.scales_by_row()[:, 0].float().t().contiguous()
    out_dtype = x.dtype

    def call():
        return torch._scaled_mm(x8, w8, scale_a=scale, scale_b=scale_w, out_dtype=out_dtype)[:rows]

    return call


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


def flashinfer(tensor_cores, sets):
    """FlashInfer's paged decode on the very same cache (layout "HND"), planned once: the sets share a block
    table. tensor_cores: which of its two kernels; neither is the faster one at all sizes."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, k_cache, _, block_table, context_lens, scale = sets[0][:6]
    page_size = k_cache.shape[2]
    pages = -(-uniform(context_lens) // page_size)
    indptr = torch.arange(0, q.shape[0] * pages + 1, pages, dtype=torch.int32, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND", use_tensor_cores=tensor_cores
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


def liger_rmsnorm(x, w, eps, *_):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)


def liger_silu_mul(gate_up, *_):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (part.contiguous() for part in gate_up.chunk(2, dim=-1))
    return lambda: LigerSiLUMulFunction.apply(gate, up)


def liger_rope(q, k, positions, cos_sin, *_):
    """Liger's kernel works in place on contiguous heads [batch, 1, heads, head_dim], which it takes as a view
    with the heads before the token. The rows of the table that belong to the positions are looked up here."""
    from liger_kernel.ops.rope import LigerRopeFunction

    query, key = (x.unsqueeze(1).contiguous().transpose(1, 2) for x in (q, k))
    cos, sin = cos_sin[positions.clamp(min=0).long()].chunk(2, dim=-1)
    cos, sin = (torch.cat((half, half), -1).unsqueeze(1) for half in (cos, sin))  # [batch, 1, head_dim]

    def call():
        turned = LigerRopeFunction.apply(query, key, cos, sin)
        return tuple(x.squeeze(2) for x in turned[:2])

    return call


def gemlite(x, w, *_):
    """GemLite's Triton kernels on weights of int4-g128, repacked in its own layout: weight = (code - 8) *
    scale, with the scale rounded to the dtype of x."""
    from gemlite.helper import A16Wn

    codes = w.raw_codes().contiguous()
    scales = w.scales_by_row()[:, : -(-w.k // w.format.group), 0].to(x.dtype)
    layer = A16Wn(device=str(x.device)).from_weights(
        codes, scales, torch.full_like(scales, 8), W_nbits=4, group_size=w.format.group
    )
    return lambda: layer(x)


def half_precision(tensor):
    return tensor.dtype in (torch.float16, torch.bfloat16)


def in_format(a, name):
    """Whether the weights of a call of linear are packed in a format, and it has what peers of packed
    weights want: x in bf16 and no bias."""
    return getattr(a.w, "format_name", None) == name and a.x.dtype == torch.bfloat16 and a.bias is None


def half_attention(a):
    """Half precision, and a KV cache that is not quantised."""
    return half_precision(a.q) and a.k_cache.dtype == a.q.dtype


FP8_LARGEST = 448.0
CUBLAS = Peer("cublas", each(cublas), takes=lambda a: isinstance(a.w, torch.Tensor))
INT4_MM = Peer(
    "int4pack_mm",
    each(int4_mm),
    takes=lambda a: in_format(a, "int4-g128") and a.w.k % 128 == 0 and a.w.rows % 8 == 0,
)
GEMLITE = Peer(
    "gemlite",
    each(gemlite),
    takes=lambda a: in_format(a, "int4-g128") and a.w.k % 128 == 0 and a.w.rows % 32 == 0,
    error=0.05,  # measured with one row of x, which it sums in the dtype of x: 0.02 at k=4096, 0.035 at 14336
    module="gemlite",
)
SCALED_MM = Peer(
    "scaled_mm",
    each(fp8_mm),
    takes=lambda a: in_format(a, "fp8") and a.w.k % 16 == 0 and a.w.rows % 16 == 0,
    error=0.06,  # of x rounded to fp8
)
SDPA_FLASH = Peer(
    "sdpa_flash", each(functools.partial(sdpa, "FLASH_ATTENTION")), takes=half_attention, copies=True
)
CUDNN = Peer("cudnn", each(functools.partial(sdpa, "CUDNN_ATTENTION")), takes=half_attention, copies=True)
FLASHINFER = tuple(
    Peer(name, functools.partial(flashinfer, tensor_cores), takes=half_attention, module="flashinfer")
    for name, tensor_cores in (("flashinfer", False), ("flashinfer_tensor", True))
)
LIGER_RMSNORM = Peer(  # it has no residual add and no norm of heads inside a packed row
    "liger",
    each(liger_rmsnorm),
    takes=lambda a: half_precision(a.x) and a.x.dim() == 2 and a.residual is None,
    module="liger_kernel",
)
LIGER_SILU_MUL = Peer(
    "liger",
    each(liger_silu_mul),
    takes=lambda a: half_precision(a.gate_up),
    copies=True,
    module="liger_kernel",
)
LIGER_ROPE = Peer(
    "liger",
    each(liger_rope),
    takes=lambda a: half_precision(a.q),
    copies=True,  # q and k, which a model has packed together with v
    module="liger_kernel",
)
