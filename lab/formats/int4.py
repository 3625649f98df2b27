"""int4: integers of 4 bits with a scale for every 32 or 128 columns

  int4-g32        weight = scale * (code - 8)           4.5 bits a weight; GGUF's Q4_0 exactly
  int4-g32-min    weight = scale * code + minimum       5 bits; GGUF's Q4_1 exactly
  int4-g128       weight = scale * (code - 8)           4.125 bits
  int4-g128-zero  weight = scale * (code - zero)        4.25 bits; AWQ and GPTQ exactly; zero 0 .. 16
code 0 .. 15; scale, minimum and zero float16
Kernels: cuda_src/formats/int4.cuh, triton_kernels/formats/int4.py
"""

import torch

from lab.formats.format import Format
from lab.formats.int8 import usable

MIDDLE = 8  # the code of zero in the symmetric formats


def decode_symmetric(codes: torch.Tensor) -> torch.Tensor:
    return codes.double() - MIDDLE


def encode_symmetric(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (w.abs().amax(-1, keepdim=True) / 7).to(torch.float16)
    codes = (w / usable(scales)).round_().clamp_(-MIDDLE, 7) + MIDDLE
    return codes.to(torch.uint8), scales


def encode_minimum(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    least = w.amin(-1, keepdim=True).to(torch.float16)
    scales = ((w.amax(-1, keepdim=True) - least.float()) / 15).to(torch.float16)
    codes = ((w - least.float()) / usable(scales)).round_().clamp_(0, 15)
    return codes.to(torch.uint8), torch.cat((scales, least), -1)


def encode_zero(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    least, most = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    scales = ((most - least) / 15).to(torch.float16)
    zeros = (-least / usable(scales)).round_().clamp_(0, 15)
    codes = ((w / usable(scales)).round_() + zeros).clamp_(0, 15)
    return codes.to(torch.uint8), torch.cat((scales, zeros.to(torch.float16)), -1)


def _format(name: str, summary: str, number: int, group: int, encode, second: str | None = None) -> Format:
    symmetric = second is None
    return Format(
        name,
        summary,
        number=number,
        bits=4,
        group=group,
        scale_dtype=torch.float16,
        decode=decode_symmetric if symmetric else torch.Tensor.double,
        encode=encode,
        second=second,
        blank=MIDDLE if symmetric else 0,
    )


FORMATS = (
    _format("int4-g32", "4-bit integers, a scale for 32 columns (GGUF Q4_0)", 3, 32, encode_symmetric),
    _format(
        "int4-g32-min",
        "4-bit integers, scale and minimum for 32 columns (GGUF Q4_1)",
        4,
        32,
        encode_minimum,
        "minimum",
    ),
    _format("int4-g128", "4-bit integers, a scale for 128 columns", 5, 128, encode_symmetric),
    _format(
        "int4-g128-zero",
        "4-bit integers, scale and zero for 128 columns (AWQ, GPTQ)",
        6,
        128,
        encode_zero,
        "zero",
    ),
)
