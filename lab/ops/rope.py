"""rope: rotates q and k in place: (a, b) -> (a cos - b sin, b cos + a sin), a and b half a head apart

  q [batch, q_heads, head_dim]   k [batch, kv_heads, head_dim]   views of the packed qkv, rotated in place
  positions [batch] int32        cos_sin [max_positions, head_dim] float32: cosines, then sines
The table holds the model's frequencies (plain or Llama-3 scaled: lab/model/rope.py), so both kernels share
them.
Source: Su et al., RoFormer (arXiv 2104.09864), in the rotate-half order of Hugging Face's Llama.
Rounding: float32 arithmetic, one rounding at the end. A negative position marks an idle row, which stays as
it is; the caller's table must reach its last position, because a kernel does not know the end of the table.
Kernels: cuda_src/rope.cu, triton_kernels/rope.py
"""

import torch

from lab import peers
from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse, rows_of_heads


def validate(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, out: None = None
) -> None:
    if out is not None:
        refuse("rope", "works in place; out= is not taken")
    q_shape, k_shape, dtype = q.shape, k.shape, q.dtype
    if not (
        len(q_shape) == len(k_shape) == 3
        and q_shape[0] == k_shape[0]
        and q_shape[2] == k_shape[2]
        and dtype == k.dtype
    ):
        refuse("rope", "q and k must be [batch, heads, head_dim] of one dtype")
    if dtype not in FLOATS:
        refuse("rope", f"takes no {dtype}: q and k must be float32, float16 or bfloat16")
    batch, _, head_dim = q_shape
    if head_dim not in (64, 96, 128):
        refuse("rope", f"head_dim {head_dim} is not 64, 96 or 128")
    if not (positions.shape == (batch,) and positions.dtype == torch.int32):
        refuse("rope", "positions must be int32 [batch]")
    if not (cos_sin.dim() == 2 and cos_sin.shape[1] == head_dim and cos_sin.dtype == torch.float32):
        refuse("rope", "cos_sin must be float32 [max_positions, head_dim]")
    device = cos_sin.get_device()
    rows_of_heads("rope", device, q, k)
    dense("rope", device, positions, cos_sin)


def rotate(x, positions, cos_sin):
    """x [batch, heads, head_dim] rotated, in the dtype of cos_sin; idle rows as they are."""
    cos, sin = cos_sin[positions.clamp(min=0).long()][:, None].chunk(2, dim=-1)
    a, b = x.to(cos_sin.dtype).chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.where(positions[:, None, None] < 0, x.to(cos_sin.dtype), turned)


def reference(q, k, positions, cos_sin):
    return tuple(rotate(x, positions, cos_sin.double()) for x in (q, k))


def cuda(kernels, q, k, positions, cos_sin, out=None):
    batch, q_heads, head_dim = q.shape
    kernels.rope(
        q=(q.data_ptr(), q.stride(0)),
        k=(k.data_ptr(), k.stride(0)),
        positions=positions.data_ptr(),
        cos_sin=cos_sin.data_ptr(),
        batch=batch,
        q_heads=q_heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        dtype=DTYPE_CODES[q.dtype],
        stream=kernels.stream(),
    )


def triton(q, k, positions, cos_sin, out=None):
    from triton_kernels.rope import rope

    rope(q, k, positions, cos_sin)


def torch_(q, k, positions, cos_sin, out=None):
    # In few calls, for each is a kernel: q and k go together, and the products of both halves of a head.
    x = torch.cat((q, k), dim=1).unflatten(2, (2, -1))  # [batch, heads, 2, head_dim / 2]
    a, b = x.unbind(2)
    cos, sin = cos_sin.index_select(0, positions.clamp(min=0))[:, None].chunk(2, dim=-1)
    turned = x * cos[:, :, None]
    turned[:, :, 0].addcmul_(b, sin, value=-1)
    turned[:, :, 1].addcmul_(a, sin)
    rows = torch.where(positions[:, None, None, None] < 0, x, turned).flatten(2)
    q.copy_(rows[:, : q.shape[1]])
    k.copy_(rows[:, q.shape[1] :])


def contents(a):
    """Raises LabError for a live position beyond the table of angles."""
    check_positions("rope", a.positions, a.cos_sin.shape[0], "cos_sin")


def check_positions(op, positions, rows, table):
    """Raises LabError unless every live position is below `rows`, the length of the table that `table` names
    in the message."""
    for b, position in enumerate(positions.tolist()):
        if position >= rows:
            refuse(op, f"positions[{b}] is {position}, and {table} ends after {rows} positions")


def inputs(rand, batch, q_heads, kv_heads, head_dim, max_positions=512, idle=(), apart=False):
    """idle: rows without a sequence. apart: q and k are views of buffers with different strides."""
    q, k, _ = packed_qkv(rand, batch, q_heads, kv_heads, head_dim, apart)
    angle = torch.outer(
        torch.arange(max_positions, dtype=torch.float64),
        10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
    )
    table = torch.cat((angle.cos(), angle.sin()), dim=1).float().to(rand.device)
    positions = rand.integers(0, max_positions, batch)
    positions[list(idle)] = -1
    return q, k, positions, table


def packed_qkv(rand, batch, q_heads, kv_heads, head_dim, apart=False):
    """q, k and v as in a model: views of one packed row per sequence. apart: views of separate buffers with
    different strides."""
    if apart:
        sizes = ((q_heads, q_heads + 3), (kv_heads, kv_heads + 2), (kv_heads, kv_heads + 5))
        return tuple(rand(batch, row, head_dim)[:, 1 : heads + 1] for heads, row in sizes)
    packed = rand(batch, (q_heads + 2 * kv_heads) * head_dim)
    heads = packed.view(batch, q_heads + 2 * kv_heads, head_dim)
    return heads.split((q_heads, kv_heads, kv_heads), dim=1)


def heads_of(c):
    """The sizes of a model's attention, by the names that ops with heads use."""
    return {"q_heads": c.q_heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}


op = Op(
    name="rope",
    summary="(a, b) -> (a cos - b sin, b cos + a sin), in place",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: 2 * (a.q.nbytes + a.k.nbytes) + a.positions.nbytes + 4 * a.q.shape[0] * a.q.shape[2],
    flops=lambda a: 3 * (a.q.numel() + a.k.numel()),
    # One rounding to T (half a step), and two products that may cancel: a few float32 steps of the operands
    # (N(0, 1), so below 8).
    tolerance=lambda a: (torch.finfo(a.q.dtype).eps / 2 + EPS32, 8 * EPS32),
    contents=contents,
    mutates=("q", "k"),
    peers=(peers.LIGER_ROPE,),
    plans=("basic",),
    uses=lambda c: [(None, heads_of(c))],
    direction="copy",
    inspect_sizes=dict(batch=1, q_heads=32, kv_heads=8, head_dim=128),
    color="#117733",
    cases=(
        case("SmolLM2's heads, one row", batch=1, q_heads=9, kv_heads=3, head_dim=64),
        case("head 96, several positions", batch=5, q_heads=4, kv_heads=2, head_dim=96),
        case("head 128, one KV head, the largest batch", batch=64, q_heads=3, kv_heads=1, head_dim=128),
        case(
            "idle rows, which stay as they are", batch=6, q_heads=3, kv_heads=1, head_dim=64, idle=(0, 3, 5)
        ),
        case(
            "q and k of different strides", batch=3, q_heads=3, kv_heads=2, head_dim=64, idle=(1,), apart=True
        ),
    ),
)
