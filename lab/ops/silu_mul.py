"""silu_mul: y = silu(gate) * up, silu(g) = g / (1 + exp(-g))

  gate_up [rows, 2 * cols], the gate first, as the packed gate+up projection writes it   y [rows, cols]
Source: Shazeer, GLU Variants (arXiv 2002.05202). Rounding: float32 arithmetic, one rounding at the end.
Kernels: cuda_src/silu_mul.cu, triton_kernels/silu_mul.py
"""

import torch
from torch.nn import functional as F

from lab import peers
from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse, some_rows


def validate(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> None:
    if gate_up.dtype not in FLOATS:
        refuse("silu_mul", f"takes no {gate_up.dtype}: gate_up must be float32, float16 or bfloat16")
    if not (gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0):
        refuse("silu_mul", "gate_up must be [rows, 2 * cols]")
    if not (
        out is None or (out.shape == (gate_up.shape[0], gate_up.shape[1] // 2) and out.dtype == gate_up.dtype)
    ):
        refuse("silu_mul", "out must be [rows, cols] in gate_up's dtype")
    dense("silu_mul", gate_up.get_device(), gate_up, *(() if out is None else (out,)))


def outputs(gate_up):
    return torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)


def reference(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def cuda(k, gate_up, out):
    rows, cols = out.shape
    k.silu_mul(
        gate_up=gate_up.data_ptr(),
        y=out.data_ptr(),
        rows=rows,
        cols=cols,
        dtype=DTYPE_CODES[out.dtype],
        stream=k.stream(),
    )


def triton(gate_up, out):
    from triton_kernels.silu_mul import silu_mul

    silu_mul(gate_up, out)


def torch_(gate_up, out):
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate.float()) * up.float())


op = Op(
    name="silu_mul",
    summary="y = silu(gate) * up",
    dtypes=FLOATS,
    validate=validate,
    outputs=outputs,
    reference=reference,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    inputs=lambda rand, rows, cols: (rand(rows, 2 * cols, scale=3.0),),  # past where the sigmoid saturates
    nbytes=lambda a: a.gate_up.nbytes + a.gate_up.nbytes // 2,
    flops=lambda a: 5 * a.gate_up.numel() // 2,
    # One rounding to T (half a step), and the fast exponential of both languages: 2 ulp, amplified by at most
    # |g| in 1 + exp(-g).
    tolerance=lambda a: (torch.finfo(a.gate_up.dtype).eps / 2 + 32 * EPS32, 1e-30),
    plans=("basic",),
    uses=lambda c: [(None, {"cols": c.parts["w_down"].columns})],
    rows=some_rows,
    direction="copy",
    inspect_sizes=dict(rows=1, cols=14336),
    peers=(peers.LIGER_SILU_MUL,),
    color="#cc6677",
    cases=(
        case("one row, SmolLM2's width", rows=1, cols=1536),
        case("a width that is no multiple of the vector", rows=3, cols=101),
        case("the largest batch", rows=64, cols=264),
    ),
)
