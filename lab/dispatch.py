"""What an op is, and how a call reaches the kernel of the backend that was asked for.

An `Op` is a contract: one meaning (`reference`), one set of conditions (`validate`), and one launcher for each
backend. `select("cuda", "cpu", {"rope": "triton"})` checks the choice once and returns an object with one function per
op; calling `ops.rmsnorm(x, w, eps)` validates, allocates the output unless `out=` is given, and launches. There is no
fallback: a backend that cannot run raises `Unavailable`, and a `Trace` counts the kernels that really were launched.

The cost of a call is bounded by a test (tests/test_dispatch.py), so that eager decoding stays usable beside graphs.
"""
from __future__ import annotations

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lab.errors import LabError

BACKENDS = ("cuda", "triton", "torch")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPS32 = torch.finfo(torch.float32).eps
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Sizes for one check or benchmark of an op, and why they were chosen."""
    why: str
    sizes: Mapping[str, object]


def case(why: str, **sizes) -> Case:
    return Case(why, sizes)


@dataclass(frozen=True)
class Op:
    """The contract that the CUDA and the Triton kernel of one op both meet.

    `validate`, `outputs`, `reference`, `torch`, `nbytes` and `flops` take the op's public arguments; `cuda` takes the
    table of C++ launchers before them; the three backends take the output tensor as the keyword `out`.
    """
    name: str
    summary: str                    # the formula, one line
    dtypes: tuple                   # dtypes of the activations that every backend takes
    validate: Callable              # (*args, out=None) -> None, or raises LabError
    outputs: Callable               # (*args) -> an empty tensor for the kernel to fill; None for an op in place
    reference: Callable             # (*args) -> tuple of float64 (or integer) results: the output, then what `mutates` names
    cuda: Callable                  # (kernels, *args, out) -> None; launches, nothing else
    triton: Callable                # (*args, out) -> None; launches, nothing else
    torch: Callable                 # (*args, out) -> None; torch's own (the vendor's) kernels
    inputs: Callable                # (rand: Rand, **sizes) -> args, random data of one case
    nbytes: Callable                # (*args) -> bytes that must cross DRAM at least once
    flops: Callable                 # (*args) -> floating-point operations
    tolerance: Callable             # (*args) -> (rtol, atol) against `reference`, derived from the dtypes' epsilon
    cases: tuple[Case, ...] = ()
    mutates: tuple[int, ...] = ()   # positions of arguments that the op changes in place
    verify: Callable | None = None  # (got, *args) -> what is wrong, or None; replaces the comparison by tolerance
    state: tuple[int, ...] = ()     # positions of arguments in which a call leaves what the next one finds: tickets, scratch
    with_workspace: Callable | None = None      # (*args of inputs) -> args with a workspace, where the op takes one


class Rand:
    """Seeded random tensors on one device: rand(2, 3) is N(0, 1) in `dtype`; rand.integers(0, 9, 4) is int32."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
        if not -(1 << 63) <= seed < 1 << 64:
            raise LabError(f"seed {seed} does not fit 64 bits")
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.int32)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device).to(torch.int32)


@dataclass
class Trace:
    """Counts kernel launches by (op, backend, kernel name), as they happen."""
    counts: Counter = field(default_factory=Counter)

    def add(self, launches: Mapping[tuple[str, str, str], int]) -> None:
        """Counts again what a captured graph launches; the decoder calls it at each replay."""
        self.counts.update(launches)

    def rows(self) -> list[dict]:
        return [{"op": op, "backend": backend, "kernel": kernel, "calls": calls}
                for (op, backend, kernel), calls in self.counts.items()]


class Ops:
    """One callable per op, each bound to its backend; `ops.chosen` maps op names to backend names."""

    def __init__(self, chosen: dict[str, str], functions: dict[str, Callable], device: torch.device,
                 trace: Trace | None):
        self.chosen, self.device, self.trace = chosen, device, trace
        self.__dict__.update(functions)


