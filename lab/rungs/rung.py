"""What a ladder and a rung are. No import of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rung:
    """One step of a ladder. The sizes that `gain` argues about are those of `lab bench ops --ladder`: of the
    whole ladder, or, where what the rung changes matters at another size, `at`."""

    op: str
    number: int
    name: str
    idea: str  # what it changes
    gain: str  # what that should gain on an H100, and why
    factor: float = 1.0  # promised speed over the rung that it changes, at least; 1: no promise
    over: int = 0  # the number of the rung that it changes; 0: the one below
    # Batch, context or shape at which a GPU measures it beside that rung, where they are not the ladder's.
    at: Mapping = field(default_factory=dict, hash=False)
    factors: Mapping[int, float] = field(default_factory=dict, hash=False)  # the same at other batches
    otherwise: str = ""  # why it may gain less
    absent: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # backend -> why there is no such rung
    needs: str = ""  # what its arguments must be, in words
    fits: Callable | None = None  # (a) -> whether they are that; a: the op's arguments by name
    drawing: str = ""  # of lab/report/drawings.py, that explains it
    named: str = ""  # the ladder, if it is not called like its op

    @property
    def ladder(self) -> str:
        """The name of its ladder."""
        return self.named or self.op

    @property
    def title(self) -> str:
        return f"{self.number}. {self.name}"

    @property
    def changes(self) -> int:
        """The number of the rung that it changes; 0 of the lowest."""
        return self.over or self.number - 1

    @property
    def own_kernel(self) -> bool:
        """Is it the op's own kernel?"""
        return self.name == "Product"

    def promised(self, batch: int) -> float:
        """The speed over the rung that it changes that is promised at a batch."""
        return self.factors.get(batch, self.factor)

    def takes(self, a) -> bool:
        """Does the rung take these arguments of its op, by name?"""
        return self.fits is None or self.fits(a)


@dataclass(frozen=True)
class Ladder:
    """The kernels of one op from a naive one to its own, and what they are checked and measured with."""

    op: str
    rungs: tuple[Rung, ...]  # the lowest first
    # (number of a rung, a, out, **memory) -> None: launches it. a: the op's arguments by name
    triton: Callable
    cases: tuple[tuple[str, Mapping], ...]  # (why, sizes of the op's inputs) of `lab check --ladder`
    points: Mapping[str, Mapping]  # device -> batch, context, and shape of `lab bench ops --ladder`
    batches: tuple[int, ...] = ()  # other batches at which a GPU measures it
    format: str | None = None  # of the weights; None: plain
    # (number of a rung, a) -> (the op's arguments that the rung takes in another form, by name, and memory
    # that it needs beside them, by the name that its launchers have for it: a tensor or None). It is called
    # before a rung is timed.
    prepare: Callable | None = None

    @property
    def name(self) -> str:
        return self.rungs[0].ladder


def whole_vectors(x) -> bool:
    """Do the rows of x consist of whole 16-byte vectors?"""
    return x.shape[-1] * x.itemsize % 16 == 0


COMPILER_LAYOUT = "Triton's compiler chooses the layout of shared memory, with its swizzles, itself."
