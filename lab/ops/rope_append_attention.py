"""rope_append_attention: per-head norm (Qwen3), rope, kv_append and decode_attention of one token,
in one kernel

  q [batch, q_heads, head_dim], k, v [batch, kv_heads, head_dim]   views of the packed qkv, left as they are
  q_norm, k_norm [head_dim] or None   positions [batch] int32   cos_sin [max_positions, head_dim] float32
  caches, their scales, block_table, scale, splits, workspace and out as in decode_attention.py;
  the context is positions + 1
The block that owns the new token writes its key and value to their page, and attends to it.
A negative position marks an idle row: nothing is appended and its output is zeros.
Rounding: as the single ops do: after the norm, after rope (both to T), once at the end. With a quantised
cache the new token, too, is attended to as it is stored.
Kernels: cuda_src/rope_append_attention.cu, triton_kernels/rope_append_attention.py
"""

import torch

from lab import spaces
from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, refuse, rows_of_heads
from lab.formats import kv
from lab.ops import decode_attention, kv_append, rmsnorm, rope
from lab.ops.kv_append import appended_bytes, check_append, paged_cache, paged_heads_of, quantised
from lab.ops.rope import check_positions, packed_qkv


def validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    splits: int = 1,
    workspace: decode_attention.Workspace | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    name = "rope_append_attention"
    decode_attention.validate(
        q, k_cache, v_cache, block_table, positions, scale, splits, workspace, k_scales, v_scales, out
    )
    shape = (q.shape[0], k_cache.shape[1], q.shape[2])
    if not (k.shape == shape and v.shape == shape and k.dtype == v.dtype == q.dtype):
        refuse(name, "k and v must be [batch, kv_heads, head_dim] in q's dtype")
    device = q.get_device()
    rows_of_heads(name, device, k, v)
    if not (cos_sin.dim() == 2 and cos_sin.shape[1] == shape[2] and cos_sin.dtype == torch.float32):
        refuse(name, "cos_sin must be float32 [max_positions, head_dim]")
    dense(name, device, cos_sin)
    if (q_norm is None) != (k_norm is None):
        refuse(name, "q_norm and k_norm come together")
    if q_norm is not None:
        if not (q_norm.shape == k_norm.shape == shape[2:] and q_norm.dtype == k_norm.dtype == q.dtype):
            refuse(name, "q_norm and k_norm must be [head_dim] in q's dtype")
        dense(name, device, q_norm, k_norm)


def outputs(q, *args, **options):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def rotated(q, k, q_norm, k_norm, eps, positions, cos_sin):
    """q and k after norm and rope, in float64 arithmetic, rounded to their dtype after each of the two."""
    if q_norm is not None:
        q, k = (rmsnorm.reference(x, w, eps)[0].to(x.dtype) for x, w in ((q, q_norm), (k, k_norm)))
    q_rotated, k_rotated = rope.reference(q, k, positions, cos_sin)
    return q_rotated.to(q.dtype), k_rotated.to(k.dtype)


def reference(
    q,
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
):
    q, k = rotated(q, k, q_norm, k_norm, eps, positions, cos_sin)
    after = kv_append.reference(k, v, k_cache, v_cache, block_table, positions, k_scales, v_scales)
    caches = [c.to(k_cache.dtype) for c in after[:2]]
    scales = [s.to(k_scales.dtype) for s in after[2:]]
    out = decode_attention.reference(q, *caches, block_table, positions + 1, scale, 1, None, *scales)
    return *out, *after


