"""The contract of an op: what both of its kernels must do, and what its checks and measurements are made of.

An `Op` is one meaning (`reference`), one set of conditions (`validate`) and one launcher for each language.
What other parts of the lab must know of an op stands in its contract, too. This module lies below everything
else: it imports nothing of the lab but the errors, and the contracts in lab/ops import it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

import torch

from lab.errors import LabError

BACKENDS = ["cuda", "triton", "torch"]  # lab.backends.register() adds others
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPS32 = torch.finfo(torch.float32).eps
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType of launchers/arguments.h


@dataclass(frozen=True)
class Case:
    """Sizes for one check or benchmark of an op, and why they were chosen."""

    why: str
    sizes: Mapping[str, object]


def case(why: str, **sizes) -> Case:
    return Case(why, sizes)


@dataclass(frozen=True)
class Peer:
    """The vendor's or another project's kernel for the work of an op, measured beside its own kernels."""

    name: str
    make: Callable  # (list of the arguments of calls, all of one shape) -> a function () -> output for each.
    #                 What the peer must prepare, a layout or a plan of its own, is so left out of the timing
    takes: Callable = lambda a: True  # (a) -> whether the peer takes such a call
    copies: bool = False  # `make` copies the bulk of the data into another layout. A model would pay for that
    #                       at every call, so such a peer has no in-model time and no host-inclusive one
    module: str | None = None  # the package that it needs

    @property
    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None


def with_dtypes(sizes: Mapping) -> dict:
    """Sizes whose dtypes are given by name, as records have them, with torch's dtypes."""
    return {
        key: DTYPES[value] if isinstance(value, str) and value in DTYPES else value
        for key, value in sizes.items()
    }


def once_a_layer(config, role: str | None) -> int:
    """How often a decode step makes a use of an op that each layer has."""
    return config.layers


def once(config, role: str | None) -> int:
    """The same for a use that a step makes before or after its layers."""
    return 1


def one_batch(batch: int, context: int | None) -> dict:
    """The sizes of `inputs` that say how many rows there are, for an op that calls them `batch`."""
    return {"batch": batch}


def some_rows(batch: int, context: int | None) -> dict:
    """The same for an op that calls them `rows`."""
    return {"rows": batch}


