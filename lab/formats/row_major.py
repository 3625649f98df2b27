"""Codes of 4 bits as one would write them down first, for the lower rungs of the ladder quantised_linear.

    codes   uint8 [rows, groups * group / 2]: column c in byte c / 2, an even one in its lower four bits
    scales  [rows, groups]

A row is filled up to whole groups with codes that stand for 0. Every kernel but those rungs reads the layout
of lab/formats/format.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lab.formats.format import Format, PackedMatrix, by_rows, unpack


@dataclass(eq=False)
class RowMajor:
    """Weights [rows, k] with codes and scales as above."""

    format: Format
    rows: int
    k: int
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.k


def row_major(w: PackedMatrix) -> RowMajor:
    """The same codes and scales row by row. w is of 4 bits, with one number for each group."""
    f = w.format
    assert f.bits == 4 and f.items == 1 and f.group, f.name
    codes = unpack(by_rows(w.codes)[: w.rows], f.bits)[:, : f.pieces(w.k) * f.group]
    return RowMajor(
        f,
        w.rows,
        w.k,
        codes[:, ::2] | codes[:, 1::2] << 4,
        w.scales_by_row()[:, : f.pieces(w.k), 0].contiguous(),
    )
