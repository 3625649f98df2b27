"""decode_attention: out[b, h] = softmax(scale * q[b, h] . K[b, h / group]) V[b, h / group],
for one new token of each sequence

  q [batch, q_heads, head_dim]   views of the packed qkv
  k_cache, v_cache [pages, kv_heads, page_size, head_dim]
  block_table [batch, max_pages] int32   context_lens [batch] int32
  k_scales, v_scales   of a quantised cache, whose codes and scales lab/formats/kv.py describes, or None
  out [batch, q_heads, head_dim]
Split-KV: `splits` blocks share a sequence's context, and the last one to finish merges their results (the
online softmax of Milakov and Gimelshein, arXiv 1805.02867; FlashDecoding's split). The context's length is
read on the device, so one captured graph serves a growing context. A context of 0 gives zeros. Rounding:
float32 throughout, one rounding at the end; but tensor cores may round the weights (see tolerance()). Codes
are multiplied as they are: scales are applied to scores, and to the weights (int8) or the sums (fp8) of
values.
Kernels: cuda_src/decode_attention.cu, triton_kernels/decode_attention.py
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lab import peers, spaces
from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse, rows_of_heads
from lab.formats import kv
from lab.ops.kv_append import check_cache, check_pages, paged_cache, paged_heads_of, pages_of, quantised
from lab.ops.rope import packed_qkv

HEAD_DIMS = (64, 96, 128)
MAX_GROUP = 16
MIN_TOKENS_PER_SPLIT = 64  # a smaller split has less than a tile: it adds to the merge and gains no bandwidth
BLOCKS_PER_MULTIPROCESSOR = 2  # enough 16-byte loads in flight to hide DRAM latency on sm_80 and sm_90


@dataclass(frozen=True)
class Workspace:
    """Memory for the results of the splits: partial float32 [batch, kv_heads, splits, group, head_dim + 2],
    and tickets int32 [batch, kv_heads], zero between launches."""

    partial: torch.Tensor
    tickets: torch.Tensor

    @classmethod
    def empty(cls, batch, q_heads, kv_heads, head_dim, splits, device):
        return cls(
            torch.empty(batch, kv_heads, splits, q_heads // kv_heads, head_dim + 2, device=device),
            torch.zeros(batch, kv_heads, dtype=torch.int32, device=device),
        )


def choose_splits(batch: int, kv_heads: int, max_context: int, multiprocessors: int) -> int:
    """How many blocks share one KV head's context: enough to fill the card, but with at least
    MIN_TOKENS_PER_SPLIT tokens each."""
    fill = math.ceil(BLOCKS_PER_MULTIPROCESSOR * multiprocessors / (batch * kv_heads))
    return max(1, min(fill, math.ceil(max_context / MIN_TOKENS_PER_SPLIT)))


def validate(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    splits: int = 1,
    workspace: Workspace | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    name, shape, dtype = "decode_attention", q.shape, q.dtype
    if len(shape) != 3:
        refuse(name, "q must be [batch, q_heads, head_dim]")
    batch, q_heads, head_dim = shape
    if dtype not in FLOATS:
        refuse(name, f"takes no {dtype}: q must be float32, float16 or bfloat16")
    if head_dim not in HEAD_DIMS:
        refuse(name, f"head_dim {head_dim} is not 64, 96 or 128")
    check_cache(name, k_cache, v_cache, block_table, batch, None, head_dim, dtype, k_scales, v_scales)
    kv_heads = k_cache.shape[1]
    if not kv_heads or q_heads % kv_heads or q_heads > kv_heads * MAX_GROUP:
        refuse(name, f"{q_heads} query heads must be 1 to {MAX_GROUP} times the {kv_heads} KV heads")
    if not (context_lens.shape == (batch,) and context_lens.dtype == torch.int32):
        refuse(name, "context_lens must be int32 [batch]")
    if splits < 1:
        refuse(name, f"splits must be at least 1, not {splits}")
    device = k_cache.get_device()
    rows_of_heads(name, device, q)
    dense(name, device, context_lens)
    if workspace is not None:
        partial, tickets = workspace.partial, workspace.tickets
        if not (
            partial.shape == (batch, kv_heads, splits, q_heads // kv_heads, head_dim + 2)
            and tickets.shape == (batch, kv_heads)
        ):
            refuse(name, "the workspace is of another size")
        if partial.dtype != torch.float32 or tickets.dtype != torch.int32:
            refuse(name, "the workspace must hold float32 partial results and int32 tickets")
        dense(name, device, partial, tickets)
    if out is not None:
        if not (out.shape == shape and out.dtype == dtype):
            refuse(name, "out must look like q")
        dense(name, device, out)


def outputs(q, *args, **options):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def new_workspace(q, k_cache, splits):
    """A workspace for a call without one. A decode step passes its own, so that no memory is allocated in
    it."""
    return Workspace.empty(q.shape[0], q.shape[1], k_cache.shape[1], q.shape[2], splits, q.device)


def reference(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
):
    k_cache, v_cache = kv.cache_numbers(k_cache, k_scales), kv.cache_numbers(v_cache, v_scales)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group, page = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    for b, length in enumerate(context_lens.tolist()):
        if length <= 0:
            continue
        pages = block_table[b, : -(-length // page)].long()
        keys, values = (  # [length, q_heads, head_dim]
            cache[pages].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )
        weight = torch.softmax(torch.einsum("hd,lhd->hl", q[b].double(), keys) * scale, dim=-1)
        out[b] = torch.einsum("hl,lhd->hd", weight, values)
    return (out,)


def cuda(
    kernels,
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    workspace = workspace or new_workspace(q, k_cache, splits)
    batch, q_heads, head_dim = q.shape
    kernels.decode_attention(
        q=(q.data_ptr(), q.stride(0)),
        cache=pages_of(k_cache, v_cache, block_table, k_scales, v_scales),
        context_lens=context_lens.data_ptr(),
        out=out.data_ptr(),
        splits=(workspace.partial.data_ptr(), workspace.tickets.data_ptr(), splits),
        batch=batch,
        q_heads=q_heads,
        head_dim=head_dim,
        scale=scale,
        dtype=DTYPE_CODES[q.dtype],
        stream=kernels.stream(),
    )


def triton(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    from triton_kernels.decode_attention import decode_attention

    workspace = workspace or new_workspace(q, k_cache, splits)
    decode_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        scale,
        splits,
        workspace.partial,
        workspace.tickets,
        out,
        k_scales,
        v_scales,
    )


def torch_(
    q,
    k_cache,
    v_cache,
    block_table,
    context_lens,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    page_size, width = k_cache.shape[2], block_table.shape[1]
    live = torch.arange(width * page_size, device=q.device) < context_lens[:, None]
    # Table entries and slots past the context may hold anything. Slots are set to 0 before the products,
    # because a weight of 0 times NaN or inf would be NaN.
    pages = torch.where(live[:, ::page_size], block_table, 0).long()
    keys, values = (
        torch.where(
            live[:, None, :, None], paged_numbers(cache, scales, pages).transpose(1, 2).flatten(2, 3), 0
        )
        for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
    )
    q = q.to(keys.dtype)
    attended = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=live[:, None, None], scale=scale, enable_gqa=True
    )[:, :, 0]
    out.copy_(torch.where(context_lens[:, None, None] > 0, attended, 0))


def paged_numbers(cache, scales, pages):
    """The numbers of some pages of a cache, in its dtype; in float32 where it is quantised."""
    if scales is None:
        return cache[pages]
    return kv.numbers(cache[pages], scales if scales.dim() == 1 else scales[pages])


def contents(a):
    """Raises LabError for a context longer than its row of the table, for a page that the cache does not
    have, and for a ticket that is not 0."""
    check_context("decode_attention", a.block_table, a.context_lens, a.k_cache)
    kv.check_scales("decode_attention", a.k_cache, a.k_scales, a.v_scales)
    check_tickets("decode_attention", a.workspace)


def check_tickets(op, workspace):
    """Raises LabError for a ticket that is not 0 between launches: no block would then be counted as the last
    of its group."""
    if workspace is not None and bool(workspace.tickets.any()):
        refuse(
            op,
            "the workspace's tickets must be 0 between launches: make a new one by Workspace.empty, also "
            "after a launch that failed",
        )


def check_context(op, block_table, context_lens, k_cache):
    last = [(length - 1) // k_cache.shape[2] if length > 0 else -1 for length in context_lens.tolist()]
    check_pages(op, block_table.tolist(), last, k_cache, "context_lens", context_lens)


def inputs(
    rand,
    lengths,
    q_heads,
    kv_heads,
    head_dim,
    page_size=16,
    splits=1,
    poison=False,
    sharp=1.0,
    mean=0.0,
    low=False,
    kv_dtype=None,
):
    """poison: NaN and inf in every slot that holds no token. kv_dtype: the format of the cache. sharp: a
    factor of q, and so of the scores; 0 makes all weights equal. mean: the mean of v. low: q above 0 and k
    below, so that every score is below 0."""
    q, _, _ = packed_qkv(rand, len(lengths), q_heads, kv_heads, head_dim)
    k_cache, v_cache, block_table = paged_cache(rand, lengths, kv_heads, head_dim, page_size)
    if low:
        q.abs_()
        k_cache.abs_().neg_()
    k_cache, v_cache, *scales = quantised(rand, k_cache, v_cache.add_(mean), kv_dtype)
    if poison:
        poison_unused(lengths, lengths, k_cache, v_cache, block_table, *scales)
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=rand.device)
    args = q.mul_(sharp), k_cache, v_cache, block_table, context_lens, head_dim**-0.5, splits
    return (*args, None, *scales) if scales else args


def poison_unused(cached, lengths, k_cache, v_cache, block_table, k_scales=None, v_scales=None):
    """Writes NaN, inf and -inf into all slots but those of the first cached[b] tokens of each row; into a
    quantised cache the codes of NaN, and NaN, inf and -inf as scales. Table entries past lengths[b] tokens
    become page numbers that the cache does not have; rows without a token keep their entries."""
    page_size, used = k_cache.shape[2], torch.zeros(k_cache.shape[0], k_cache.shape[2], dtype=torch.bool)
    for b, (tokens, length) in enumerate(zip(cached, lengths, strict=True)):
        for i, page in enumerate(block_table[b].tolist()):
            used[page, : max(0, tokens - i * page_size)] = True
        if length > 0:
            block_table[b, -(-length // page_size) :] = 1 << 30
    page, slot = (~used).nonzero(as_tuple=True)
    page, slot = page.to(k_cache.device), slot.to(k_cache.device)
    for i, (cache, scales) in enumerate(((k_cache, k_scales), (v_cache, v_scales))):
        which = (page + slot + i) % 3
        if scales is not None:
            cache[page, :, slot] = 127  # NaN as e4m3
            cache = scales[..., None]
        if cache.dim() == 4:
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=cache.dtype, device=cache.device)
            cache[page, :, slot] = bad[which][:, None, None]


def nbytes(a):
    """K and V of every token once, q, out, and the block-table entries that name the pages. Reads
    context_lens."""
    return attended_bytes(a.q, a.k_cache, a.context_lens)


def attended_bytes(q, k_cache, context_lens):
    tokens = int(context_lens.clamp(min=0).sum())
    heads = 2 * tokens * k_cache.shape[1]
    cached = heads * (k_cache.shape[3] * k_cache.itemsize + kv.scale_bytes(k_cache.dtype))
    return cached + 2 * q.nbytes + 4 * math.ceil(tokens / k_cache.shape[2]) + context_lens.nbytes


def tolerance(a):
    """(rtol, atol): one rounding to T, and the float32 errors of the softmax.

    A score's float32 error is a few eps of |q||k|, and changes a weight by that share. The output is an
    average of v, so its error is that share of the largest v. A float32 sum of n terms adds at most about
    sqrt(n) / 2 eps. Half-precision tensor cores round the weights themselves to T before the product with V
    (as FlashAttention does), which adds half an eps of the largest average of |v|. With a cache in int8 they
    round the weights, times the scales of V, to bfloat16, since these products may be too small for float16.
    """
    eps = torch.finfo(a.q.dtype).eps
    of_weights = 0.0 if a.q.dtype == torch.float32 else eps / 2
    rtol = eps
    if shared := shared_rounding(a):
        of_weights = shared
        rtol += shared  # of a context of one token the average of |v| is the result
    keys, values = finite_numbers(a.k_cache, a.k_scales), finite_numbers(a.v_cache, a.v_scales)
    score = a.scale * float(a.q.double().norm(dim=-1).max()) * float(keys.norm(dim=-1).max())
    v_max = float(values.abs().max())
    steps = 4 * (1 + score) + max(0, int(a.context_lens.max())) ** 0.5 / 2
    return rtol, steps * EPS32 * v_max + of_weights


def shared_rounding(a):
    """Of the weights times the scales of V with a cache in int8, which half precision rounds to bfloat16:
    where one token has nearly all the weight, all elements of a head share it."""
    rounded = a.q.dtype != torch.float32 and a.v_cache.dtype == kv.DTYPES["int8"]
    return torch.finfo(torch.bfloat16).eps / 2 if rounded else 0.0


def finite_numbers(cache, scales):
    """A cache's numbers in float64, 0 where there is none: in slots that hold no token."""
    return kv.cache_numbers(cache, scales).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def launch(batch, context, multiprocessors, sizes):
    """The sizes that a decoder chooses for a batch at a context."""
    return {"splits": choose_splits(batch, sizes["kv_heads"], context, multiprocessors)}


