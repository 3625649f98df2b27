"""How a call reaches the kernel of the backend that was asked for.

`select("cuda", "cpu", {"rope": "triton"})` checks the choice once and returns an object with one function per
op. A call such as `ops.rmsnorm(x, w, eps)` validates the arguments, allocates the output unless `out=` is
given, and launches. There is no fallback: a backend that cannot run raises `Unavailable`, and a `Trace`
counts the kernels that were really launched.

A test (tests/test_dispatch.py) bounds the cost of a call, so that decoding without CUDA graphs stays usable.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lab.backends import load
from lab.contract import BACKENDS, Op, refuse
from lab.errors import LabError, Unavailable
from lab.names import known
from lab.ops import OPS, BasicOps, FusedOps, OtherOps, ParallelOps, PersistentOps


@dataclass
class Trace:
    """Counts kernel launches by (op, backend, kernel name), as they happen."""

    counts: Counter = field(default_factory=Counter)

    def add(self, launches: Mapping[tuple[str, str, str], int]) -> None:
        """Adds the launches of a captured graph; the decoder calls it at each replay."""
        self.counts.update(launches)

    def rows(self) -> list[dict]:
        return [
            {"op": op, "backend": backend, "kernel": kernel, "calls": calls}
            for (op, backend, kernel), calls in self.counts.items()
        ]


class Ops(BasicOps, FusedOps, PersistentOps, ParallelOps, OtherOps):
    """One callable per op, each bound to its backend; `ops.chosen` maps op names to backend names."""

    def __init__(
        self,
        chosen: dict[str, str],
        functions: dict[str, Callable],
        device: torch.device,
        trace: Trace | None,
        check_contents: bool = False,
    ):
        self.chosen, self.device, self.trace, self.check_contents = chosen, device, trace, check_contents
        for name, function in functions.items():
            setattr(self, name, function)

    @property
    def whole(self) -> bool:
        """Whether there is a function for every op, as a decoder needs."""
        return all(hasattr(self, op.name) for op in OPS)


def select(
    backend: str | None = None,
    device: str | torch.device = "cpu",
    overrides: Mapping[str, str] | Sequence[str] = (),
    trace: Trace | None = None,
    check_contents: bool | None = None,
    partial: bool = False,
) -> Ops:
    """Binds every op to a backend on a device.

    backend: "cuda", "triton" or "torch"; None means the environment's LAB_BACKEND. overrides: {"rope":
    "triton"} or ["rope=triton"]; empty means LAB_OVERRIDE ("rope=triton,linear=torch"). check_contents:
    before each launch, read the positions, context lengths and page numbers in the tensors, and raise
    LabError for those that would lead a kernel outside a tensor or into another row's page. A call then waits
    for the GPU, so it cannot be captured in a graph. None means the environment's LAB_CHECK ("1" or "0").
    partial: leave out the ops that the backend's language does not have; otherwise they raise Unavailable.
    Raises LabError for an unknown name, Unavailable for a backend that this machine lacks.
    """
    backend = backend or os.environ.get("LAB_BACKEND")
    if backend is None:
        raise LabError(f"no backend chosen: pass one of {', '.join(BACKENDS)} or set LAB_BACKEND")
    known(backend, BACKENDS, "backend")
    if check_contents is None:
        check_contents = known(os.environ.get("LAB_CHECK") or "0", ("0", "1"), "value of LAB_CHECK") == "1"
    overrides = overrides or environment_overrides()
    names = [op.name for op in OPS]
    chosen = dict.fromkeys(names, backend)
    for name, other in parse_overrides(overrides).items():
        chosen[known(name, names, "op")] = known(other, BACKENDS, "backend")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LabError("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    device = indexed(device)
    loaded = {name: load(name, device) for name in sorted(set(chosen.values()))}
    for one in loaded.values():
        one.set_trace(trace is not None)
    lacking = [op.name for op in OPS if chosen[op.name] not in op.launchers]
    if lacking and not partial:
        raise Unavailable(
            f"backend {chosen[lacking[0]]} has no {', '.join(lacking)}: choose another for them, as in "
            f"--override {lacking[0]}=torch"
        )
    functions = {
        op.name: bind(op, loaded[chosen[op.name]], device, trace, check_contents)
        for op in OPS
        if op.name not in lacking
    }
    return Ops(chosen, functions, device, trace, check_contents)


def indexed(device: str | torch.device) -> torch.device:
    """The device; a GPU without a number is the one that is current now, whichever is current later."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def environment_overrides() -> list[str]:
    """What LAB_OVERRIDE asks for, as parse_overrides() takes it."""
    return [item for item in os.environ.get("LAB_OVERRIDE", "").split(",") if item]


def parse_overrides(overrides: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    pairs = [item.partition("=") for item in overrides]
    for name, equals, other in pairs:
        if not (name and equals and other):
            raise LabError(f"override {name + equals + other!r}: write OP=BACKEND, as in rope=triton")
    return {name.strip(): other.strip() for name, _, other in pairs}


def bind(
    op: Op, backend, device: str | torch.device, trace: Trace | None = None, check_contents: bool = False
) -> Callable:
    """The function behind ops.<name>: validates, allocates, launches, and with a trace counts the launched
    kernels.

    device: the only one whose tensors it takes. check_contents: also validate the integers in the tensors
    (see select).
    """
    validate, outputs, launch = op.validate, op.outputs, backend.launcher(op)
    device = indexed(device)
    index = -1 if device.index is None else device.index  # of a tensor's get_device(): -1 on a CPU

    def call(*args, out=None, **options):
        validate(*args, out=out, **options)
        if args and args[0].get_device() != index:  # validate() has seen that all are on one device
            refuse(op.name, f"these ops run on {device}, and the tensors are on {args[0].device}")
        if out is None:
            out = outputs(*args, **options)
        launch(*args, out=out, **options)
        return out

    if check_contents:
        call = with_contents(op, call)
    if trace is None:
        return documented(call, op)

    def traced(*args, **options):
        backend.take_trace()
        result = call(*args, **options)
        trace.add(Counter((op.name, backend.name, kernel) for kernel in backend.take_trace()))
        return result

    return documented(traced, op)


def documented(function: Callable, op: Op) -> Callable:
    """`function` as help() shows it: with the name and the arguments of the op, and what its contract
    says."""
    function.__name__ = function.__qualname__ = op.name
    function.__doc__ = sys.modules[op.validate.__module__].__doc__
    function.__signature__ = inspect.signature(op.validate).replace(return_annotation=torch.Tensor | None)
    return function


def with_contents(op: Op, function: Callable) -> Callable:
    """`function` with a check in front: validates the op's arguments and the integers in their tensors."""
    if op.contents is None:
        return function

    def call(*args, out=None, **options):
        op.validate(*args, out=out, **options)  # contents() relies on shapes and dtypes that are right
        op.contents(op.bound(*args, **options))
        return function(*args, out=out, **options)

    return call
