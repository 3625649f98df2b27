"""rmsnorm: y = T(v * rsqrt(mean(v^2) + eps)) * w, with v = x, or v = residual += x

  x [rows, cols], or [batch, heads, head_dim] views of a packed qkv (the per-head norm of Qwen3)
  w [cols]   residual [rows, cols] or None, updated in place and rounded to T before it is normalised
Rounding: statistics in float32, rounded to T before the weight and after it, as Hugging Face's LlamaRMSNorm does.
Halves: cuda_src/rmsnorm.cu, triton_kernels/rmsnorm.py
"""
import torch

from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse, rows_of_heads


def validate(x, w, eps, residual=None, out=None):
    if not (w.dim() == 1 and x.shape[-1] == w.shape[0] and x.dtype == w.dtype):
        refuse("rmsnorm", "x [..., cols] and w [cols] must agree in cols and dtype")
    device = w.get_device()
    dense("rmsnorm", device, w)
    strided = (x,) if out is None else (x, out)
    if not (out is None or (out.shape == x.shape and out.dtype == x.dtype)):
        refuse("rmsnorm", "out must look like x")
    if x.dim() == 3:
        if not (residual is None):
            refuse("rmsnorm", "a residual needs a 2-D x")
        rows_of_heads("rmsnorm", device, *strided)
    else:
        if not (x.dim() == 2):
            refuse("rmsnorm", "x must have two or three dimensions")
        dense("rmsnorm", device, *strided)
    if residual is not None:
        if not (residual.shape == x.shape and residual.dtype == x.dtype):
            refuse("rmsnorm", "residual must look like x")
        dense("rmsnorm", device, residual)


def outputs(x, w, eps, residual=None):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def reference(x, w, eps, residual=None):
    v = x.double() if residual is None else (x.double() + residual.double()).to(x.dtype).double()
    unit = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = unit.double() * w.double()
    return (y,) if residual is None else (y, v)


def cuda(k, x, w, eps, residual=None, out=None):
    rows, groups, cols = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
    k.rmsnorm(x=x.data_ptr(), w=w.data_ptr(), residual=0 if residual is None else residual.data_ptr(),
              y=out.data_ptr(), rows=rows, groups=groups, cols=cols, x_stride=x.stride(0), y_stride=out.stride(0),
              eps=eps, dtype=DTYPE_CODES[x.dtype], stream=k.stream())


def triton(x, w, eps, residual=None, out=None):
    from triton_kernels.rmsnorm import rmsnorm
    rmsnorm(x, w, eps, residual, out)


def torch_(x, w, eps, residual=None, out=None):
    v = x if residual is None else residual.add_(x)
    v32 = v.float()
    torch.mul((v32 * torch.rsqrt(v32.square().mean(-1, keepdim=True) + eps)).to(x.dtype), w, out=out)


def inputs(rand, rows, cols, groups=1, residual=False):
    if groups > 1:                                               # heads in the middle of a packed qkv row
        packed = rand(rows, (groups + 2) * cols)
        return packed[:, cols:(groups + 1) * cols].view(rows, groups, cols), rand(cols), 1e-6
    return (rand(rows, cols), rand(cols), 1e-5) + ((rand(rows, cols),) if residual else ())


op = Op(
    name="rmsnorm", summary="y = T(v * rsqrt(mean(v^2) + eps)) * w, v = x or residual += x", dtypes=FLOATS,
    validate=validate, outputs=outputs, reference=reference, cuda=cuda, triton=triton, torch=torch_, inputs=inputs,
    nbytes=lambda x, w, eps, residual=None: (2 if residual is None else 4) * x.nbytes + w.nbytes,
    flops=lambda x, w, eps, residual=None: 4 * x.numel(),
    # Two roundings to T; each can fall on the other side of a tie by the float32 sum's error: two steps of T.
    tolerance=lambda x, w, eps, residual=None: (2 * torch.finfo(x.dtype).eps + 8 * EPS32, 8 * EPS32),
    mutates=(3,),
    cases=(case("one row, SmolLM2's width", rows=1, cols=576),
           case("residual add, several rows, Llama-1B's width", rows=5, cols=2048, residual=True),
           case("a width that is no multiple of the vector", rows=3, cols=101, residual=True),
           case("wider than one block's threads hold at once", rows=2, cols=8200),
           case("narrower than a warp's vectors", rows=64, cols=16),
           case("heads inside a packed qkv (Qwen3)", rows=3, cols=128, groups=5)))