@dataclass(frozen=True)
class Op:
    """The contract that the kernels of one op meet in every language, and what the lab must know of it to
    measure it.

    What a call runs through (`validate`, `outputs`, the launchers) and `reference` take the op's public
    arguments in their order; a launcher takes the output tensor as the keyword `out`. What is asked about a
    call takes one object with the arguments by name, `a.x`, which `bound` makes.
    """

    name: str
    summary: str  # the formula, one line
    dtypes: tuple  # dtypes of the activations that every backend takes
    validate: Callable  # (*args, out=None) -> None, or raises LabError
    outputs: Callable  # (*args) -> an empty tensor for the kernel to fill; None for an op in place
    reference: (
        Callable  # (*args) -> tuple of float64 (or integer) results: the output, then what `mutates` names
    )
    launchers: dict[
        str, Callable
    ]  # language -> (*args, out) -> None; cuda's takes the table of C++ launchers first
    inputs: Callable  # (rand: Rand, **sizes) -> args, random data of one case
    nbytes: Callable  # (a) -> bytes that must cross DRAM at least once
    flops: Callable  # (a) -> floating-point operations
    tolerance: Callable  # (a) -> (rtol, atol) against `reference`, derived from the dtypes' epsilon
    cases: tuple[Case, ...] = ()
    mutates: tuple[str, ...] = ()  # arguments that the op changes in place
    contents: Callable | None = (
        None  # (a) -> None; raises LabError for integers in tensors that no kernel may be given
    )
    verify: Callable | None = None  # (got, a) -> what is wrong, or None; replaces the comparison by tolerance
    state: tuple[str, ...] = ()  # arguments in which a call leaves what the next one finds: tickets, scratch
    workspace: Callable | None = (
        None  # (a) -> the argument `workspace`, where a call may bring one or leave it out
    )

    # Where models use the op. Sizes are JSON, dtypes by name: a record says them as they are.
    plans: tuple[str, ...] = ()  # the decode plans that call it
    uses: Callable | None = (
        None  # (config: ModelConfig) -> ((role or None, sizes of `inputs`), ...) in one step
    )
    calls: Callable = once_a_layer  # (config, role) -> how often one step makes that use
    rows: Callable = one_batch  # (batch, context) -> the other sizes of `inputs`
    launch: Callable | None = (
        None  # (batch, context, multiprocessors, sizes) -> sizes that a decoder chooses: splits
    )
    has_context: bool = False  # does its time depend on how many tokens the KV cache holds?
    whole_step: bool = False  # a whole decode step, measured as a token and not as an op
    use_of: Callable | None = None  # (a) -> the sizes that tell which of its uses a call is

    # What is measured and shown.
    cold: tuple[
        str, ...
    ] = ()  # arguments that a model reads from DRAM: weights, the KV cache. The others are
    #                                 activations, which the kernel before has just written
    direction: str = "read"  # the ceiling that it is held to: read, copy or write
    inspect_sizes: Mapping | None = (
        None  # a decode step of Llama 3.1 8B at 8192 tokens; None: the first case's sizes
    )
    peers: tuple[Peer, ...] = ()  # see lab/peers.py
    color: str | None = None  # in pictures of what a token's time is made of

    # Launch settings that `lab tune` may try: see lab/spaces.py.
    tuned_by: tuple[str, ...] = ()  # the sizes by which settings are looked up, beside the number of rows
    spaces: Mapping[str, Callable] = field(
        default_factory=dict
    )  # language -> (rows, itemsize, **sizes) -> settings

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of the public arguments, without `out`."""
        whole = inspect.signature(self.validate)
        return whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "out"])

    @property
    def names(self) -> tuple[str, ...]:
        """The public arguments' names, in their order."""
        return tuple(self.signature.parameters)

    def bound(self, *args, **options) -> SimpleNamespace:
        """The arguments of a call by name, those left out at their defaults."""
        call = self.signature.bind(*args, **options)
        call.apply_defaults()
        return SimpleNamespace(**call.arguments)

    def with_workspace(self, *args) -> tuple:
        """The arguments of a call with a workspace, where the op takes one and they bring none."""
        if self.workspace is None:
            return args
        a = self.bound(*args)
        if a.workspace is None:
            a.workspace = self.workspace(a)
        return tuple(vars(a).values())

    def sizes_at(
        self, sizes: Mapping, batch: int, context: int | None, multiprocessors: int
    ) -> tuple[dict, dict]:
        """(sizes of `inputs`, those of them that a decoder chooses) for one use by a model: see `uses`."""
        chosen = {} if self.launch is None else self.launch(batch, context, multiprocessors, sizes)
        return {**self.rows(batch, context), **with_dtypes(sizes), **chosen}, chosen

    def default_sizes(self) -> dict:
        """Sizes of the call that is inspected where none are given."""
        return dict(self.cases[0].sizes if self.inspect_sizes is None else self.inspect_sizes)


class Rand:
    """Seeded random tensors on one device: rand(2, 3) is N(0, 1) in `dtype`; rand.integers(0, 9, 4) is
    int32."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
        if not -(1 << 63) <= seed < 1 << 64:
            raise LabError(f"seed {seed} does not fit 64 bits")
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(
            low, high, shape, generator=self.generator, device=self.device, dtype=torch.int32
        )

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device).to(torch.int32)


# What validation is made of. A raw pointer carries no shape, stride, device or alignment: each is checked
# here, once. Conditions stand in the callers' own `if`, so that a message is formatted only when it is
# needed.


def refuse(op: str, what: str) -> None:
    raise LabError(f"{op}: {what}")


def dense(op: str, device: int, *tensors: torch.Tensor) -> None:
    """All tensors on one device, contiguous, and 16-byte aligned (the width of one vector load)."""
    for t in tensors:
        if t.get_device() != device or not t.is_contiguous() or t.data_ptr() & 15:
            raise LabError(
                f"{op}: {describe(t)} must be contiguous, 16-byte aligned and on the device of the others"
            )


def rows_of_heads(op: str, device: int, *tensors: torch.Tensor) -> None:
    """Views [batch, heads, head_dim] of a packed buffer: the two last dimensions contiguous, the first
    free."""
    for t in tensors:
        ok = t.get_device() == device and not t.data_ptr() & 15
        if ok and not t.is_contiguous():  # one sequence's view of a packed row is contiguous
            (batch, _, dim), stride = t.shape, t.stride()
            ok = stride[2] == 1 and stride[1] == dim and (batch == 1 or not stride[0] * t.element_size() & 15)
        if not ok:
            raise LabError(
                f"{op}: {describe(t)} must be on the device of the others, with contiguous heads and rows "
                "that begin at multiples of 16 bytes"
            )


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} strides {list(t.stride())} on {t.device}"
