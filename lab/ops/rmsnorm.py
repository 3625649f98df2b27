"""rmsnorm: y = T(v * rsqrt(mean(v^2) + eps)) * w, with v = x, or v = residual += x

  x [rows, cols], or [batch, heads, head_dim] views of a packed qkv (the per-head norm of Qwen3)
  w [cols]   residual [rows, cols] or None, updated in place and rounded to T before it is normalised
Rounding: statistics in float32, rounded to T before the weight and after it, as Hugging Face's LlamaRMSNorm
does.
Kernels: cuda_src/rmsnorm.cu, triton_kernels/rmsnorm.py
"""

import torch

from lab import peers
from lab.contract import (
    DTYPE_CODES,
    EPS32,
    FLOATS,
    Op,
    case,
    dense,
    pointer,
    refuse,
    rows_of_heads,
    some_rows,
)


def validate(
    x: torch.Tensor,
    w: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    shape, dtype = x.shape, x.dtype
    if not (w.dim() == 1 and shape[-1] == w.shape[0] and dtype == w.dtype):
        refuse("rmsnorm", "x [..., cols] and w [cols] must agree in cols and dtype")
    if dtype not in FLOATS:
        refuse("rmsnorm", f"takes no {dtype}: x and w must be float32, float16 or bfloat16")
    device = w.get_device()
    dense("rmsnorm", device, w)
    strided = (x,) if out is None else (x, out)
    if not (out is None or (out.shape == shape and out.dtype == dtype)):
        refuse("rmsnorm", "out must look like x")
    if len(shape) == 3:
        if residual is not None:
            refuse("rmsnorm", "a residual needs a 2-D x")
        rows_of_heads("rmsnorm", device, *strided)
    else:
        if len(shape) != 2:
            refuse("rmsnorm", "x must have two or three dimensions")
        dense("rmsnorm", device, *strided)
    if residual is not None:
        if not (residual.shape == shape and residual.dtype == dtype):
            refuse("rmsnorm", "residual must look like x")
        dense("rmsnorm", device, residual)


def outputs(x, w, eps, residual=None):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def reference(x, w, eps, residual=None):
    v = x.double() if residual is None else (x.float() + residual.float()).to(x.dtype).double()
    y = scaled(v, eps).to(x.dtype).double() * w.double()
    return (y,) if residual is None else (y, v)


def scaled(v, eps):
    """float64 v * rsqrt(mean(v^2) + eps), before any rounding."""
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def tolerance(a):
    """(rtol, atol): rtol is half a step of T for the last rounding; atol is what the first rounding may
    change.

    A value near the middle between two numbers of T may be rounded to either, because the float32 sum moves
    it a little. So atol is a tensor like y that is 0 for most elements: an error of the statistics beyond
    float32's shows in those.
    """
    x = a.x
    v = x.double() if a.residual is None else reference(x, a.w, a.eps, a.residual)[-1]
    unit = scaled(v, a.eps)
    off = (8 + x.shape[-1] / 16) * EPS32  # the order of the sum is free: allow a step for every 16 terms
    low, exact, high = (value.to(x.dtype).double() for value in (unit * (1 - off), unit, unit * (1 + off)))
    moved = torch.maximum((low - exact).abs(), (high - exact).abs()) * a.w.double().abs()
    return torch.finfo(x.dtype).eps / 2 + 2 * EPS32, moved + 1e-30


def cuda(k, x, w, eps, residual=None, out=None):
    rows, groups, cols = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
    k.rmsnorm(
        x=x.data_ptr(),
        w=w.data_ptr(),
        residual=pointer(residual),
        y=out.data_ptr(),
        rows=rows,
        groups=groups,
        cols=cols,
        x_stride=x.stride(0),
        y_stride=out.stride(0),
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
        stream=k.stream(),
    )


def triton(x, w, eps, residual=None, out=None):
    from triton_kernels.rmsnorm import rmsnorm

    rmsnorm(x, w, eps, residual, out)


def torch_(x, w, eps, residual=None, out=None):
    v = x if residual is None else residual.add_(x)
    v32 = v.float()
    torch.mul((v32 * torch.rsqrt(v32.square().mean(-1, keepdim=True) + eps)).to(x.dtype), w, out=out)


def inputs(rand, rows, cols, groups=1, residual=False, size=1.0, kind="normal"):
    """size: a factor of x. kind: normal; flat (all elements of a row are equal, so that a sum's roundings do
    not cancel); peak (one element is far larger than the others); zero (the first row is 0)."""
    if groups > 1:  # heads in the middle of a packed qkv row
        packed = rand(rows, (groups + 2) * cols)
        return packed[:, cols : (groups + 1) * cols].view(rows, groups, cols), rand(cols), 1e-6
    x = shaped(rand(rows, cols), kind).mul_(size)
    return (x, rand(cols), 1e-5) + ((rand(rows, cols).mul_(size),) if residual else ())


def shaped(x, kind):
    """Changes x [rows, cols] in place to one of the kinds of inputs()."""
    if kind == "flat":
        x.copy_(torch.full_like(x, 1.0625) + torch.arange(x.shape[0], device=x.device)[:, None] / 8)
    elif kind == "peak":
        x[:, x.shape[1] // 3] = 48.0
    elif kind == "zero":
        x[0] = 0
    return x


def uses(c):
    """The norms of the residual stream; where the model has them, those of each head of q and of k."""
    found = [("hidden", {"cols": c.parts["attn_norm"].rows, "residual": True})]
    if "q_norm" in c.parts:
        found += [
            ("q_head", {"cols": c.parts["q_norm"].rows, "groups": c.q_heads}),
            ("k_head", {"cols": c.parts["k_norm"].rows, "groups": c.kv_heads}),
        ]
    return found


op = Op(
    name="rmsnorm",
    summary="y = T(v * rsqrt(mean(v^2) + eps)) * w, v = x or residual += x",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: (2 if a.residual is None else 4) * a.x.nbytes + a.w.nbytes,
    flops=lambda a: 4 * a.x.numel(),
    tolerance=tolerance,
    mutates=("residual",),
    plans=("basic",),
    uses=uses,
    calls=lambda c, role: 2 * c.layers + 1 if role == "hidden" else c.layers,  # the final norm is one more
    rows=some_rows,
    use_of=lambda a: {"cols": a.x.shape[-1], "groups": a.x.shape[1] if a.x.dim() == 3 else None},
    direction="copy",
    inspect_sizes=dict(rows=1, cols=4096, residual=True),
    peers=(peers.LIGER_RMSNORM,),
    color="#88ccee",
    cases=(
        case("one row, SmolLM2's width", rows=1, cols=576),
        case("residual add, several rows, Llama-1B's width", rows=5, cols=2048, residual=True),
        case("a width that is no multiple of the vector", rows=3, cols=101, residual=True),
        case("wider than one block's threads hold at once", rows=2, cols=8200),
        case("narrower than a warp's vectors", rows=64, cols=16),
        case("heads inside a packed qkv (Qwen3)", rows=3, cols=128, groups=5),
        case("x so small that eps counts", rows=3, cols=576, size=1e-3),
        case("a row of zeros", rows=2, cols=136, kind="zero"),
        case("one large term among many small ones", rows=2, cols=4096, kind="peak"),
        case("long rows of equal elements", rows=2, cols=32768, kind="flat"),
    ),
)