def select(backend: str | None = None, device: str | torch.device = "cpu",
           overrides: Mapping[str, str] | Sequence[str] = (), trace: Trace | None = None) -> Ops:
    """Binds every op to a backend on a device.

    backend: "cuda", "triton" or "torch"; None takes the environment's LAB_BACKEND.
    overrides: {"rope": "triton"} or ["rope=triton"]; empty takes LAB_OVERRIDE ("rope=triton,linear=torch").
    Raises LabError for an unknown name, Unavailable for a backend that this machine lacks.
    """
    from lab import ops as rooms
    from lab.backends import load

    backend = backend or os.environ.get("LAB_BACKEND")
    if backend is None:
        raise LabError(f"no backend chosen: pass one of {', '.join(BACKENDS)} or set LAB_BACKEND")
    known(backend, BACKENDS, "backend")
    overrides = overrides or environment_overrides()
    names = [op.name for op in rooms.OPS]
    chosen = dict.fromkeys(names, backend)
    for name, other in parse_overrides(overrides).items():
        chosen[known(name, names, "op")] = known(other, BACKENDS, "backend")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LabError("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    loaded = {name: load(name, device) for name in sorted(set(chosen.values()))}
    for one in loaded.values():
        one.set_trace(trace is not None)
    functions = {op.name: bind(op, loaded[chosen[op.name]], trace) for op in rooms.OPS}
    return Ops(chosen, functions, device, trace)


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


def read_table(path: str) -> dict[str, list[dict]]:
    """A dispatch table as `lab bench crossover --export` writes it: {"op": [{"batch", "context", "backend"}]}.

    context null fits any. Raises LabError for a file that is no such table, an unknown op or an unknown backend.
    """
    from lab.ops import find
    try:
        table = json.loads(Path(path).read_text())
        for name, cells in table.items():
            find(name)
            for cell in cells:
                known(cell["backend"], BACKENDS, "backend")
                if not (cell["batch"] >= 1 and (cell["context"] is None or cell["context"] >= 1)):
                    raise ValueError(f"batch {cell['batch']}, context {cell['context']}")
    except LabError as error:
        raise LabError(f"{path}: {error}") from None
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{path} is no dispatch table ({error}); `lab bench crossover --export FILE` writes one") from None
    return table


def from_table(table: Mapping[str, list[dict]], batch: int, context: int) -> dict[str, str]:
    """The overrides that a dispatch table asks for: for each op the backend of its nearest cell, by ratio of sizes."""
    def distance(cell):
        return (abs(math.log(cell["batch"] / batch)), abs(math.log((cell["context"] or context) / context)))

    return {name: min(cells, key=distance)["backend"] for name, cells in table.items() if cells}


def known(name: str, choices: Sequence[str], what: str) -> str:
    """Returns `name` if it is one of `choices`; otherwise raises a LabError that lists them."""
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise LabError(f"unknown {what} {name!r}: {hint}choose from {', '.join(choices)}")


def bind(op: Op, backend, trace: Trace | None = None) -> Callable:
    """The function behind ops.<name>: validate, allocate, launch; with a trace, count what was launched."""
    validate, outputs, launch = op.validate, op.outputs, backend.launcher(op)

    def call(*args, out=None, **options):
        validate(*args, out=out, **options)
        if out is None:
            out = outputs(*args, **options)
        launch(*args, out=out, **options)
        return out

    if trace is None:
        return call

    def traced(*args, **options):
        backend.take_trace()
        result = call(*args, **options)
        trace.add(Counter((op.name, backend.name, kernel) for kernel in backend.take_trace()))
        return result

    return traced


# What validation is made of. A raw pointer carries no shape, stride, device or alignment: each is checked here, once.

# Conditions stand in the callers' own `if`, so that a message is formatted only when it is needed.

def refuse(op: str, what: str) -> None:
    raise LabError(f"{op}: {what}")


def dense(op: str, device: int, *tensors: torch.Tensor) -> None:
    """All tensors on one device, contiguous, and 16-byte aligned (the width of one vector load)."""
    for t in tensors:
        if t.get_device() != device or not t.is_contiguous() or t.data_ptr() & 15:
            raise LabError(f"{op}: {describe(t)} must be contiguous, 16-byte aligned and on the device of the others")


def rows_of_heads(op: str, device: int, *tensors: torch.Tensor) -> None:
    """Views [batch, heads, head_dim] of a packed buffer: the two last dimensions contiguous, the first free."""
    for t in tensors:
        ok = t.get_device() == device and not t.data_ptr() & 15
        if ok and not t.is_contiguous():                         # one sequence's view of a packed row is contiguous
            (batch, _, dim), stride = t.shape, t.stride()
            ok = stride[2] == 1 and stride[1] == dim and (batch == 1 or not stride[0] * t.element_size() & 15)
        if not ok:
            raise LabError(f"{op}: {describe(t)} must be on the device of the others, with contiguous heads and rows "
                           "that begin at multiples of 16 bytes")


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} strides {list(t.stride())} on {t.device}"