# Cases of a quantised cache, in each of its formats.
QUANTISED = (
    (
        "page boundaries, an idle row, NaN wherever there is no token; GQA group 3",
        dict(
            lengths=(1, 15, 16, 17, 0, 64, 65, 130), q_heads=9, kv_heads=3, head_dim=64, splits=2, poison=True
        ),
    ),
    ("one split, MHA, head 96", dict(lengths=(97, 33), q_heads=2, kv_heads=2, head_dim=96)),
    (
        "the largest group, head 128, a larger page, NaN wherever there is no token",
        dict(
            lengths=(31, 129, 700), q_heads=16, kv_heads=1, head_dim=128, page_size=64, splits=3, poison=True
        ),
    ),
    (
        "large scores, many splits",
        dict(lengths=(1100, 3), q_heads=4, kv_heads=2, head_dim=64, splits=18, sharp=20.0),
    ),
)

op = Op(
    name="decode_attention",
    summary="out = softmax(scale * q K^T) V over a paged KV cache",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=lambda a: 4 * a.q.shape[1] * a.q.shape[2] * int(a.context_lens.clamp(min=0).sum()),
    tolerance=tolerance,
    shared_rounding=shared_rounding,
    state=("workspace",),
    contents=contents,
    workspace=lambda a: new_workspace(a.q, a.k_cache, a.splits),
    plans=("basic",),
    uses=lambda c: [(None, paged_heads_of(c))],
    launch=launch,
    has_context=True,
    rows=lambda batch, context: {"lengths": (context,) * batch},
    cold=("k_cache", "v_cache"),
    peers=(peers.SDPA_FLASH, peers.CUDNN, *peers.FLASHINFER),
    color="#ddcc77",
    inspect_sizes=dict(lengths=(8192,), splits=33, q_heads=32, kv_heads=8, head_dim=128),
    tuned_by=("q_heads", "kv_heads", "head_dim", "page_size"),
    spaces={"cuda": spaces.splits, "triton": spaces.attention},
    cases=(
        case(
            "context 1, page boundary minus and plus one, an idle row, a tile's boundary; GQA group 3",
            lengths=(1, 15, 16, 17, 0, 64, 65, 130),
            q_heads=9,
            kv_heads=3,
            head_dim=64,
            splits=2,
        ),
        case(
            "more splits than tiles: empty splits",
            lengths=(5, 200, 70),
            q_heads=8,
            kv_heads=2,
            head_dim=128,
            splits=7,
        ),
        case(
            "more splits than one step of the merge handles",
            lengths=(1100, 40),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=18,
        ),
        case("one sequence, one split, MHA, head 96", lengths=(97,), q_heads=2, kv_heads=2, head_dim=96),
        case(
            "MQA with the largest group, a larger page",
            lengths=(31, 129),
            q_heads=16,
            kv_heads=1,
            head_dim=64,
            page_size=64,
            splits=3,
        ),
        case(
            "a group of 5, no power of two; head 96",
            lengths=(33,),
            q_heads=10,
            kv_heads=2,
            head_dim=96,
            splits=2,
        ),
        case(
            "64 sequences of different lengths",
            lengths=tuple(range(1, 65)),
            q_heads=4,
            kv_heads=1,
            head_dim=64,
            splits=2,
        ),
        case(
            "NaN, inf and wrong pages wherever there is no token",
            lengths=(1, 15, 0, 17, 64, 70),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=2,
            poison=True,
        ),
        case(
            "the same with one split and a larger page",
            lengths=(3, 65, 40),
            q_heads=4,
            kv_heads=2,
            head_dim=128,
            page_size=64,
            poison=True,
        ),
        case(
            "scores so far below 0 that their exponentials vanish unless the largest score is subtracted",
            lengths=(1, 60, 300),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=3,
            sharp=40.0,
            low=True,
        ),
        case(
            "scores whose exponentials overflow unless the largest score is subtracted",
            lengths=(1, 60, 300),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=3,
            sharp=30.0,
        ),
        case(
            "a sum of many equal weights",
            lengths=(3000,),
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            sharp=0.0,
            mean=4.0,
        ),
        case(
            "the same in splits",
            lengths=(3000,),
            q_heads=2,
            kv_heads=1,
            head_dim=64,
            splits=9,
            sharp=0.0,
            mean=4.0,
        ),
        *(
            case(f"{kv_dtype}: {why}", kv_dtype=kv_dtype, **sizes)
            for kv_dtype in kv.DTYPES
            for why, sizes in QUANTISED
        ),
    ),
)
