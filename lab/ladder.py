"""The ladders of lab/rungs.py as functions: linear, rmsnorm and decode_attention from naive up to the
product.

`bind` gives a rung as a function with the op's arguments, so that `lab check --ladder` and `lab bench ops
--ladder` run it like any backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from lab.backends import load
from lab.errors import LabError
from lab.ops import find
from lab.ops.decode_attention import Workspace
from lab.rungs import BACKENDS, Rung, rungs


def bind(rung: Rung, backend: str, device: str | torch.device = "cpu") -> Callable:
    """The rung as a function of the op's arguments and `out=`.

    Raises LabError if the language has no such rung, Unavailable if this machine lacks the backend; the
    function raises LabError for arguments that the op or the rung does not take.
    """
    if backend in rung.absent:
        raise LabError(f"{rung.op} has no rung {rung.title!r} in {backend}: {rung.absent[backend]}")
    op, room = find(rung.op), load(backend, torch.device(device))
    if rung.product:
        launch = room.launcher(op)
    elif backend == "cuda":
        name = f"{op.name}_ladder"
        if not hasattr(room.kernels, name):
            raise LabError(
                f"{name} is not in {room.extension.__name__}: build again with "
                "`python setup.py build_ext --inplace`"
            )
        kernels = {op.name: partial(getattr(room.kernels, name), rung.number), "stream": room.kernels.stream}
        launch = partial(op.launchers["cuda"], SimpleNamespace(**kernels))
    elif backend == "triton":
        launch = partial(_TRITON[op.name], rung.number)
    else:
        raise LabError(f"backend {backend!r} has no ladder: choose from {', '.join(BACKENDS)}")

    def call(*args, out=None, **options):
        op.validate(*args, out=out, **options)
        if rung.fits is not None and not rung.fits(*args[:4] if op.name == "rmsnorm" else args):
            raise LabError(f"{op.name} rung {rung.title!r} needs {rung.needs}")
        if out is None:
            out = op.outputs(*args, **options)
        launch(*args, out=out, **options)
        return out

    return call


def _triton(op):
    return getattr(importlib.import_module(f"triton_kernels.ladder.{op}"), op)


def _linear(rung, x, w, bias=None, out_dtype=None, out=None):
    _triton("linear")(rung, x, w, bias, out)


def _rmsnorm(rung, x, w, eps, residual=None, out=None):
    _triton("rmsnorm")(rung, x, w, eps, residual, out)


def _decode_attention(rung, q, k_cache, v_cache, table, lengths, scale, splits=1, workspace=None, out=None):
    w = workspace or Workspace.empty(q.shape[0], q.shape[1], k_cache.shape[1], q.shape[2], splits, q.device)
    _triton("decode_attention")(
        rung, q, k_cache, v_cache, table, lengths, scale, splits, w.partial, w.tickets, out
    )


_TRITON = {"linear": _linear, "rmsnorm": _rmsnorm, "decode_attention": _decode_attention}


def in_worker(spec: dict) -> Callable:
    """name -> rung of spec["backend"] on spec["device"], in a worker's process."""
    return lambda name: bind(rung_called(name), spec["backend"], spec["device"])


def rung_called(name: str) -> Rung:
    """The rung that "linear 3" names."""
    op, number = name.split()
    return next(rung for rung in rungs(op) if rung.number == int(number))
