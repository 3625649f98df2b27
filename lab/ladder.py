"""The rungs of the ladders (lab/rungs/) as functions.

`bind` gives a rung as a function with the op's arguments, so that `lab check --ladder` and `lab bench ops
--ladder` run it like any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from lab.backends import load
from lab.contract import Op, pointer
from lab.errors import LabError
from lab.ops import find
from lab.rungs import BACKENDS, Ladder, Rung, ladder_of, rungs


def bind(rung: Rung, backend: str, device: str | torch.device = "cpu") -> RungFunction:
    """The rung as a function of the op's arguments and `out=`.

    Raises LabError if the language has no such rung, Unavailable if this machine lacks the backend; the
    function raises LabError for arguments that the op or the rung does not take.
    """
    if backend in rung.absent:
        raise LabError(f"{rung.ladder} has no rung {rung.title!r} in {backend}: {rung.absent[backend]}")
    if backend not in BACKENDS:
        raise LabError(f"backend {backend!r} has no ladder: choose from {', '.join(BACKENDS)}")
    language, name = load(backend, torch.device(device)), f"{rung.ladder}_ladder"
    if backend == "cuda" and not rung.own_kernel and not hasattr(language.kernels, name):
        raise LabError(
            f"{name} is not in {language.extension.__name__}: build again with "
            "`python setup.py build_ext --inplace`"
        )
    return RungFunction(rung, ladder_of(rung.ladder), find(rung.op), backend, language)


@dataclass(frozen=True)
class RungFunction:
    rung: Rung
    ladder: Ladder
    op: Op
    backend: str
    language: Any  # a Backend of lab/backends

    def __call__(self, *args, out=None, **options) -> torch.Tensor:
        if out is None:
            self.op.validate(*args, **options)
            out = self.op.outputs(*args, **options)
        self.ready(*args, out=out, **options)()
        return out

    def ready(self, *args, out: torch.Tensor, **options) -> Callable[[], None]:
        """What launches the rung on these arguments, and does nothing else: they have been validated, and
        brought to the form that the rung takes."""
        op, rung, ladder = self.op, self.rung, self.ladder
        op.validate(*args, out=out, **options)
        a = op.bound(*args, **options)
        if format_of(a) != ladder.format:
            wanted = f"weights in {ladder.format}" if ladder.format else "plain weights"
            raise LabError(f"the ladder {ladder.name} needs {wanted}")
        if not rung.takes(a):
            raise LabError(f"{ladder.name} rung {rung.title!r} needs {rung.needs}")
        if rung.own_kernel:
            return partial(self.language.launcher(op), *args, out=out, **options)
        other, memory = ladder.prepare(rung.number, a) if ladder.prepare else ({}, {})
        if self.backend == "triton":
            if op.workspace is not None and a.workspace is None:
                a.workspace = op.workspace(a)
            return partial(ladder.triton, rung.number, SimpleNamespace(**{**vars(a), **other}), out, **memory)
        kernels = self.language.kernels
        addresses = {name: pointer(t) for name, t in memory.items()}
        launcher = partial(getattr(kernels, f"{ladder.name}_ladder"), rung.number, **addresses)
        # The kernel knows the memory by its address alone, so it is kept here.
        of_rung = SimpleNamespace(**{op.name: launcher}, stream=kernels.stream, memory=memory)
        return partial(op.launchers["cuda"], of_rung, **{**vars(a), **other, "out": out})


def format_of(a) -> str | None:
    """The format of the weights among an op's arguments; None: plain, or it has none."""
    return getattr(getattr(a, "w", None), "format_name", None)


def in_worker(spec: dict) -> Callable:
    """name -> rung of spec["backend"] on spec["device"], in a worker's process."""
    return lambda name: bind(rung_called(name), spec["backend"], spec["device"])


def rung_called(name: str) -> Rung:
    """The rung that "linear 3" names."""
    ladder, number = name.split()
    return next(rung for rung in rungs(ladder) if rung.number == int(number))
