"""norm_linear_silu_mul: y = silu(g) * u, with g and u the first and the last n columns of
rmsnorm(x, norm_w) w^T

  x [batch, k]   norm_w [k]   w [2 n, k], the gate's rows first, a tensor or packed   y [batch, n]
Rounding: the norm as in rmsnorm.py; g and u stay in float32; one rounding at the end. Batch 1 to 64.
Kernels: cuda_src/norm_linear_silu_mul.cu, triton_kernels/norm_linear_silu_mul.py
"""

from functools import partial

import torch
from torch.nn import functional as F

from lab import spaces
from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, pointer, refuse
from lab.formats import operand
from lab.ops import linear, norm_linear, rmsnorm, silu_mul
from lab.ops.norm_linear import check_norm, norm_slack, normed


def validate(
    x: torch.Tensor, norm_w: torch.Tensor, eps: float, w: operand.Operand, out: torch.Tensor | None = None
) -> None:
    check_norm("norm_linear_silu_mul", x, norm_w)
    linear.validate(x, w)
    if w.shape[0] % 2:
        refuse("norm_linear_silu_mul", "w must be [2 n, k], the gate's rows first")
    if out is not None:
        if not (out.shape == (x.shape[0], w.shape[0] // 2) and out.dtype == x.dtype):
            refuse("norm_linear_silu_mul", "out must be [batch, n] in x's dtype")
        dense("norm_linear_silu_mul", x.get_device(), out)


def outputs(x, norm_w, eps, w):
    return torch.empty(x.shape[0], w.shape[0] // 2, dtype=x.dtype, device=x.device)


def reference(x, norm_w, eps, w):
    gate, up = linear.reference(normed(x, norm_w, eps), w)[0].chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def tolerance(a):
    """(rtol, atol): the error of each factor times the largest value of the other. silu's slope is at most
    1.1, and |silu(g)| at most |g|."""
    y = normed(a.x, a.norm_w, a.eps)
    largest = float(linear.reference(y, a.w)[0].abs().max())
    error = linear.tolerance(linear.op.bound(y, a.w))[1] + norm_slack(a.x, a.norm_w, a.eps, a.w)
    return silu_mul.op.tolerance(silu_mul.op.bound(a.x))[0], 2.1 * largest * error


def cuda(k, x, norm_w, eps, w, out):
    memory, tiled = norm_linear.workspace(x, w), linear.tiled(x, w)
    rows, columns = x.shape
    k.norm_linear_silu_mul(
        x=x.data_ptr(),
        norm_w=norm_w.data_ptr(),
        w=operand.pointers(w),
        y=out.data_ptr(),
        normed=pointer(memory),
        tiled=pointer(tiled),
        rows=rows,
        n=out.shape[1],
        k=columns,
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
        stream=k.stream(),
    )


def triton(x, norm_w, eps, w, out):
    from triton_kernels.norm_linear_silu_mul import norm_linear_silu_mul

    norm_linear_silu_mul(x, norm_w, eps, w, out)


def torch_(x, norm_w, eps, w, out):
    gate_up = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    norm_linear.torch_(x, norm_w, eps, w, out=gate_up)
    silu_mul.torch_(gate_up, out)


def inputs(rand, batch, n, k, size=1.0, kind="normal", format=None):
    """size, kind: of x, as in rmsnorm.py. format: of w, as in linear.py."""
    x = rmsnorm.shaped(rand(batch, k), kind).mul_(size)
    return x, rand(k), 1e-5, operand.of_random(rand(2 * n, k, scale=k**-0.5), format)


op = Op(
    name="norm_linear_silu_mul",
    summary="y = silu(g) * u, (g, u) = rmsnorm(x) w^T",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: (
        a.x.nbytes + a.norm_w.nbytes + a.w.nbytes + a.x.shape[0] * a.w.shape[0] // 2 * a.x.itemsize
    ),
    flops=lambda a: 2 * a.x.shape[0] * a.w.numel() + 4 * a.x.numel(),
    tolerance=tolerance,
    plans=("fused",),
    # n counts the outputs; w has two rows for each.
    uses=lambda c: [("gate_up", {"n": c.parts["w_gate_up"].rows // 2, "k": c.parts["w_gate_up"].columns})],
    use_of=lambda a: {"n": a.w.shape[0] // 2, "k": a.w.shape[1]},
    cold=("w",),
    color="#cc6677",
    inspect_sizes=dict(batch=1, n=14336, k=4096),
    tuned_by=("n", "k"),
    spaces={"cuda": partial(spaces.cuda_product, parts=2), "triton": partial(spaces.products, parts=2)},
    cases=(
        case("SmolLM2's gate and up, one row", batch=1, n=1536, k=576),
        case("no multiple of a tile or vector", batch=3, n=37, k=101),
        case("the widest batch of the GEMV path", batch=8, n=40, k=520),
        case("a tensor-core batch, odd n", batch=17, n=83, k=200),
        case("x so small that eps counts", batch=2, n=37, k=576, size=1e-3),
        case("the same in a tensor-core batch", batch=17, n=37, k=200, size=1e-3),
        case("one large term among many small ones", batch=2, n=37, k=4096, kind="peak"),
        case("long rows of equal elements", batch=2, n=9, k=16384, kind="flat"),
        *operand.format_cases(),
    ),
)
