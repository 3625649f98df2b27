"""linear: y[b, n] = sum_k x[b, k] * w[n, k] (+ bias[n])

  x [batch, k]   w [n, k]   bias [n] or None   y [batch, n] in x's dtype, or float32 with out_dtype (logits)
  w is a tensor in x's dtype, or packed in one of the formats of lab/formats
Rounding: float32 accumulation, one rounding at the end. Batch 1 to 64; the weights are read
from DRAM once for all rows.
Kernels: cuda_src/linear.cu, triton_kernels/linear.py
"""

import torch
from torch.nn import functional as F

from lab import peers, spaces
from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, pointer, refuse
from lab.formats import PackedMatrix, operand

MAX_BATCH = 64


def validate(
    x: torch.Tensor,
    w: operand.Operand,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> None:
    operand.check("linear", x, w)
    rows, dtype = x.shape[0], x.dtype
    if not (1 <= rows <= MAX_BATCH):
        refuse("linear", f"takes 1 to {MAX_BATCH} rows of x; split larger batches")
    if not (out_dtype is None or out_dtype == torch.float32 or out_dtype == dtype):
        refuse("linear", "out_dtype must be float32 or x's dtype")
    if bias is not None:
        if not (bias.shape == w.shape[:1] and bias.dtype == dtype):
            refuse("linear", "bias must be [n] in x's dtype")
        dense("linear", w.get_device(), bias)
    if out is not None:
        if not (out.shape == (rows, w.shape[0]) and out.dtype == (out_dtype or dtype)):
            refuse("linear", "out must be [batch, n] in out_dtype")
        dense("linear", w.get_device(), out)


def outputs(x, w, bias=None, out_dtype=None):
    return torch.empty(x.shape[0], w.shape[0], dtype=out_dtype or x.dtype, device=x.device)


def reference(x, w, bias=None, out_dtype=None):
    y = x.double() @ w.double().T
    return (y if bias is None else y + bias.double(),)


def tiled(x, w):
    """The memory through which the CUDA kernels pass x, laid out in the tiles that tensor cores read
    (cuda_src/core/tiled_rows.cuh): [2 * (k / 128 rounded up), 16 or 64, 64] for packed weights and more than
    8 rows in half precision; None for others."""
    rows, columns = x.shape
    if type(w) is not PackedMatrix or rows <= 8 or x.element_size() != 2:
        return None
    return x.new_empty(2 * -(-columns // 128), 16 if rows <= 16 else 64, 64)


def cuda(k, x, w, bias=None, out_dtype=None, out=None):
    rows, columns = x.shape
    memory = tiled(x, w)
    k.linear(
        x=x.data_ptr(),
        tiled=pointer(memory),
        w=operand.pointers(w),
        bias=pointer(bias),
        y=out.data_ptr(),
        rows=rows,
        n=w.shape[0],
        k=columns,
        dtype=DTYPE_CODES[x.dtype],
        out_dtype=DTYPE_CODES[out.dtype],
        stream=k.stream(),
    )


def triton(x, w, bias=None, out_dtype=None, out=None):
    from triton_kernels.linear import linear

    linear(x, w, bias, out)


def torch_(x, w, bias=None, out_dtype=None, out=None):
    if not isinstance(w, torch.Tensor):  # torch has no product for these formats: expanded at each call
        out.copy_(F.linear(x.float(), operand.as_float(w), None if bias is None else bias.float()))
        return
    if out.dtype == x.dtype:
        out.copy_(F.linear(x, w, bias)) if bias is not None else torch.mm(x, w.T, out=out)
    elif x.is_cuda:  # cuBLAS keeps its float32 accumulator
        out.copy_(torch.mm(x, w.T, out_dtype=out.dtype))
        if bias is not None:
            out.add_(bias)
    else:
        out.copy_(F.linear(x.float(), w.float(), None if bias is None else bias.float()))


def tolerance(a):
    """(rtol, atol): one rounding to y's dtype, and a few eps of |x||w| for the float32 sum (the norms bound a
    sum of k products)."""
    size = float(a.x.double().norm(dim=1).max() * operand.magnitude(a.w).norm(dim=1).max())
    return torch.finfo(a.out_dtype or a.x.dtype).eps, 4 * EPS32 * size


def inputs(rand, batch, n, k, bias=False, out_dtype=None, format=None):
    """format: of w, one of lab.formats.FORMATS; None: a tensor in x's dtype."""
    return (rand(batch, k), operand.of_random(rand(n, k), format), rand(n) if bias else None, out_dtype)


def nbytes(a):
    bias = 0 if a.bias is None else a.bias.nbytes
    return a.x.nbytes + a.w.nbytes + bias + a.x.shape[0] * a.w.shape[0] * (a.out_dtype or a.x.dtype).itemsize


def uses(c):
    return [
        ("qkv", sizes_of(c, "wqkv")),
        ("o", sizes_of(c, "wo")),
        ("gate_up", sizes_of(c, "w_gate_up")),
        ("down", sizes_of(c, "w_down")),
        ("lm_head", {**sizes_of(c, "lm_head"), "out_dtype": "fp32"}),
    ]


def sizes_of(c, matrix):
    """n and k of a matrix of a model, named as in lab/model/description.py."""
    return {"n": c.parts[matrix].rows, "k": c.parts[matrix].columns}


def size_of(a):
    """n and k of a call of an op that takes w [n, k], by which its use is recognised."""
    return {"n": a.w.shape[0], "k": a.w.shape[1]}


op = Op(
    name="linear",
    summary="y = x w^T (+ bias)",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=lambda a: 2 * a.x.shape[0] * a.w.numel(),
    tolerance=tolerance,
    plans=("basic",),
    uses=uses,
    calls=lambda c, role: 1 if role == "lm_head" else c.layers,
    use_of=size_of,
    cold=("w", "bias"),
    peers=(peers.CUBLAS, peers.INT4_MM, peers.GEMLITE, peers.SCALED_MM),
    color="#44aa99",
    inspect_sizes=dict(batch=1, n=28672, k=4096),
    tuned_by=("n", "k"),
    spaces={"cuda": spaces.cuda_product, "triton": spaces.basic_linear},
    cases=(
        case("SmolLM2's qkv, one row", batch=1, n=960, k=576),
        case(
            "rows and columns that are no multiple of a tile or vector, with bias",
            batch=1,
            n=37,
            k=101,
            bias=True,
        ),
        case("k a multiple of the vector but not of the tile", batch=3, n=50, k=1096),
        case("one output column", batch=2, n=1, k=64),
        case("shorter than one vector", batch=1, n=9, k=5),
        case("logits in float32", batch=2, n=130, k=576, out_dtype=torch.float32),
        case("one past the widest batch of the GEMV path", batch=9, n=72, k=328, bias=True),
        case("a batch that fills no tensor-core tile, odd n", batch=17, n=83, k=200),
        case("the largest batch", batch=64, n=96, k=264, out_dtype=torch.float32),
        *operand.format_cases(bias=True),
    ),
)
