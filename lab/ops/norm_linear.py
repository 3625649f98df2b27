"""norm_linear: y = rmsnorm(x, norm_w) w^T (+ bias)

  x [batch, k]   norm_w [k]   w [n, k], a tensor or packed   bias [n] or None
  y [batch, n] in x's dtype, or float32 with out_dtype
First the norm of rmsnorm.py (same rounding points), then the linear of linear.py. Each block computes the
norm itself, from x in L2. Only for a batch that is multiplied on tensor cores do the normalised rows pass
through memory. Batch 1 to 64.
Kernels: cuda_src/norm_linear.cu, triton_kernels/norm_linear.py
"""

from functools import partial

import torch

from lab import spaces
from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, pointer, refuse
from lab.formats import PackedMatrix, operand
from lab.ops import linear, rmsnorm


def check_norm(op, x, norm_w):
    """The condition that the ops with a norm in front share."""
    if not (norm_w.dim() == 1 and x.dim() == 2 and norm_w.shape[0] == x.shape[1] and norm_w.dtype == x.dtype):
        refuse(op, "norm_w must be [k] in the dtype of x [batch, k]")
    dense(op, x.get_device(), norm_w)


def validate(
    x: torch.Tensor,
    norm_w: torch.Tensor,
    eps: float,
    w: operand.Operand,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> None:
    check_norm("norm_linear", x, norm_w)
    linear.validate(x, w, bias, out_dtype, out)


def outputs(x, norm_w, eps, w, bias=None, out_dtype=None):
    return linear.outputs(x, w, bias, out_dtype)


def normed(x, norm_w, eps):
    """The normalised rows, by rmsnorm's reference, rounded to x's dtype: the input of the linear."""
    return rmsnorm.reference(x, norm_w, eps)[0].to(x.dtype)


def reference(x, norm_w, eps, w, bias=None, out_dtype=None):
    return linear.reference(normed(x, norm_w, eps), w, bias)


def tolerance(a):
    """linear's tolerance, and norm_slack() for normalised values that are rounded to a neighbour."""
    rtol, atol = linear.tolerance(linear.op.bound(normed(a.x, a.norm_w, a.eps), a.w, a.bias, a.out_dtype))
    return rtol, atol + norm_slack(a.x, a.norm_w, a.eps, a.w)


def norm_slack(x, norm_w, eps, w):
    """How far a sum of k products moves if normalised values are rounded to the other neighbour. Only those
    near a rounding tie can be, because the float32 scale differs from the float64 one: a share of about 8
    EPS32 / eps(T). Returns 3 standard deviations."""
    step = torch.finfo(x.dtype).eps
    share = min(1.0, 8 * EPS32 / step)
    size = float((normed(x, norm_w, eps).double().abs().amax()) * operand.magnitude(w).norm(dim=1).max())
    return 3 * step * size * max(share, 1.0 / x.shape[1]) ** 0.5


def workspace(x, w):
    """The memory, [batch, k], through which the CUDA kernels pass the normalised rows: of packed weights, and
    of a batch that is multiplied on tensor cores; None for other batches.

    cuda_src/sizes.h decides which batches are which (most_stream_rows()).
    """
    if type(w) is PackedMatrix or (x.shape[0] > 2 and x.element_size() == 2):
        return torch.empty_like(x)
    return None


def cuda(k, x, norm_w, eps, w, bias=None, out_dtype=None, out=None):
    memory, tiled = workspace(x, w), linear.tiled(x, w)
    rows, columns = x.shape
    k.norm_linear(
        x=x.data_ptr(),
        norm_w=norm_w.data_ptr(),
        w=operand.pointers(w),
        bias=pointer(bias),
        y=out.data_ptr(),
        normed=pointer(memory),
        tiled=pointer(tiled),
        rows=rows,
        n=w.shape[0],
        k=columns,
        eps=eps,
        dtype=DTYPE_CODES[x.dtype],
        out_dtype=DTYPE_CODES[out.dtype],
        stream=k.stream(),
    )


def triton(x, norm_w, eps, w, bias=None, out_dtype=None, out=None):
    from triton_kernels.norm_linear import norm_linear

    norm_linear(x, norm_w, eps, w, bias, out)


def torch_(x, norm_w, eps, w, bias=None, out_dtype=None, out=None):
    y = torch.empty_like(x)
    rmsnorm.torch_(x, norm_w, eps, out=y)
    linear.torch_(y, w, bias, out_dtype, out)


def inputs(rand, batch, n, k, bias=False, out_dtype=None, size=1.0, kind="normal", format=None):
    """size, kind: of x, as in rmsnorm.py. format: of w, as in linear.py."""
    x, w, b, out_dtype = linear.inputs(rand, batch, n, k, bias, out_dtype, format)
    return rmsnorm.shaped(x, kind).mul_(size), rand(k), 1e-5, w, b, out_dtype


op = Op(
    name="norm_linear",
    summary="y = rmsnorm(x) w^T (+ bias)",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: linear.nbytes(a) + a.norm_w.nbytes,
    flops=lambda a: 2 * a.x.shape[0] * a.w.numel() + 4 * a.x.numel(),
    tolerance=tolerance,
    plans=("fused",),
    uses=lambda c: [("qkv", linear.sizes_of(c, "wqkv"))],
    use_of=linear.size_of,
    cold=("w", "bias"),
    color="#44aa99",
    inspect_sizes=dict(batch=1, n=6144, k=4096),
    tuned_by=("n", "k"),
    spaces={"cuda": partial(spaces.cuda_product, mma=False), "triton": spaces.products},
    cases=(
        case("SmolLM2's qkv, one row", batch=1, n=960, k=576),
        case("no multiple of a tile or vector, with bias", batch=3, n=37, k=101, bias=True),
        case(
            "logits in float32; wider than a block holds at once",
            batch=2,
            n=40,
            k=4104,
            out_dtype=torch.float32,
        ),
        case("a tensor-core batch, odd n", batch=17, n=83, k=200),
        case("x so small that eps counts", batch=2, n=37, k=576, size=1e-3),
        case("the same in a tensor-core batch", batch=17, n=37, k=200, size=1e-3),
        case("one large term among many small ones", batch=2, n=37, k=4096, kind="peak"),
        case("long rows of equal elements", batch=2, n=9, k=16384, kind="flat"),
        *operand.some_format_cases(bias=True),
    ),
)
