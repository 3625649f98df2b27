"""Checks a tensor that was read from a file, and copies it into the model."""

import torch

from lab.errors import LabError


def check_shape(shape, out: torch.Tensor, name: str, where: str) -> None:
    """Raises LabError where a tensor of a file has another shape than `out`, to which it is copied."""
    if tuple(shape) != tuple(out.shape):
        raise LabError(
            f"{where}: tensor {name} is {list(shape)}; the model's shape asks for {list(out.shape)}"
        )


def store(values: torch.Tensor, out: torch.Tensor, name: str, where: str) -> None:
    """Copies a tensor read from a file to `out`. Raises LabError where its shape is wrong, or a value is not
    finite in out's dtype."""
    check_shape(values.shape, out, name, where)
    out.copy_(values)
    if not torch.isfinite(out).all():
        cause = "the file is mangled" if not torch.isfinite(values).all() else "use --dtype bf16 or fp32"
        raise LabError(f"{where}: tensor {name} has values that are not finite in {out.dtype}; {cause}")
