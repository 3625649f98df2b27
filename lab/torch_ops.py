"""The ops as torch.ops.lab.*, for torch.compile, torch.export and CUDA graphs.

    lab.use("triton")                        # registers the ops and says which backend runs them
    y = torch.ops.lab.rmsnorm(x, w, 1e-5)
    torch.ops.lab.rmsnorm.out(x, w, 1e-5, out=y)

Importing this module registers every op of lab/ops; lab.use() does so, too. The schema is made of the
contract: the annotations of `validate` give the types, `mutates` and `state` the arguments that are written.
An op that has an output has a second overload, `.out`, which writes it into `out` and returns nothing. What
torch.library cannot express is in LEFT_OUT (ops) and RESTRICTED (arguments), each with the reason.
There is no backward: these are ops of decoding.
"""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from lab.contract import BACKENDS, Op
from lab.dispatch import Ops, Trace, parse_overrides, select
from lab.names import known
from lab.ops import OPS

LEFT_OUT: dict[str, str] = {}  # op: why it is not registered
RESTRICTED: dict[str, str] = {}  # "op.argument": what of it torch.ops.lab does not take
TYPES = {torch.Tensor: "Tensor", float: "float", int: "int", bool: "bool", torch.dtype: "ScalarType"}

# "lab"; in the package of kernels (lab/machine/kernels_package.py), which has a name of its own, another one.
NAMESPACE = __package__.replace(".", "_")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_chosen: tuple[str | None, dict[str, str], Trace | None] = (None, {}, None)
_bound: dict[torch.device, Ops] = {}  # what _chosen is on each device that a call was made on


def use(
    backend: str | None, overrides: Mapping[str, str] | Sequence[str] = (), trace: Trace | None = None
) -> None:
    """Chooses the backend that runs torch.ops.lab.*, for the whole process.

    backend: "cuda", "triton" or "torch"; None means the environment's LAB_BACKEND, as before the first call
    of this function. overrides: other backends for some ops, as {"rope": "triton"} or ["rope=triton"].
    trace: counts the kernels that run.

    The tensors of a call say on which device it runs. A compiled or exported program asks for the backend
    each time it runs an op, so it need not be compiled anew; a CUDA graph replays what it has captured.

    Raises LabError for an unknown name. A call of an op raises Unavailable where its backend cannot run on
    the device of its tensors, and LabError where none was chosen: nothing falls back to another backend.
    """
    global _chosen
    if backend is not None:
        known(backend, BACKENDS, "backend")
    overrides = parse_overrides(overrides)
    for name, other in overrides.items():
        known(name, [op.name for op in OPS], "op"), known(other, BACKENDS, "backend")
    _chosen = backend, overrides, trace
    _bound.clear()


def bound(device: torch.device) -> Ops:
    """The functions of the chosen backend on a device."""
    if device not in _bound:
        backend, overrides, trace = _chosen
        _bound[device] = select(backend, device, overrides, trace, partial=True)
    return _bound[device]


class Inexpressible(Exception):
    """An argument for which torch.library has no type."""


def type_of(annotation) -> tuple[str, str | None]:
    """(the type of an argument in a schema, what of the annotation it leaves out or None)."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    found = [TYPES[one] for one in members if one in TYPES]
    others = [one.__name__ for one in members if one not in TYPES and one is not types.NoneType]
    if len(found) != 1:
        raise Inexpressible(
            "has no annotation" if annotation is inspect.Parameter.empty else f"is a {' or '.join(others)}"
        )
    return found[0] + "?" * (types.NoneType in members), f"no {others[0]}" if others else None


def schema_of(op: Op) -> tuple[list[str], list[str], bool]:
    """(arguments as a schema has them, their names, whether the op has an output); raises Inexpressible."""
    whole = inspect.signature(op.validate, eval_str=True).parameters
    declared, names = [], []
    for name in op.names:
        try:
            kind, without = type_of(whole[name].annotation)
        except Inexpressible as error:
            if whole[name].default is not None:
                raise Inexpressible(f"its argument {name} {error}") from None
            RESTRICTED[f"{op.name}.{name}"] = f"{error}: each call makes its own"
            continue
        if without:
            RESTRICTED[f"{op.name}.{name}"] = without
        if name in op.mutates + op.state:
            kind = kind.replace("Tensor", f"Tensor(a{len(names)}!)")
        default = whole[name].default
        declared.append(f"{kind} {name}" + ("" if default is inspect.Parameter.empty else f"={default}"))
        names.append(name)
    return declared, names, whole["out"].annotation is not None  # an op that works in place takes no `out`


def register(op: Op) -> None:
    """Registers an op and, if it has an output, its overload `.out`; or enters it in LEFT_OUT."""
    try:
        declared, names, returns = schema_of(op)
    except Inexpressible as error:
        LEFT_OUT[op.name] = str(error)
        return
    everything = positional(op, names)

    def kernel(*args, **options):
        values = everything(args, options)
        device = next(v.device for v in values if isinstance(v, torch.Tensor))
        result = getattr(bound(device), op.name)(*values)
        return result if returns else None

    def kernel_out(*args, out, **options):
        getattr(bound(out.device), op.name)(*everything(args, options), out=out)

    def fake(*args, **options):
        return op.outputs(*everything(args, options)) if returns else None

    listed = ", ".join(declared)
    schema = f"({listed}) -> {'Tensor' if returns else '()'}"
    written = [name for name in names if name in op.mutates + op.state]
    torch.library.custom_op(
        f"{NAMESPACE}::{op.name}", kernel, mutates_args=written, schema=schema
    ).register_fake(fake)
    if any(op.signature.parameters[name].default is None for name in written):
        count_versions(op, names, written)
    if returns:
        # custom_op takes no tensor that is given by name only, so this overload is defined by hand.
        _library.define(
            f"{op.name}.out({listed}, *, Tensor(a{len(names)}!) out) -> ()",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(f"{op.name}.out", kernel_out, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"{NAMESPACE}::{op.name}.out", lambda *args, **options: None, lib=_library
        )


def count_versions(op: Op, names: Sequence[str], written: Sequence[str]) -> None:
    """Tells autograd which tensors a call has written, as custom_op does. Up to torch 2.11 that raises
    IndexError where an argument that may be written is optional and is left out; so this takes its place."""
    registered = getattr(getattr(torch.ops, NAMESPACE), op.name).default

    def counted(keyset, *args, **options):
        for name, value in (*zip(names, args), *options.items()):
            if name in written and isinstance(value, torch.Tensor):
                torch.autograd.graph.increment_version(value)
        return registered.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **options)

    with warnings.catch_warnings():  # that a kernel is registered twice is what we want
        warnings.simplefilter("ignore")
        _library.impl(op.name, counted, "ADInplaceOrView", with_keyset=True, allow_override=True)


def positional(op: Op, names: Sequence[str]) -> Callable:
    """(args, options of a registered op) -> all arguments of the contract, in its order."""
    defaults = {name: p.default for name, p in op.signature.parameters.items()}

    def everything(args: tuple, options: dict) -> tuple:
        return tuple({**defaults, **dict(zip(names, args)), **options}.values())

    return everything


for _op in OPS:
    register(_op)
