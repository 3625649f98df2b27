"""The weights of a product as an op takes them: a plain tensor in the dtype of x, or a PackedMatrix."""

from __future__ import annotations

import torch

from lab.contract import FLOATS, Case, case, dense, refuse
from lab.formats import FORMATS, PackedMatrix

Operand = torch.Tensor | PackedMatrix


def check(op: str, x: torch.Tensor, w: Operand) -> None:
    """Raises LabError unless x [batch, k] can be multiplied by w [n, k]."""
    dtype = x.dtype  # each look at a tensor's dtype or shape costs a twentieth of a microsecond, or a tenth
    if dtype not in FLOATS:
        refuse(op, f"takes no {dtype}: x must be float32, float16 or bfloat16")
    if type(w) is PackedMatrix:
        if not (x.dim() == 2 and x.shape[1] == w.k):
            refuse(op, "x [batch, k] and w [n, k] must agree in k")
        dense(op, w.get_device(), x, w.codes, w.scales)
        check_packed(op, w)
    else:
        of_x, of_w = x.shape, w.shape
        if not (len(of_x) == 2 and len(of_w) == 2 and of_x[1] == of_w[1] and dtype == w.dtype):
            refuse(op, "x [batch, k] and w [n, k] must agree in k and dtype")
        dense(op, w.get_device(), x, w)


def check_packed(op: str, w: PackedMatrix) -> None:
    """Raises LabError unless the tensors of a packed matrix have the sizes and dtypes of its format."""
    f = w.format
    codes, scales = f.codes_shape(*w.shape), f.scales_shape(*w.shape)
    if w.codes.shape != codes or w.codes.dtype != torch.uint8:
        refuse(op, f"codes of {f.name} for {list(w.shape)} must be uint8 {list(codes)}")
    if w.scales.shape != scales or w.scales.dtype != f.scale_dtype:
        refuse(op, f"scales of {f.name} for {list(w.shape)} must be {f.scale_dtype} {list(scales)}")


def pointers(w: Operand) -> tuple[int, int, int]:
    """(address of the numbers, address of the scales, number of the format): Weights of arguments.h."""
    if isinstance(w, torch.Tensor):
        return w.data_ptr(), 0, 0
    return w.codes.data_ptr(), w.scales.data_ptr(), w.format.number


def as_float(w: Operand) -> torch.Tensor:
    """The weights in float32, for torch's own product."""
    return w.to(torch.float32)


def magnitude(w: Operand) -> torch.Tensor:
    """float64 [n, k]: the size of the numbers that a kernel adds up for each weight. With a minimum these are
    two, scale * code and the minimum, which may be much larger than their sum."""
    if type(w) is PackedMatrix and w.format.second == "minimum":
        least = w.scale_values()[:, :, 1:]
        width = w.format.group
        by_group = w.double_padded().unflatten(1, (-1, width))
        return ((by_group - least).abs() + least.abs()).flatten(1)[:, : w.k]
    return w.double().abs()


def of_random(w: torch.Tensor, format: str | None) -> Operand:
    """w itself, or w in a format: for the inputs of a check."""
    return w if format is None else FORMATS[format].quantise(w)


# On Hopper x passes through a workspace (cuda_src/core/tiled_rows.cuh).
TILED = case("packed: x in tiles of 16 rows", batch=12, n=40, k=200, format="fp8-g128")


def format_cases(**more) -> tuple[Case, ...]:
    """Sizes at which `lab check` runs a product with weights of each format. more: sizes of a batch that is
    neither one row nor fills a tile."""
    found = []
    for name in FORMATS:
        found += [
            case(f"{name}: no whole segment of k, no whole tile of n", batch=1, n=37, k=300, format=name),
            case(f"{name}: a few rows, several segments", batch=5, n=50, k=1100, format=name, **more),
        ]
    more_rows = dict(batch=19, n=24, k=576, format="int4-g32-min")
    found.append(case("packed: more rows than a tile has columns", **more_rows))
    found.append(case("packed: x in tiles of 64 rows", batch=33, n=40, k=200, format="int4-g128"))
    return (*found, TILED)


def some_format_cases(**more) -> tuple[Case, ...]:
    """The same for a product whose packed weights are multiplied by the kernel of another: one format with
    scales for groups and a minimum, one with scales for rows."""
    return (
        case("packed, one row", batch=1, n=37, k=300, format="int4-g32-min"),
        case("packed, a few rows", batch=5, n=50, k=576, format="int8", **more),
        TILED,
    )
