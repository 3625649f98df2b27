"""A matrix of a model: the one place that knows how its numbers are stored.

Everything that reads a matrix goes through `Matrix` and asks for what it needs:

    who reads                                                   what it asks for
    the plans, StepModel, and so every op of a decode step      operand, once, when the buffers are made
    prefill and the torch.compile peer                          product(), lookup()
    bytes of a step and of a model (lab bench, lab ledger)      nbytes, tensors()
    the check that a model fits into memory                     Part.nbytes() in lab/model/description.py
    the loader (lab/model/weights.py)                           Matrix(values), once for each matrix

Today the numbers are a plain tensor. A format that stores them in fewer bits adds its fields here (the
format's name, the scales) and says in the methods above what each reader gets; the ops learn to multiply by
the new operand. Matrices of one model may then have different formats, since each carries its own. What the
loader stacks into one matrix (q, k and v; gate and up: see Part) is stacked before the Matrix is made, and so
has one format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Matrix:
    """[rows, cols], row-major: one row for each output of a product, or for each token of an embedding."""

    data: torch.Tensor

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        return self.data.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that it multiplies and of the rows that lookup() gives."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def operand(self) -> torch.Tensor:
        """What the ops take as `w` (linear and the fused products) or `table` (embedding)."""
        return self.data

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor in which it is stored."""
        return (self.data,)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, and that reading it once moves."""
        return sum(t.nbytes for t in self.tensors())

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, cols] times the transposed matrix, plus bias [rows], by torch: [tokens, rows]."""
        return F.linear(x, self.data, bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, by torch: [len(ids), cols]. ids are checked by the caller."""
        return F.embedding(ids, self.data)
