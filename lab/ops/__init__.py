"""Every op by name. Declaring a name in one of the five classes adds the op to checks, tests, benchmarks and
reports.

lab.dispatch.Ops inherits from these classes: `ops.rmsnorm` is declared here, and its contract is
lab/ops/rmsnorm.py.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import get_annotations

from lab.contract import Op
from lab.errors import LabError
from lab.names import known

Call = Callable  # (*args, out=None) -> the output; the arguments are those of the contract's `validate`


class BasicOps:
    """One op per textbook step, in the order a decode step runs them."""

    embedding: Call
    rmsnorm: Call
    linear: Call
    rope: Call
    kv_append: Call
    decode_attention: Call
    silu_mul: Call
    sample: Call


class FusedOps:
    """The ops of the fused plan, which replace several basic ops each."""

    norm_linear: Call
    rope_append_attention: Call
    linear_add: Call
    norm_linear_silu_mul: Call
    norm_linear_argmax: Call


class PersistentOps:
    """The op of the persistent plan: a whole step in one launch."""

    decode_step: Call


class ParallelOps:
    """What the ranks of a model that is divided among GPUs pass to each other, whatever the plan."""

    all_reduce_add: Call
    all_reduce_add_rmsnorm: Call
    all_argmax: Call


class OtherOps:
    """Ops that no plan of the decoder uses: callers name them, as select(...).<name>."""


def _contracts(declared: type) -> tuple[Op, ...]:
    """The contracts, lab/ops/<name>.py, of the names that a class declares."""
    return tuple(import_module(f"{__name__}.{name}").op for name in get_annotations(declared))


BASIC, FUSED, PERSISTENT, PARALLEL, OTHERS = map(
    _contracts, (BasicOps, FusedOps, PersistentOps, ParallelOps, OtherOps)
)
OPS = BASIC + FUSED + PERSISTENT + PARALLEL + OTHERS


def require_formats(op: Op) -> None:
    """Raises LabError for an op that takes no packed weights, with the list of those that do."""
    if not op.takes_formats:
        takes = ", ".join(one.name for one in OPS if one.takes_formats)
        raise LabError(f"{op.name} has no weights in a format; --weight-format is of {takes}")


def find(name: str) -> Op:
    """The op called `name`; raises LabError with the list of ops for any other name."""
    names = [op.name for op in OPS]
    return OPS[names.index(known(name, names, "op"))]
