"""Checks a tensor that was read from a file, and copies it into the model."""

from dataclasses import dataclass

import torch

from lab.errors import LabError
from lab.formats import fp8


@dataclass(frozen=True)
class Stored:
    """How a source stores a tensor."""

    type: str  # as its file calls it: Q4_1, BF16, AWQ ...
    quantised: bool = False  # in codes and scales, not as numbers
    format: str | None = None  # of lab.formats.FORMATS, which holds it exactly; None: plain, or there is none


def check_shape(shape, wanted, name: str, where: str) -> None:
    """Raises LabError where a tensor of a file has another shape than the model asks for."""
    if tuple(shape) != tuple(wanted):
        raise LabError(f"{where}: tensor {name} is {list(shape)}; the model's shape asks for {list(wanted)}")


def check_scales(scales: torch.Tensor, name: str, where: str) -> None:
    """Raises LabError for scales, minima or zeros of a quantised tensor that are not numbers, or so large
    that a weight could be beyond float32."""
    if not torch.isfinite(scales).all():
        raise LabError(f"{where}: tensor {name} has scales that are NaN or inf; the file is mangled")
    # No format's codes go further than those of fp8.
    if scales.numel() and not torch.isfinite(scales.abs().amax().float() * fp8.LARGEST):
        most = torch.finfo(torch.float32).max / fp8.LARGEST
        raise LabError(f"{where}: tensor {name} has a scale above {most:.1g}; the file is mangled")


def kv_scales_of(source) -> list[tuple[float, float]] | None:
    """What a source knows of the scales of a KV cache in fp8 (see lab/model/sources/__init__.py)."""
    return source.kv_scales() if hasattr(source, "kv_scales") else None


def store(values: torch.Tensor, out: torch.Tensor, name: str, where: str) -> None:
    """Copies a tensor read from a file to `out`. Raises LabError where its shape is wrong, or a value is not
    finite in out's dtype."""
    check_shape(values.shape, out.shape, name, where)
    out.copy_(values)
    if not torch.isfinite(out).all():
        cause = "the file is mangled" if not torch.isfinite(values).all() else "use --dtype bf16 or fp32"
        raise LabError(f"{where}: tensor {name} has values that are not finite in {out.dtype}; {cause}")
