"""q4_k: integers of 4 bits; scale and minimum for 32 columns are 6-bit integers times numbers for 256 columns

    weight = (d * scale) * code - dmin * minimum        4.5 bits a weight; GGUF's Q4_K exactly

code 0 .. 15; scale and minimum 0 .. 63; d and dmin float16. The 8 groups of 256 columns are one piece of 16
bytes, four words:

    word 0, 1    byte j: of group j, and 4 + j, the lower 4 bits of scale (in bits 0 ..) and minimum (4 ..)
    word 2       d in the lower half, dmin in the upper
    word 3       byte j: the upper 2 bits of group j's scale (0 ..) and minimum (2 ..), and of group 4 + j's
Kernels: cuda_src/formats/q4_k.cuh, triton_kernels/formats/q4_k.py
"""

import torch

from lab.formats.format import Format
from lab.formats.int8 import usable

COLUMNS, GROUP, LARGEST = 256, 32, 63


def pieces(d: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """int32 [..., 4] of d and dmin, float16 [..., 2], and of 6-bit integers uint8 [..., 8]."""
    low = scales & 15 | (minima & 15) << 4
    high = scales >> 4 | minima >> 4 << 2
    high = high[..., :4] | high[..., 4:] << 4
    return torch.cat((low, d.contiguous().view(torch.uint8), high), -1).view(torch.int32)


def scale_value(stored: torch.Tensor) -> torch.Tensor:
    """float64 [rows, 8 * pieces, 2]: d * scale and -dmin * minimum, both of 17 bits."""
    by_byte = stored.contiguous().view(torch.uint8)
    d = by_byte[..., 8:12].contiguous().view(torch.float16).double()
    low, high = by_byte[..., :8], by_byte[..., 12:]
    high = torch.cat((high & 15, high >> 4), -1)
    scales, minima = low & 15 | (high & 3) << 4, low >> 4 | (high & 12) << 2
    return torch.stack((d[..., :1] * scales, -d[..., 1:] * minima), -1).flatten(1, 2)


def encode(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rounded to nearest in turn: d and dmin, scales and minima, codes. (llama.cpp searches for scales
    that make the error smaller.)"""
    groups = w.unflatten(-1, (-1, GROUP))
    depth = -groups.amin(-1).clamp(max=0)
    size = (groups.amax(-1).clamp(min=0) + depth) / 15
    d = torch.stack((size.amax(-1), depth.amax(-1)), -1).div(LARGEST).to(torch.float16)
    integers = torch.stack((size, depth), -2) / usable(d)[..., None]
    scales, minima = integers.round_().clamp_(0, LARGEST).unbind(-2)
    stored = pieces(d, scales.to(torch.uint8), minima.to(torch.uint8))
    worth = scale_value(stored).float().view(*scales.shape, 2)
    codes = ((groups - worth[..., 1:]) / usable(worth[..., :1])).round_().clamp_(0, 15)
    return codes.to(torch.uint8).flatten(-2), stored


FORMATS = (
    Format(
        "q4_k",
        "4-bit integers, scale and minimum of 6 bits for 32 columns (GGUF Q4_K)",
        number=10,
        bits=4,
        group=GROUP,
        scale_dtype=torch.int32,
        decode=torch.Tensor.double,
        encode=encode,
        second="minimum",
        scale_value=scale_value,
        piece=(COLUMNS, 4),
    ),
)
