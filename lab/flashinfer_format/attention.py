"""gqa_paged_decode_h*_kv*_d*_ps*: decode attention in the words of flashinfer-bench, and how a call of it
becomes one of our decode_attention, and back.

Theirs has the caches as [pages, page_size, kv_heads, head_dim] (NHD) or, as ours, as
[pages, kv_heads, page_size, head_dim] (HND), ragged lists of pages instead of a table, and a second output:
the base-2 log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lab.contract import EPS32, Op, case, dense
from lab.flashinfer_format.schema import Definition
from lab.ops import decode_attention
from lab.ops.kv_append import PAGE_SIZES

NHD = ["num_pages", "page_size", "num_kv_heads", "head_dim"]
HND = ["num_pages", "num_kv_heads", "page_size", "head_dim"]
MOST_SEQUENCES = 64
MOST_TOKENS = 1 << 14  # in all sequences of a case
MOST_HEADS = 1024


def mismatch(definition: Definition) -> str | None:
    sizes = definition.constants
    if sizes["page_size"] not in PAGE_SIZES:
        return f"page_size {sizes['page_size']} is not one of {', '.join(map(str, PAGE_SIZES))}"
    if sizes["head_dim"] not in decode_attention.HEAD_DIMS:
        return f"head_dim {sizes['head_dim']} is not 64, 96 or 128"
    heads, kv_heads = sizes["num_qo_heads"], sizes["num_kv_heads"]
    if heads > MOST_HEADS:
        return f"{heads} heads are more than {MOST_HEADS}"
    if not kv_heads or heads % kv_heads or heads > kv_heads * decode_attention.MAX_GROUP:
        return f"{heads} query heads are not 1 to {decode_attention.MAX_GROUP} times the {kv_heads} KV heads"
    if definition.inputs["k_cache"].shape != definition.inputs["v_cache"].shape:
        return "k_cache and v_cache have different layouts"
    return None


def to_layout(cache: torch.Tensor, layout: list[str]) -> torch.Tensor:
    """A cache of ours, [pages, kv_heads, page_size, head_dim], in a layout of theirs, or back."""
    return cache.transpose(1, 2).contiguous() if layout == NHD else cache


def to_ragged(block_table: torch.Tensor, context_lens: torch.Tensor, page_size: int):
    """(kv_indptr, kv_indices, kv_last_page_len) of a table of pages: sequence b has the pages
    kv_indices[kv_indptr[b] : kv_indptr[b + 1]], the last of which holds kv_last_page_len[b] tokens."""
    pages = -(-context_lens.clamp(min=0) // page_size)
    indptr = torch.zeros(len(pages) + 1, dtype=torch.int32, device=pages.device)
    indptr[1:] = pages.cumsum(0)
    indices = torch.cat([row[:n] for row, n in zip(block_table, pages.tolist(), strict=True)])
    last = torch.where(pages > 0, context_lens - (pages - 1) * page_size, 0)
    return indptr, indices.contiguous(), last.to(torch.int32)


def to_table(indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, page_size: int):
    """(block_table, context_lens) of ragged lists of pages: the way back. Entries that are not used are 0."""
    pages = indptr.diff()
    table = torch.zeros(len(pages), max(1, int(pages.max())), dtype=torch.int32, device=indptr.device)
    for b, (begin, n) in enumerate(zip(indptr.tolist(), pages.tolist())):
        table[b, :n] = indices[begin : begin + n]
    return table, torch.where(pages > 0, (pages - 1) * page_size + last, 0).to(torch.int32)


def log_sum_exp2(q, k_cache, block_table, context_lens, scale) -> torch.Tensor:
    """float64 [batch, q_heads]: log2 of the sum of exp(scale * q . k) over a sequence's tokens; -inf where it
    has none."""
    found = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    group, page = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    for b, length in enumerate(context_lens.tolist()):
        if length > 0:
            pages = block_table[b, : -(-length // page)].long()
            keys = k_cache[pages].transpose(1, 2).flatten(0, 1)[:length].double()
            scores = torch.einsum("hd,lhd->hl", q[b].double(), keys.repeat_interleave(group, dim=1)) * scale
            found[b] = torch.logsumexp(scores, dim=-1) / math.log(2)
    return found


def ops(definition: Definition) -> dict[str, Op]:
    sizes, layout = definition.constants, definition.inputs["k_cache"].shape
    page_size = sizes["page_size"]

    def validate(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        sm_scale: float,
        lse: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> None:
        tensors = q, k_cache, v_cache, kv_indptr, kv_last_page_len, lse
        dense(definition.name, q.get_device(), *tensors, *(() if out is None else (out,)))

    def ours(q, k_cache, v_cache, indptr, indices, last, scale, lse):
        table, lengths = to_table(indptr, indices, last, page_size)
        return q, to_layout(k_cache, layout), to_layout(v_cache, layout), table, lengths, scale

    def inputs(rand, lengths, **kind):
        q, k_cache, v_cache, table, lens, scale, _ = decode_attention.inputs(
            rand, lengths, sizes["num_qo_heads"], sizes["num_kv_heads"], sizes["head_dim"], page_size, **kind
        )
        lse = torch.full(q.shape[:2], torch.nan, dtype=torch.float32, device=q.device)
        ragged = to_ragged(table, lens, page_size)
        caches = to_layout(k_cache, layout), to_layout(v_cache, layout)
        return q.contiguous(), *caches, *ragged, scale, lse

    def reference(*args):
        a = ours(*args)
        q, k_cache, _, table, lengths, scale = a
        return *decode_attention.reference(*a), log_sum_exp2(q, k_cache, table, lengths, scale)

    def tolerance(a):
        bound = decode_attention.op.bound(*ours(*vars(a).values()))
        keys = bound.k_cache.double()
        score = bound.scale * float(bound.q.double().norm(dim=-1).max()) * float(keys.norm(dim=-1).max())
        steps = 4 * (1 + score) + max(0, int(bound.context_lens.max())) ** 0.5 / 2
        # A score's error is a few eps of |q||k| (decode_attention.tolerance); so is that of the logarithm of
        # the sum of exponentials, times log2(e), and one step of the logarithm itself.
        return [decode_attention.tolerance(bound), (2 * EPS32, steps * EPS32 / math.log(2))]

    op = replace(
        decode_attention.op,
        validate=validate,
        outputs=lambda q, *others: torch.empty_like(q),
        inputs=inputs,
        reference=reference,
        tolerance=tolerance,
        mutates=("lse",),
        state=(),
        contents=None,
        workspace=None,
    )
    return {"decode_attention": op}


CONSTRAINTS = ("len_indptr == batch_size + 1", "num_kv_indices == kv_indptr[-1].item()")


def cases(definition: Definition):
    page = definition.constants["page_size"]
    yield case("page boundaries", lengths=(1, page - 1, page, page + 1, 3 * page + 5))
    yield case("a sequence without a token", lengths=(page, 0, 2 * page + 3))
    yield case("one long sequence", lengths=(20 * page + 7,))
    yield case("NaN and inf in slots that hold no token", lengths=(5, page + 2), poison=True)


def case_of(definition: Definition, axes: dict):
    """All sequences alike: the lengths are contents of the workload's files, which are not read."""
    batch, pages = axes.get("batch_size"), axes.get("num_kv_indices")
    if not batch or not pages:
        return "names no batch_size or no num_kv_indices"
    length = pages * definition.constants["page_size"] // batch
    if batch > MOST_SEQUENCES or batch * length > MOST_TOKENS:
        return f"{batch} sequences of {length} tokens are more than the judge's {MOST_TOKENS} tokens"
    return {"lengths": (max(1, length),) * batch}
