"""q6_k: integers of 6 bits; the scale for 16 columns is an 8-bit integer times a number for 256 columns

    weight = (d * scale) * (code - 32)        6.625 bits a weight; GGUF's Q6_K exactly

code 0 .. 63; scale -128 .. 127; d a float16. The 16 groups of 256 columns are one piece of 20 bytes: 16
scales, and d as a float32. (GGUF stores d in 16 bits, and so 6.5625 bits a weight. With 20 bytes every piece
begins at a multiple of 4, and words can be loaded.)
Kernels: cuda_src/formats/q6_k.cuh, triton_kernels/formats/q6_k.py
"""

import torch

from lab.formats.format import Format
from lab.formats.int8 import usable

COLUMNS, GROUP, MIDDLE = 256, 16, 32


def decode(codes: torch.Tensor) -> torch.Tensor:
    return codes.double() - MIDDLE


def pieces(d: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [..., 5] of d, float16 [..., 1], and scales int8 [..., 16]."""
    return torch.cat((scales.contiguous().view(torch.int32), d.float().view(torch.int32)), -1)


def scale_value(stored: torch.Tensor) -> torch.Tensor:
    """float64 [rows, 16 * pieces, 1]: d * scale, of 18 bits."""
    scales, d = stored[..., :4].contiguous().view(torch.int8), stored[..., 4:].contiguous()
    return (d.view(torch.float32).double() * scales).flatten(1)[..., None]


def encode(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rounded to nearest in turn: d, scales, codes. (llama.cpp searches for scales that make the error
    smaller.)"""
    groups = w.unflatten(-1, (-1, GROUP))
    size = groups.abs().amax(-1) / (MIDDLE - 1)
    d = (size.amax(-1, keepdim=True) / 127).to(torch.float16)
    scales = (size / usable(d)).round().clamp(0, 127)
    stored = pieces(d, scales.to(torch.int8))
    worth = scale_value(stored).float().view(*scales.shape, 1)
    codes = (groups / usable(worth)).round_().clamp_(-MIDDLE, MIDDLE - 1) + MIDDLE
    return codes.to(torch.uint8).flatten(-2), stored


FORMATS = (
    Format(
        "q6_k",
        "6-bit integers, a scale of 8 bits for 16 columns (GGUF Q6_K)",
        number=11,
        bits=6,
        group=GROUP,
        scale_dtype=torch.int32,
        decode=decode,
        encode=encode,
        blank=MIDDLE,
        scale_value=scale_value,
        piece=(COLUMNS, 5),
    ),
)