def cuda(
    kernels,
    q,
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    workspace = workspace or decode_attention.new_workspace(q, k_cache, splits)
    batch, q_heads, head_dim = q.shape
    kernels.rope_append_attention(
        q=(q.data_ptr(), q.stride(0)),
        k=(k.data_ptr(), k.stride(0)),
        v=(v.data_ptr(), v.stride(0)),
        norms=(0, 0, eps) if q_norm is None else (q_norm.data_ptr(), k_norm.data_ptr(), eps),
        positions=positions.data_ptr(),
        cos_sin=cos_sin.data_ptr(),
        cache=kv_append.pages_of(k_cache, v_cache, block_table, k_scales, v_scales),
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
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    from triton_kernels.rope_append_attention import rope_append_attention

    workspace = workspace or decode_attention.new_workspace(q, k_cache, splits)
    rope_append_attention(
        q,
        k,
        v,
        q_norm,
        k_norm,
        eps,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        block_table,
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
    k,
    v,
    q_norm,
    k_norm,
    eps,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    block_table,
    scale,
    splits=1,
    workspace=None,
    k_scales=None,
    v_scales=None,
    out=None,
):
    q, k = q.clone(), k.clone()
    if q_norm is not None:
        rmsnorm.torch_(q, q_norm, eps, out=q)
        rmsnorm.torch_(k, k_norm, eps, out=k)
    rope.torch_(q, k, positions, cos_sin)
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    kv_append.torch_(k, v, k_cache, v_cache, block_table, positions, **scales)
    decode_attention.torch_(q, k_cache, v_cache, block_table, positions + 1, scale, **scales, out=out)


def contents(a):
    """Raises LabError for a position past cos_sin or the table, for a page that the cache does not have, for
    a page that is written while another live row has it, and for a ticket that is not 0."""
    check_positions("rope_append_attention", a.positions, a.cos_sin.shape[0], "cos_sin")
    check_append("rope_append_attention", a.block_table, a.positions, a.k_cache)
    decode_attention.check_tickets("rope_append_attention", a.workspace)
    kv.check_scales("rope_append_attention", a.k_cache, a.k_scales, a.v_scales)


def inputs(
    rand,
    positions,
    q_heads,
    kv_heads,
    head_dim,
    page_size=16,
    splits=1,
    qk_norm=False,
    poison=False,
    apart=False,
    size=1.0,
    kv_dtype=None,
):
    """poison: NaN and inf in every slot that holds no token. apart: q, k and v have different strides. size:
    a factor of q and k; a norm removes it, except for the effect of eps. kv_dtype: the format of the
    cache."""
    lengths = [p + 1 for p in positions]
    q, k, v = packed_qkv(rand, len(lengths), q_heads, kv_heads, head_dim, apart)
    q.mul_(size), k.mul_(size)
    k_cache, v_cache, block_table = paged_cache(rand, lengths, kv_heads, head_dim, page_size)
    k_cache, v_cache, *scales = quantised(rand, k_cache, v_cache, kv_dtype)
    if poison:
        decode_attention.poison_unused(positions, lengths, k_cache, v_cache, block_table, *scales)
    norms = (rand(head_dim), rand(head_dim)) if qk_norm else (None, None)
    cos_sin = rope.inputs(rand, 1, 1, 1, head_dim, max_positions=max(512, *lengths))[3]
    return (
        q,
        k,
        v,
        *norms,
        1e-6,
        torch.tensor(positions, dtype=torch.int32, device=rand.device),
        cos_sin,
        k_cache,
        v_cache,
        block_table,
        head_dim**-0.5,
        splits,
        *((None, *scales) if scales else ()),
    )


def nbytes(a):
    """The attention over the cached tokens; the new k and v, read and appended; a row of cos_sin for each
    sequence."""
    rotation = a.cos_sin.itemsize * a.q.shape[0] * a.q.shape[2]
    return (
        a.k.nbytes
        + a.v.nbytes
        + appended_bytes(a)
        + rotation
        + decode_attention.attended_bytes(a.q, a.k_cache, a.positions)
    )


def tolerance(a):
    """(rtol, atol) of out and the caches: the appended key may be rounded to a neighbour (one step of T after
    norm and after rope, 3 in all). To attention's own tolerance come the changes of the scores by such steps
    of q and of the new key.

    With a quantised cache a list of (rtol, atol): of out, the codes and the scales. Where a key moves by such
    a step it may be rounded to the next code, and it moves by at most 1/8 (fp8) or 1/127 (int8) of the
    largest number. That needs arithmetic in float32 and in float64 to round differently just there, which a
    head has hardly ever twice: one element of the key is let move so far.
    """
    q_r, k_r = rotated(a.q, a.k, a.q_norm, a.k_norm, a.eps, a.positions, a.cos_sin)
    attends = decode_attention.op.bound(
        q_r, a.k_cache, a.v_cache, a.block_table, a.positions, a.scale, 1, None, a.k_scales, a.v_scales
    )
    rtol, atol = decode_attention.tolerance(attends)
    step = torch.finfo(a.q.dtype).eps
    keys, values = (
        decode_attention.finite_numbers(cache, scales)
        for cache, scales in ((a.k_cache, a.k_scales), (a.v_cache, a.v_scales))
    )
    moved = step * a.scale * float(q_r.double().norm(dim=-1).max() * keys.norm(dim=-1).max()) * 0.25
    plain = 3 * rtol, atol + moved * float(values.abs().max()) * 0.25 + 1e-6
    if a.k_scales is None:
        return plain
    fp8 = a.k_cache.dtype == kv.DTYPES["fp8"]
    code = float(k_r.abs().max()) / (8 if fp8 else 127)
    jump = a.scale * float(q_r.abs().max()) * code * float(values.abs().max()) * 0.25
    codes = (0.0, 1.0) if fp8 else (3 * step, 1.0)
    # An int8 scale is the largest number of the head, which moves, rounded to float16.
    scales = (0.0, 0.0) if fp8 else (3 * step + torch.finfo(torch.float16).eps, 0.0)
    return [(plain[0], plain[1] + jump), codes, codes, scales, scales]


# Cases of a quantised cache, in each of its formats.
QUANTISED = (
    (
        "first token, page boundaries, idle rows whose table names the pages written, NaN in free slots",
        dict(
            positions=(0, 15, 16, -1, 63, 64, 130, -1),
            q_heads=9,
            kv_heads=3,
            head_dim=64,
            splits=2,
            poison=True,
        ),
    ),
    (
        "one split, MHA, head 96, different strides",
        dict(positions=(96, 0), q_heads=2, kv_heads=2, head_dim=96, apart=True),
    ),
    (
        "the largest group, head 128, a larger page, per-head norm",
        dict(
            positions=(31, 128, 700),
            q_heads=16,
            kv_heads=1,
            head_dim=128,
            page_size=64,
            splits=3,
            qk_norm=True,
            poison=True,
        ),
    ),
)

op = Op(
    name="rope_append_attention",
    summary="norm and rope of q and k, append k and v, attend",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=lambda a: 4 * a.q.shape[1] * a.q.shape[2] * int((a.positions + 1).clamp(min=0).sum()),
    tolerance=tolerance,
    shared_rounding=decode_attention.shared_rounding,
    contents=contents,
    mutates=("k_cache", "v_cache", "k_scales", "v_scales"),
    state=("workspace",),
    workspace=lambda a: decode_attention.new_workspace(a.q, a.k_cache, a.splits),
    plans=("fused",),
    uses=lambda c: [(None, {**paged_heads_of(c), "qk_norm": "q_norm" in c.parts})],
    rows=lambda batch, context: {"positions": (context - 1,) * batch},
    launch=decode_attention.launch,
    has_context=True,
    cold=("k_cache", "v_cache"),
    color="#ddcc77",
    inspect_sizes=dict(positions=(8191,), splits=33, q_heads=32, kv_heads=8, head_dim=128),
    tuned_by=("q_heads", "kv_heads", "head_dim", "page_size"),
    spaces={"cuda": spaces.splits, "triton": spaces.attention},
    cases=(
        case(
            "first token, page boundaries, an idle row; GQA group 3",
            positions=(0, 15, 16, -1, 63, 64, 130),
            q_heads=9,
            kv_heads=3,
            head_dim=64,
            splits=2,
        ),
        case(
            "Qwen3's per-head norm, empty splits, head 128",
            positions=(4, 199, 69),
            q_heads=8,
            kv_heads=2,
            head_dim=128,
            splits=7,
            qk_norm=True,
        ),
        case("one sequence, one split, MHA, head 96", positions=(96,), q_heads=2, kv_heads=2, head_dim=96),
        case(
            "the largest group, a larger page",
            positions=(31, 128),
            q_heads=16,
            kv_heads=1,
            head_dim=64,
            page_size=64,
            splits=3,
            qk_norm=True,
        ),
        case(
            "idle rows in front and behind, whose table names the pages written; q, k and v of different "
            "strides",
            positions=(-1, 0, 16, 47, -1, -1),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=2,
            apart=True,
        ),
        case(
            "NaN, inf and wrong pages wherever there is no token",
            positions=(0, 14, -1, 16, 63, 69),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=2,
            poison=True,
        ),
        case(
            "the same with one split and a larger page",
            positions=(2, 64, 40),
            q_heads=4,
            kv_heads=2,
            head_dim=128,
            page_size=64,
            qk_norm=True,
            poison=True,
        ),
        case(
            "more splits than one step of the merge handles",
            positions=(1100, 40),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=18,
        ),
        case(
            "heads so small that eps counts",
            positions=(33, 5),
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            splits=2,
            qk_norm=True,
            size=1e-3,
        ),
        *(
            case(f"{kv_dtype}: {why}", kv_dtype=kv_dtype, **sizes)
            for kv_dtype in kv.DTYPES
            for why, sizes in QUANTISED
        ),
    ),
)
