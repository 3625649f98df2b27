"""fp8: floating-point numbers of 8 bits, e4m3 (4 bits of exponent, 3 of mantissa), one scale a row

    weight = scale * number(code)        8 bits a weight; scale float32

e4m3 as torch.float8_e4m3fn has it: no infinity, largest number 448; the codes of NaN are refused.
Kernels: cuda_src/formats/fp8.cuh, triton_kernels/formats/fp8.py
"""

import torch

from lab.formats.format import Format
from lab.formats.int8 import usable

LARGEST = 448.0


def decode(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn).float().double()


def encode(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = w.abs().amax(-1, keepdim=True) / LARGEST
    codes = (w / usable(scales)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


FORMATS = (
    Format(
        "fp8",
        "8-bit floats (e4m3), one scale a row",
        number=7,
        bits=8,
        group=None,
        scale_dtype=torch.float32,
        decode=decode,
        encode=encode,
    ),
)
