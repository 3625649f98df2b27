"""The ladders of lab/rungs.py as functions: linear, rmsnorm and decode_attention from naive up to the product.

`bind` gives a rung as a function with the op's arguments, so that `lab check --ladder` and `lab bench ops --ladder` run
it like any backend.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from lab.backends import load
from lab.dispatch import DTYPES, Rand, case
from lab.errors import LabError
from lab.ops import find
from lab.ops.decode_attention import Workspace
from lab.rungs import BACKENDS, OPS, RUNGS, Rung, fits, rungs

CASES = {
    "linear": (case("tails of a tile in n and k", batch=1, n=37, k=136),
               case("several steps of four warps", batch=3, n=9, k=1096),
               case("a k of no whole vectors, with bias", batch=1, n=11, k=101, bias=True),
               case("more rows than 8, float32 out", batch=9, n=20, k=264, bias=True, out_dtype=torch.float32)),
    "rmsnorm": (case("one row", rows=1, cols=576), case("more rows than a warp has lanes", rows=33, cols=64),
                case("several steps of 256 vectors", rows=2, cols=2056), case("no whole vectors", rows=3, cols=101)),
    "decode_attention": (
        case("context 1, around a page's end, an idle row; a group of 3", lengths=(1, 15, 17, 0, 65, 130), q_heads=6,
             kv_heads=2, head_dim=64, splits=2),
        case("empty splits, a group of 5", lengths=(5, 70), q_heads=5, kv_heads=1, head_dim=128, splits=7),
        case("one split, a larger page", lengths=(100,), q_heads=2, kv_heads=2, head_dim=128, page_size=64)),
}


def bind(rung: Rung, backend: str, device: str | torch.device = "cpu") -> Callable:
    """The rung as a function of the op's arguments and `out=`.

    Raises LabError if the language has no such rung, Unavailable if this machine lacks the backend; the function raises
    LabError for arguments that the op or the rung does not take.
    """
    if backend in rung.absent:
        raise LabError(f"{rung.op} has no rung {rung.title!r} in {backend}: {rung.absent[backend]}")
    op, room = find(rung.op), load(backend, torch.device(device))
    if rung.product:
        launch = room.launcher(op)
    elif backend == "cuda":
        name = f"{op.name}_ladder"
        if not hasattr(room.kernels, name):
            raise LabError(f"{name} is not in {room.extension.__name__}: build again with "
                           "`python setup.py build_ext --inplace`")
        kernels = {op.name: partial(getattr(room.kernels, name), rung.number), "stream": room.kernels.stream}
        launch = partial(op.cuda, SimpleNamespace(**kernels))
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
    _triton("decode_attention")(rung, q, k_cache, v_cache, table, lengths, scale, splits, w.partial, w.tickets, out)


_TRITON = {"linear": _linear, "rmsnorm": _rmsnorm, "decode_attention": _decode_attention}


def rung_called(name: str) -> Rung:
    """The rung that "linear 3" names."""
    op, number = name.split()
    return next(rung for rung in rungs(op) if rung.number == int(number))


def check(ops, functions, dtypes, device, seed, quick=False) -> int:
    """`lab check --ladder`: every rung against the op's reference; returns the number of failed cases.

    quick: the first two cases alone.
    functions: for each of BACKENDS that this machine can run, what gives the function of a rung's name, as "linear 3"
    (lab.worker.Worker.function). A case that a rung says it does not take must be refused.
    """
    from lab.check import check_case
    failed = ran = 0
    for op in ops:
        cases = CASES[op][:2] if quick else CASES[op]
        for rung in rungs(op):
            needs = f"; needs {rung.needs}" if rung.needs else ""
            print(f"{op} {rung.title}: {rung.idea}\n    should gain: {rung.gain}{needs}")
            for backend in functions:
                if backend in rung.absent:
                    print(f"    {backend:6} absent: {rung.absent[backend]}")
                    continue
                here, function, said = bind(rung, backend, device), functions[backend](f"{op} {rung.number}"), []
                for dtype in dtypes:
                    right = refused = 0
                    for c in cases:
                        rand = Rand(device, DTYPES[dtype], seed)
                        if not fits(rung, find(op).inputs(rand, **c.sizes)):
                            refused += _is_refused(here, find(op).inputs(rand, **c.sizes))
                            continue
                        outcome = check_case(find(op), function, Rand("cpu", DTYPES[dtype], seed), c.sizes)
                        ran += 1
                        right += outcome.error is None
                        if outcome.error:
                            failed += 1
                            said.append(f"\n        {dtype} {c.why} {dict(c.sizes)}: {outcome.error}")
                    said.append(f" {dtype} {right}/{len(cases) - refused}"
                                + (f" ({refused} refused)" if refused else ""))
                print(f"    {backend:6}{''.join(said)}", flush=True)
    print(f"{ran} cases of rungs on {device}, {failed} failed")
    return failed


def _is_refused(function, args) -> bool:
    """True; raises if arguments that a rung does not take are taken."""
    try:
        function(*args)
    except LabError:
        return True
    raise AssertionError("the rung took arguments that it says it does not take")
