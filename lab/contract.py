"""The contract of an op: what its kernels must do in every language, and how the lab checks and measures
them.

An `Op` is one meaning (`reference`), one set of conditions (`validate`) and one launcher for each language.
Whatever other parts of the lab need to know about an op is a field of its contract, too. This module lies
below everything else: it imports nothing of the lab but the errors, and the contracts in lab/ops import it.
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
    """Sizes for one check of an op, and the reason why they were chosen."""

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
    error: float = 0.01  # with packed weights, how far its result may be from the reference (relative RMS)
    module: str | None = None  # the package that it needs

    @property
    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None


def dtype_name(dtype: torch.dtype) -> str:
    """Its short name, as "bf16"; torch's own of a dtype that has none here."""
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype))


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


def no_shared_rounding(a) -> float:
    """The `shared_rounding` of most ops."""
    return 0.0


def one_batch(batch: int, context: int | None) -> dict:
    """{"batch": batch}: the sizes of `inputs` that depend on the batch, for an op that calls its rows
    `batch`."""
    return {"batch": batch}


def some_rows(batch: int, context: int | None) -> dict:
    """{"rows": batch}: the same for an op that calls its rows `rows`."""
    return {"rows": batch}


@dataclass(frozen=True)
class Op:
    """The contract of one op: what its kernels must do in every language, and what the lab must know to
    measure it.

    `validate`, `outputs`, `reference` and the launchers take the op's public arguments in their order; a
    launcher takes the output tensor as the keyword `out`. The functions that are off the path of a call
    (`nbytes`, `tolerance` ...) take one object `a` that holds the arguments by name, as in `a.x`; `bound`
    makes it.
    """

    name: str
    summary: str  # the formula, one line
    dtypes: tuple  # dtypes of the activations that every backend takes
    # (*args, out=None) -> None, or raises LabError. Its annotations are the types of torch.ops.lab.<name>
    # (lab/torch_ops.py); an op that works in place annotates `out` with None.
    validate: Callable
    outputs: Callable  # (*args) -> an empty tensor for the kernel to fill; None for an op that works in place
    # (*args) -> a tuple of float64 or integer tensors: the right output, then the right `mutates`
    reference: Callable
    # language -> (*args, out) -> None; the CUDA launcher takes the extension's functions as first argument
    launchers: dict[str, Callable]
    inputs: Callable  # (rand: Rand, **sizes) -> args: random data of these sizes
    nbytes: Callable  # (a) -> bytes that must cross DRAM at least once
    flops: Callable  # (a) -> floating-point operations
    # (a) -> (rtol, atol) against `reference`, derived from the dtypes' epsilon, or a list with one for each
    # tensor
    tolerance: Callable
    # (a) -> the half-width, relative to the output, of a rounding on the way that the contract allows and
    # that many elements share, so that it shifts all of them to one side; 0.0 where there is none
    shared_rounding: Callable = no_shared_rounding
    cases: tuple[Case, ...] = ()  # the sizes that `lab check` runs
    mutates: tuple[str, ...] = ()  # arguments that the op changes in place
    # (a) -> None; raises LabError for integers in tensors (page numbers, positions) that no kernel may be
    # given
    contents: Callable | None = None
    # (output, a) -> what is wrong with it, or None; takes the place of the comparison by tolerance
    verify: Callable | None = None
    # arguments that keep values from one call to the next, such as tickets
    state: tuple[str, ...] = ()
    # (a) -> a new argument `workspace`, for an op that a caller may call without one
    workspace: Callable | None = None

    # Where models use the op. Sizes are written as JSON has them, dtypes by name, because records hold them.
    plans: tuple[str, ...] = ()  # the decode plans that call it
    # (config: ModelConfig) -> ((role or None, sizes of `inputs`), ...): each call in one step
    uses: Callable | None = None
    # (config, role) -> how often one step makes that use
    calls: Callable = once_a_layer
    rows: Callable = one_batch  # (batch, context) -> the other sizes of `inputs`
    # (batch, context, multiprocessors, sizes) -> the sizes that a decoder chooses, such as splits
    launch: Callable | None = None
    has_context: bool = False  # whether its time depends on the number of tokens in the KV cache
    whole_step: bool = False  # whether it is a whole decode step, which is measured as a token, not as an op
    between_ranks: bool = False  # whether it waits for other ranks, with which alone it can be measured
    use_of: Callable | None = None  # (a) -> the sizes by which a call is recognised as one of the op's uses

    # How the op is measured and shown.
    # Arguments that a model reads from DRAM: weights and the KV cache. The preceding kernel has just written
    # the others.
    cold: tuple[str, ...] = ()
    direction: str = "read"  # the ceiling that it is compared with: read, copy or write
    # The sizes that `lab inspect` shows by default: a decode step of Llama 3.1 8B at 8192 tokens. None: the
    # sizes of the first case.
    inspect_sizes: Mapping | None = None
    peers: tuple[Peer, ...] = ()  # see lab/peers.py
    color: str | None = None  # its colour in pictures that divide a token's time among the ops

    # Launch settings that `lab tune` may try: see lab/spaces.py.
    tuned_by: tuple[str, ...] = ()  # the sizes by which settings are looked up, besides the number of rows
    # language -> (rows, itemsize, **sizes) -> a list of settings to try
    spaces: Mapping[str, Callable] = field(default_factory=dict)

    @cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the public arguments, without `out`."""
        whole = inspect.signature(self.validate)
        return whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "out"])

    @property
    def takes_formats(self) -> bool:
        """Whether it is a product of weights in formats (lab/formats): then its `inputs` take `format`."""
        return not self.whole_step and "format" in inspect.signature(self.inputs).parameters

    @property
    def names(self) -> tuple[str, ...]:
        """The public arguments' names, in their order."""
        return tuple(self.signature.parameters)

    def bound(self, *args, **options) -> SimpleNamespace:
        """The arguments of a call by name, with the defaults of those that it leaves out."""
        call = self.signature.bind(*args, **options)
        call.apply_defaults()
        return SimpleNamespace(**call.arguments)

    def with_workspace(self, *args) -> tuple:
        """The arguments of a call; if the op takes a workspace and the call has none, a new one is added."""
        if self.workspace is None:
            return args
        a = self.bound(*args)
        if a.workspace is None:
            a.workspace = self.workspace(a)
        return tuple(vars(a).values())

    def sizes_at(
        self, sizes: Mapping, batch: int, context: int | None, multiprocessors: int
    ) -> tuple[dict, dict]:
        """(all sizes of `inputs`, those of them that a decoder chooses) for one use by a model: see
        `uses`."""
        chosen = {} if self.launch is None else self.launch(batch, context, multiprocessors, sizes)
        return {**self.rows(batch, context), **with_dtypes(sizes), **chosen}, chosen

    def default_sizes(self) -> dict:
        """The sizes of the call that `lab inspect` shows by default."""
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


def pointer(tensor: torch.Tensor | None) -> int:
    """A tensor's address as kernels take it; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


# The checks that `validate` functions share. A raw pointer carries no shape, stride, device or alignment, so
# all of these are checked here, once. Other conditions are an `if` in the caller, so that a message is
# formatted only when it is needed.


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
    """All are views [batch, heads, head_dim] of a packed buffer: contiguous but for the stride of the first
    dimension, which may be any multiple of 16 bytes."""
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
