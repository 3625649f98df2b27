"""The contract of an op: what both of its kernels must do, and what its checks and measurements are made of.

An `Op` is one meaning (`reference`), one set of conditions (`validate`) and one launcher for each backend. This module
lies below everything else: it imports nothing of the lab but the errors, and the contracts in lab/ops import it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lab.errors import LabError

BACKENDS = ("cuda", "triton", "torch")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPS32 = torch.finfo(torch.float32).eps
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}   # mirrors DType in cuda_src/launchers.h


@dataclass(frozen=True)
class Case:
    """Sizes for one check or benchmark of an op, and why they were chosen."""
    why: str
    sizes: Mapping[str, object]


def case(why: str, **sizes) -> Case:
    return Case(why, sizes)


@dataclass(frozen=True)
class Op:
    """The contract that the CUDA and the Triton kernel of one op both meet.

    `validate`, `outputs`, `reference`, `torch`, `nbytes` and `flops` take the op's public arguments; `cuda` takes the
    table of C++ launchers before them; the three backends take the output tensor as the keyword `out`.
    """
    name: str
    summary: str                    # the formula, one line
    dtypes: tuple                   # dtypes of the activations that every backend takes
    validate: Callable              # (*args, out=None) -> None, or raises LabError
    outputs: Callable               # (*args) -> an empty tensor for the kernel to fill; None for an op in place
    reference: Callable             # (*args) -> tuple of float64 (or integer) results: the output, then what `mutates` names
    cuda: Callable                  # (kernels, *args, out) -> None; launches, nothing else
    triton: Callable                # (*args, out) -> None; launches, nothing else
    torch: Callable                 # (*args, out) -> None; torch's own (the vendor's) kernels
    inputs: Callable                # (rand: Rand, **sizes) -> args, random data of one case
    nbytes: Callable                # (*args) -> bytes that must cross DRAM at least once
    flops: Callable                 # (*args) -> floating-point operations
    tolerance: Callable             # (*args) -> (rtol, atol) against `reference`, derived from the dtypes' epsilon
    cases: tuple[Case, ...] = ()
    mutates: tuple[int, ...] = ()   # positions of arguments that the op changes in place
    contents: Callable | None = None  # (*args) -> None; raises LabError for integers in tensors that no kernel may be given
    verify: Callable | None = None  # (got, *args) -> what is wrong, or None; replaces the comparison by tolerance
    state: tuple[int, ...] = ()     # positions of arguments in which a call leaves what the next one finds: tickets, scratch
    with_workspace: Callable | None = None      # (*args of inputs) -> args with a workspace, where the op takes one


class Rand:
    """Seeded random tensors on one device: rand(2, 3) is N(0, 1) in `dtype`; rand.integers(0, 9, 4) is int32."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
        if not -(1 << 63) <= seed < 1 << 64:
            raise LabError(f"seed {seed} does not fit 64 bits")
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.int32)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device).to(torch.int32)


# What validation is made of. A raw pointer carries no shape, stride, device or alignment: each is checked here, once.
# Conditions stand in the callers' own `if`, so that a message is formatted only when it is needed.

def refuse(op: str, what: str) -> None:
    raise LabError(f"{op}: {what}")


def dense(op: str, device: int, *tensors: torch.Tensor) -> None:
    """All tensors on one device, contiguous, and 16-byte aligned (the width of one vector load)."""
    for t in tensors:
        if t.get_device() != device or not t.is_contiguous() or t.data_ptr() & 15:
            raise LabError(f"{op}: {describe(t)} must be contiguous, 16-byte aligned and on the device of the others")


def rows_of_heads(op: str, device: int, *tensors: torch.Tensor) -> None:
    """Views [batch, heads, head_dim] of a packed buffer: the two last dimensions contiguous, the first free."""
    for t in tensors:
        ok = t.get_device() == device and not t.data_ptr() & 15
        if ok and not t.is_contiguous():                         # one sequence's view of a packed row is contiguous
            (batch, _, dim), stride = t.shape, t.stride()
            ok = stride[2] == 1 and stride[1] == dim and (batch == 1 or not stride[0] * t.element_size() & 15)
        if not ok:
            raise LabError(f"{op}: {describe(t)} must be on the device of the others, with contiguous heads and rows "
                           "that begin at multiples of 16 bytes")


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} strides {list(t.stride())} on {t.device}"
