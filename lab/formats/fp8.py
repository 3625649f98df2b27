"""fp8: floating-point numbers of 8 bits, e4m3 (4 bits of exponent, 3 of mantissa)

    weight = scale * number(code)        scale float32

  fp8         one scale a row: 8 bits a weight
  fp8-g128    one for 128 columns: 8.25 bits; checkpoints with a scale for a block of 128 x 128 exactly, whose
              scale is repeated for each row of the block

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


def _format(name: str, summary: str, number: int, group: int | None) -> Format:
    return Format(
        name,
        summary,
        number=number,
        bits=8,
        group=group,
        scale_dtype=torch.float32,
        decode=decode,
        encode=encode,
    )


FORMATS = (
    _format("fp8", "8-bit floats (e4m3), one scale a row", 7, None),
    _format("fp8-g128", "8-bit floats (e4m3), a scale for 128 columns (DeepSeek, Qwen3-FP8)", 9, 128),
)
