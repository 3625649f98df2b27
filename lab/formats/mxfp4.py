"""mxfp4: floating-point numbers of 4 bits, e2m1, with one power of two for every 32 columns

    weight = 2^(exponent - 127) * number(code)        4.25 bits a weight; exponent uint8

The codes 0 .. 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, and 8 .. 15 the same with a minus sign. Source: OCP
Microscaling Formats (MX) v1.0, as in gpt-oss. The exponent 255 means NaN there and is refused.
Kernels: cuda_src/formats/mxfp4.cuh, triton_kernels/formats/mxfp4.py
"""

import torch

from lab.formats.format import Format

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127  # of the exponent
LARGEST = 2  # the exponent of the largest number, 6 = 1.5 * 2^2


def decode(codes: torch.Tensor) -> torch.Tensor:
    signed = torch.tensor(NUMBERS + tuple(-x for x in NUMBERS), dtype=torch.float64, device=codes.device)
    return signed[codes.long()]


def scale_value(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.double() - BIAS)


def encode(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The exponent that the MX specification proposes: that of the largest weight, less that of 6.
    _, exponent = torch.frexp(w.abs().amax(-1, keepdim=True))  # w = m * 2^exponent, 0.5 <= m < 1
    exponents = (exponent - 1 - LARGEST + BIAS).clamp_(0, 254).to(torch.uint8)
    size = w.double() / scale_value(exponents)
    middles = torch.tensor([(a + b) / 2 for a, b in zip(NUMBERS, NUMBERS[1:])], device=w.device).double()
    # Nearest number; halfway between two, the one whose code is even, as in IEEE 754.
    up, down = torch.bucketize(size.abs(), middles, right=True), torch.bucketize(size.abs(), middles)
    codes = torch.where(up % 2 == 0, up, down)
    return (codes + 8 * (size < 0)).to(torch.uint8), exponents


FORMATS = (
    Format(
        "mxfp4",
        "4-bit floats (e2m1), an exponent for 32 columns (gpt-oss)",
        number=8,
        bits=4,
        group=32,
        scale_dtype=torch.uint8,
        decode=decode,
        encode=encode,
        scale_value=scale_value,
    ),
)
