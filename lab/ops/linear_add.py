"""linear_add: residual += x w^T (+ bias), in place

  x [batch, k]   w [n, k], a tensor or packed   residual [batch, n]   bias [n] or None
Rounding: float32 accumulation, the residual added in float32, one rounding at the end. Batch 1 to 64.
Kernels: cuda_src/linear_add.cu, triton_kernels/linear_add.py
"""

from functools import partial

import torch

from lab import spaces
from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, pointer, refuse
from lab.formats import operand
from lab.ops import linear


def validate(
    x: torch.Tensor,
    w: operand.Operand,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: None = None,
) -> None:
    if out is not None:
        refuse("linear_add", "adds into the residual; out= is not taken")
    linear.validate(x, w, bias)
    if not (residual.shape == (x.shape[0], w.shape[0]) and residual.dtype == x.dtype):
        refuse("linear_add", "residual must be [batch, n] in x's dtype")
    dense("linear_add", x.get_device(), residual)


def reference(x, w, residual, bias=None):
    return (linear.reference(x, w, bias)[0] + residual.double(),)


def cuda(k, x, w, residual, bias=None, out=None):
    rows, columns = x.shape
    memory = linear.tiled(x, w)
    k.linear_add(
        x=x.data_ptr(),
        tiled=pointer(memory),
        w=operand.pointers(w),
        bias=pointer(bias),
        residual=residual.data_ptr(),
        rows=rows,
        n=w.shape[0],
        k=columns,
        dtype=DTYPE_CODES[x.dtype],
        stream=k.stream(),
    )


def triton(x, w, residual, bias=None, out=None):
    from triton_kernels.linear_add import linear_add

    linear_add(x, w, bias, residual)


def torch_(x, w, residual, bias=None, out=None):
    if not isinstance(w, torch.Tensor):
        sums = torch.empty(residual.shape, dtype=torch.float32, device=x.device)
        linear.torch_(x, w, bias, torch.float32, out=sums)
        residual.copy_(residual.float() + sums)
        return
    torch.addmm(residual, x, w.T, out=residual)
    if bias is not None:
        residual.add_(bias)


def tolerance(a):
    """linear's tolerance. With a bias the torch backend rounds twice, which adds two steps of T of the
    largest sum."""
    rtol, atol = linear.tolerance(linear.op.bound(a.x, a.w, a.bias))
    if a.bias is not None:
        atol += rtol * float(reference(a.x, a.w, a.residual)[0].abs().max())
    return rtol, atol


def inputs(rand, batch, n, k, bias=False, format=None):
    w = operand.of_random(rand(n, k, scale=k**-0.5), format)
    return rand(batch, k), w, rand(batch, n), rand(n) if bias else None


op = Op(
    name="linear_add",
    summary="residual += x w^T (+ bias), in place",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: (
        a.x.nbytes + a.w.nbytes + 2 * a.residual.nbytes + (0 if a.bias is None else a.bias.nbytes)
    ),
    flops=lambda a: 2 * a.x.shape[0] * a.w.numel() + a.residual.numel(),
    tolerance=tolerance,
    mutates=("residual",),
    plans=("fused",),
    use_of=linear.size_of,
    uses=lambda c: [("o", linear.sizes_of(c, "wo")), ("down", linear.sizes_of(c, "w_down"))],
    cold=("w", "bias"),
    color="#88ccee",
    inspect_sizes=dict(batch=1, n=4096, k=14336),
    tuned_by=("n", "k"),
    spaces={"cuda": spaces.cuda_product, "triton": partial(spaces.products, whole_rows=False)},
    cases=(
        case("SmolLM2's down projection, one row", batch=1, n=576, k=1536),
        case("no multiple of a tile or vector, with bias", batch=3, n=37, k=101, bias=True),
        case("the widest batch of the GEMV path", batch=8, n=40, k=520),
        case("a tensor-core batch, odd n", batch=17, n=83, k=200),
        *operand.some_format_cases(bias=True),
    ),
)
