"""The rungs of the ladders (lab/rungs/) as functions.

`bind` gives a rung as a function with the op's arguments, so that `lab check --ladder` and `lab bench ops
--ladder` run it like any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from lab.backends import load
from lab.contract import Op
from lab.errors import LabError
from lab.ops import find
from lab.rungs import BACKENDS, Rung, ladder_of, rungs


def bind(rung: Rung, backend: str, device: str | torch.device = "cpu") -> Callable:
    """The rung as a function of the op's arguments and `out=`.

    Raises LabError if the language has no such rung, Unavailable if this machine lacks the backend; the
    function raises LabError for arguments that the op or the rung does not take.
    """
    if backend in rung.absent:
        raise LabError(f"{rung.op} has no rung {rung.title!r} in {backend}: {rung.absent[backend]}")
    op, language = find(rung.op), load(backend, torch.device(device))
    if rung.own_kernel:
        launch = language.launcher(op)
    elif backend == "cuda":
        name = f"{op.name}_ladder"
        if not hasattr(language.kernels, name):
            raise LabError(
                f"{name} is not in {language.extension.__name__}: build again with "
                "`python setup.py build_ext --inplace`"
            )
        kernels = {
            op.name: partial(getattr(language.kernels, name), rung.number),
            "stream": language.kernels.stream,
        }
        launch = partial(op.launchers["cuda"], SimpleNamespace(**kernels))
    elif backend == "triton":
        launch = partial(launch_triton, op, rung)
    else:
        raise LabError(f"backend {backend!r} has no ladder: choose from {', '.join(BACKENDS)}")

    def call(*args, out=None, **options):
        op.validate(*args, out=out, **options)
        if not rung.takes(op.bound(*args, **options)):
            raise LabError(f"{op.name} rung {rung.title!r} needs {rung.needs}")
        if out is None:
            out = op.outputs(*args, **options)
        launch(*args, out=out, **options)
        return out

    return call


def launch_triton(op: Op, rung: Rung, *args, out: torch.Tensor, **options) -> None:
    a = op.bound(*args, **options)
    if op.workspace is not None and a.workspace is None:
        a.workspace = op.workspace(a)
    ladder_of(op.name).triton(rung.number, a, out)


def in_worker(spec: dict) -> Callable:
    """name -> rung of spec["backend"] on spec["device"], in a worker's process."""
    return lambda name: bind(rung_called(name), spec["backend"], spec["device"])


def rung_called(name: str) -> Rung:
    """The rung that "linear 3" names."""
    op, number = name.split()
    return next(rung for rung in rungs(op) if rung.number == int(number))
