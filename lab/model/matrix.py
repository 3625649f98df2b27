"""A matrix of a model: the one place that knows how its numbers are stored.

Everything that reads a matrix goes through `Matrix` and asks for what it needs:

    who reads                                                   what it asks for
    the plans, StepModel, and so every op of a decode step      operand, once, when the buffers are made
    prefill and the torch.compile peer                          product(), lookup()
    bytes of a step and of a model (lab bench, lab ledger)      nbytes, tensors()
    the check that a model fits into memory                     Part.nbytes() in lab/model/description.py
    the loader (lab/model/weights.py)                           Matrix(values), once for each matrix

The numbers are a tensor in the dtype of the activations, or packed in a weight format (lab/formats). Matrices
of one model may have different formats. What the loader stacks into one matrix (gate and up, say: see Part)
has one format. Only q, k and v may differ: they are then several matrices below each other, each with an
operand of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lab.formats import PackedMatrix


@dataclass(frozen=True, eq=False)
class Matrix:
    """[rows, cols], row-major: one row for each output of a product, or for each token of an embedding.

    data: several where the rows are stored apart. dtype: of the activations that it multiplies and of the
    rows that lookup() gives; a tensor's own.
    """

    data: torch.Tensor | PackedMatrix | tuple[torch.Tensor | PackedMatrix, ...]
    dtype: torch.dtype = None

    def __post_init__(self):
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.data.dtype)

    def apart(self) -> list[Matrix]:
        """The matrices that are stored: itself, unless its rows are stored apart."""
        return [Matrix(one, self.dtype) for one in self.data] if isinstance(self.data, tuple) else [self]

    @property
    def rows(self) -> int:
        if isinstance(self.data, tuple):
            return sum(one.shape[0] for one in self.data)
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        return (self.data[0] if isinstance(self.data, tuple) else self.data).shape[1]

    @property
    def device(self) -> torch.device:
        return (self.data[0] if isinstance(self.data, tuple) else self.data).device

    @property
    def format(self) -> str | None:
        """The name of its weight format; None where it is plain, and where rows are stored apart: ask
        apart()."""
        return self.data.format_name if isinstance(self.data, PackedMatrix) else None

    @property
    def operand(self) -> torch.Tensor | PackedMatrix | tuple[torch.Tensor | PackedMatrix, ...]:
        """What the ops take as `w` (linear and the fused products) or `table` (embedding); several where the
        rows are stored apart."""
        return self.data

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor in which it is stored."""
        if isinstance(self.data, tuple):
            return tuple(t for one in self.apart() for t in one.tensors())
        return self.data.tensors() if isinstance(self.data, PackedMatrix) else (self.data,)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, and that reading it once moves."""
        return sum(t.nbytes for t in self.tensors())

    def same(self, other: Matrix) -> bool:
        """Whether the other has the same numbers, stored in the same way."""
        if isinstance(self.data, PackedMatrix):
            return self.data.same(other.data)
        return isinstance(other.data, torch.Tensor) and torch.equal(self.data, other.data)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, cols] times the transposed matrix, plus bias [rows], by torch: [tokens, rows]. A packed
        matrix is expanded for this call."""
        if isinstance(self.data, tuple):
            y = torch.cat([one.product(x) for one in self.apart()], -1)
            return y if bias is None else y + bias
        return F.linear(x, self.data.to(self.dtype), bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, by torch: [len(ids), cols]. ids are checked by the caller."""
        if isinstance(self.data, PackedMatrix):
            return self.data.some_rows(ids).to(self.dtype)
        return F.embedding(ids, self.data)
