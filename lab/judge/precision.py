"""How precise a kernel is, by the statistics of its errors.

A tolerance is a bound for each element, so it must hold for the worst one. A kernel that rounds once too
often, or cuts digits off instead of rounding, stays within it. The sizes of thousands of errors tell such a
kernel from one that computes in float32 and rounds once.

Errors are compared with those of the right value rounded once to the output's dtype. To these is added what
the float32 arithmetic may do: a share of the tolerance beyond one step of the dtype. Each element is first
divided by the size that is to be expected of its error, so that large values do not count more than small
ones.

A contract may allow a rounding on the way that many elements share (`Op.shared_rounding`). In attention over
a cache in int8 it is that of a weight times its value's scale: where one token has nearly all the weight,
this shifts a whole head to one side. And as a scale is the largest of a head's numbers divided by 127, most
scales lie above the bfloat16 that is next to them. Such a rounding is expected in full, and as much bias as
it may cause is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lab.judge.refusal import Refusal

FLOAT32_SHARE = 8.0  # of the tolerance beyond one step: the standard deviation of the float32 arithmetic
FEWEST = 64  # elements, from which on statistics say something
# The kernels of this repository, of all ops and in both languages, have sizes up to 1.00 and biases up to
# 0.08 in fp16 and bf16. Results that are cut off give 2.0 and a bias of 1.7, a second rounding about 1.4.
# In fp32, where the order of a sum is seen, sizes go up to 1.0 and biases of correlated elements up to 0.25.
LARGEST, MOST_BIAS = {2: 1.12, 4: 2.0}, {2: 0.2, 4: 1.0}  # by the bytes of an element


@dataclass
class Errors:
    """Sums over the elements of a kernel's outputs of one width, each in units of the error to be expected of
    it."""

    itemsize: int
    count: int = 0
    squares: float = 0.0  # of the errors
    expected: float = 0.0  # the same of a kernel that rounds once
    outward: float = 0.0  # of the errors away from 0, less those of one rounding
    shifted: float = 0.0  # of what shared roundings may add to that, on either side

    def add(self, got: torch.Tensor, want: torch.Tensor, rtol: float, atol, shared: float = 0.0) -> None:
        """got: an output; want: the right values, float64; rtol, atol: the tolerance; shared: what the op's
        shared_rounding() says."""
        if not (got.is_floating_point() and want.is_floating_point() and got.itemsize == self.itemsize):
            return
        info = torch.finfo(got.dtype)
        want, once = want.double(), want.to(got.dtype).double()
        usual = once.isfinite() & got.isfinite() & (want.abs() >= info.smallest_normal)
        usual &= ~((once == want) & (got == once))  # a copied value, as most of the KV cache, says nothing
        atol = torch.as_tensor(atol, dtype=torch.float64, device=want.device).expand_as(want)[usual]
        got, want, once = got.double()[usual], want[usual], once[usual]
        step = torch.exp2(torch.frexp(want).exponent.double() - 1) * info.eps
        float32 = (atol + max(rtol - info.eps, 0.0) * want.abs()) / FLOAT32_SHARE
        before = shared * want.abs()  # as large as it may be, for all elements may have the same
        unit = (step.square() / 12 + before.square() + float32.square()).sqrt()
        self.count += want.numel()
        self.squares += float(((got - want) / unit).square().sum())
        expected = (once - want).square() + before.square() + float32.square()
        self.expected += float((expected / unit.square()).sum())
        self.outward += float(((got - once) * want.sign() / unit).sum())
        self.shifted += float((before / unit).sum())

    @property
    def size(self) -> float:
        """The root mean square of the errors, divided by that of a kernel that rounds once."""
        return math.sqrt(self.squares / self.expected) if self.expected else 0.0

    @property
    def bias(self) -> float:
        """How many such units the outputs lie further from 0 than the right values rounded once, on average,
        beyond what shared roundings may shift them."""
        beyond = math.copysign(max(abs(self.outward) - self.shifted, 0.0), self.outward)
        return beyond / self.count if self.count else 0.0

    def refusal(self) -> Refusal | None:
        """Why a kernel with these errors is not precise enough, or None."""
        if self.count < FEWEST:
            return None
        if abs(self.bias) > MOST_BIAS[self.itemsize]:
            where = "away from" if self.bias > 0 else "towards"
            return Refusal(
                "biased rounding",
                f"results lie {where} 0 by {abs(self.bias):.2f} standard deviations of a rounding, "
                "as when digits are cut off: round to the nearest",
            )
        if self.size > LARGEST[self.itemsize]:
            return Refusal(
                "low precision",
                f"errors are {self.size:.2f} times those of float32 arithmetic that is rounded once: the "
                "contract allows no other rounding in between",
            )
        return None


class ErrorsByWidth:
    """The errors of all outputs of an op."""

    def __init__(self):
        self.all = [Errors(2), Errors(4)]

    def add(self, *output, **options) -> None:
        for errors in self.all:
            errors.add(*output, **options)

    def refusal(self) -> Refusal | None:
        return next(filter(None, (errors.refusal() for errors in self.all)), None)
