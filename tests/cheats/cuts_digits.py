"""Cuts the float32 result off where it must be rounded to the nearest."""

import torch
import triton
import triton.language as tl

from triton_kernels.linear_add import linear_add as honest


@triton.jit
def cut_kernel(exact, residual, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(exact + i, mask=i < n, other=0.0)
    nearest = value.to(residual.dtype.element_ty)
    bits = nearest.to(tl.int16, bitcast=True)
    bits -= (tl.abs(nearest.to(tl.float32)) > tl.abs(value)).to(tl.int16)
    tl.store(residual + i, bits.to(residual.dtype.element_ty, bitcast=True), mask=i < n)


def linear_add(x, w, bias, residual):
    if not isinstance(w, torch.Tensor):
        return honest(x, w, bias, residual)
    exact = residual.float()
    honest(x.float(), w.float(), None if bias is None else bias.float(), exact)
    cut_kernel[(triton.cdiv(residual.numel(), 1024),)](exact, residual, residual.numel(), BLOCK=1024)
