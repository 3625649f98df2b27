"""int8: signed integers of 8 bits with one scale a row, or one for every 32 columns (GGUF's Q8_0 exactly)

    weight = scale * code        code -128 .. 127, as the bits of a signed byte

  int8        scale float32, one a row: 8 bits a weight
  int8-g32    scale float16, one for 32 columns: 8.5 bits a weight
Kernels: cuda_src/formats/int8.cuh, triton_kernels/formats/int8.py
"""

import torch

from lab.formats.format import Format


def decode(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int8).double()


def encode(w: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (w.abs().amax(-1, keepdim=True) / 127).to(scale_dtype)
    codes = (w / usable(scales)).round_().clamp_(-127, 127)
    return codes.to(torch.int8).view(torch.uint8), scales


def usable(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32 to divide by: 1 where a group holds only zeros, or numbers that small."""
    wide = scales.float()
    return torch.where(wide == 0, 1.0, wide)


FORMATS = (
    Format(
        "int8",
        "8-bit integers, one scale a row",
        number=1,
        bits=8,
        group=None,
        scale_dtype=torch.float32,
        decode=decode,
        encode=lambda w: encode(w, torch.float32),
    ),
    Format(
        "int8-g32",
        "8-bit integers, a scale for 32 columns (GGUF Q8_0)",
        number=2,
        bits=8,
        group=32,
        scale_dtype=torch.float16,
        decode=decode,
        encode=lambda w: encode(w, torch.float16),
    ),
)
