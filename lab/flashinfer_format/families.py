"""Which definitions of flashinfer-bench say what a contract of ours says, and how their calls are converted.

A family is a kind of definition, such as rmsnorm_h4096. For a definition of it `ops_of()` makes an `Op` that
takes the inputs of the definition in their order. Its inputs, right results and tolerances are those of our
contract, converted (lab/flashinfer_format/attention.py for the KV cache). So lab/judge judges an
implementation of the definition as it judges a kernel of the op.

A definition may round in two ways, each of which is an `Op` of its own, a reading. Our rmsnorm rounds before
it multiplies by the weight, as Hugging Face does; flashinfer's rounds once. Which reading a definition has is
decided by running its reference (lab/flashinfer_format/importing.py).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from lab.contract import DTYPES, EPS32, Case, Op, case
from lab.errors import LabError, shown
from lab.flashinfer_format import attention
from lab.flashinfer_format.schema import Definition, Workload
from lab.ops import find, linear, rmsnorm

TORCH = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # their names of our dtypes
MOST_ROWS = linear.MAX_BATCH
MOST_ELEMENTS = 1 << 29  # of a tensor


@dataclass(frozen=True)
class Family:
    """pattern: of the definitions' names. op_type: the word for the kind of operation. inputs, outputs: names
    with shapes, in their order. ops: (definition) -> {reading: Op without cases}. cases: (definition) ->
    cases of its own; case_of: (definition, axes of a workload) -> the sizes of a case, or why there is
    none. constraints: on sizes and contents of inputs, which all our cases meet."""

    name: str
    pattern: str
    op: str
    op_type: str
    inputs: dict
    outputs: dict
    ops: Callable
    cases: Callable
    case_of: Callable
    constraints: tuple[str, ...] = ()


def family_of(name: str) -> Family | None:
    return next((family for family in FAMILIES if re.fullmatch(family.pattern, name)), None)


def require_family(definition: Definition) -> Family:
    """The family of a definition. Raises LabError that says why it does not map onto a contract of ours."""
    family = family_of(definition.name)
    if family is None:
        kinds = ", ".join(family.name for family in FAMILIES)
        raise LabError(f"{definition.name} does not map: no op of ours computes it (what maps: {kinds})")
    if problem := mismatch(family, definition):
        raise LabError(f"{definition.name} does not map: {problem}")
    return family


def mismatch(family: Family, definition: Definition) -> str | None:
    """What a definition has that its family does not."""
    for what, wanted, found in (
        ("inputs", family.inputs, definition.inputs),
        ("outputs", family.outputs, definition.outputs),
    ):
        if list(found) != list(wanted):
            return f"its {what} are {', '.join(found)}, not {', '.join(wanted)}"
        for name, shapes in wanted.items():
            if found[name].shape not in shapes:
                return f"{name} has the shape {shown(found[name].shape)}, not {shown(shapes[0])}"
    tensors = {**definition.inputs, **definition.outputs}
    for name, spec in tensors.items():
        special = SPECIAL.get(name)
        if special and spec.dtype != special:
            return f"{name} is {spec.dtype}, not {special}"
    floats = {spec.dtype for name, spec in tensors.items() if name not in SPECIAL}
    if len(floats) > 1 or not floats <= set(TORCH):
        return f"its tensors are {', '.join(sorted(floats))}: ours have one of {', '.join(TORCH)}"
    sizes = re.fullmatch(family.pattern, definition.name).groupdict()
    for axis, text in sizes.items():
        if definition.constants.get(axis) != int(text) or not int(text):
            return f"the axis {axis} is not the {text} of its name, or is 0"
    for name, spec in definition.inputs.items():
        if math.prod(largest(definition, axis) for axis in spec.shape or ()) > MOST_ELEMENTS:
            return f"{name} is larger than {MOST_ELEMENTS} elements, which are 4 GiB in float64"
    if family.op == "decode_attention":
        return attention.mismatch(definition)
    return None


def largest(definition: Definition, axis: str) -> int:
    """The size of an axis, in the largest case if it is a variable one."""
    pages = attention.MOST_TOKENS // definition.constants.get("page_size", attention.MOST_TOKENS)
    return definition.constants.get(axis, pages if axis == "num_pages" else MOST_ROWS)


SPECIAL = {
    "kv_indptr": "int32",
    "kv_indices": "int32",
    "kv_last_page_len": "int32",
    "sm_scale": "float32",
    "lse": "float32",
}


def dtype_of(definition: Definition) -> str:
    """Our name of the dtype of its tensors."""
    return TORCH[next(iter(definition.inputs.values())).dtype]


def ops_of(definition: Definition, workloads: list[Workload] = ()) -> dict[str, Op]:
    """{reading: an Op that takes the definition's inputs}, with cases; raises LabError as
    require_family()."""
    family = require_family(definition)
    cases = tuple(family.cases(definition)) + tuple(cases_of(family, definition, workloads)[0])
    dtypes = (DTYPES[dtype_of(definition)],)
    return {
        reading: replace(
            op, name=definition.name, cases=cases, dtypes=dtypes, reference=by_position(op.reference)
        )
        for reading, op in family.ops(definition).items()
    }


def by_position(function: Callable) -> Callable:
    """`function` for a caller that names its arguments as the definition does, in their order."""
    return lambda *args, **options: function(*args, *options.values())


def cases_of(family: Family, definition: Definition, workloads) -> tuple[list[Case], list[str]]:
    """(up to three cases of the sizes of workloads: the smallest, one in the middle and the largest that a
    contract of ours takes; why others are left out)."""
    found, left_out = {}, []
    for workload in workloads:
        if unknown := [axis for axis in workload.axes if axis not in definition.axes]:
            sizes = f"names the axis {shown(unknown[0])}, which is not in the axes of {definition.name}"
        else:
            sizes = family.case_of(definition, workload.axes)
        if isinstance(sizes, str):
            left_out.append(f"workload {workload.uuid}: {sizes}")
        else:
            found[str(sizes)] = sizes
    ordered = sorted(found.values(), key=lambda sizes: sum(sizes.get("lengths", ())) or sizes["batch"])
    chosen = {0, len(ordered) // 2, len(ordered) - 1} if ordered else ()
    return [case("of a workload", **ordered[i]) for i in sorted(chosen)], left_out


def rows_case(axis: str) -> Callable:
    """Family.case_of where `axis` is the number of rows."""

    def case_of(definition, axes):
        rows = axes.get(axis)
        if not rows:
            return f"names no {axis}"
        return {"batch": rows} if rows <= MOST_ROWS else f"{rows} rows: our op takes 1 to {MOST_ROWS}"

    return case_of


# ---- gemm_n*_k*: C = A B^T ---------------------------------------------------------------------------------


def gemm(definition: Definition) -> dict[str, Op]:
    n, k = definition.constants["N"], definition.constants["K"]

    def validate(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None) -> None:
        linear.validate(A, B, out=out)

    op = replace(
        linear.op,
        validate=validate,
        inputs=lambda rand, batch: linear.inputs(rand, batch, n, k)[:2],
        tolerance=lambda a: linear.tolerance(SimpleNamespace(x=a.A, w=a.B, out_dtype=None)),
    )
    return {"linear": op}


# ---- rmsnorm_h*, fused_add_rmsnorm_h* ----------------------------------------------------------------------


def epsilon(definition: Definition) -> float:
    """The number that the reference calls EPS. Raises LabError where there is none."""
    for node in ast.walk(ast.parse(definition.reference)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if any(name.lower() in ("eps", "epsilon") for name in names):
                value = node.value.value
                if type(value) is float and 0 < value < 1:
                    return value
    raise LabError(f"{definition.name} does not map: its reference has no constant EPS")


def norm(definition: Definition) -> dict[str, Op]:
    eps, cols = epsilon(definition), definition.constants["hidden_size"]

    def validate(hidden_states: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> None:
        rmsnorm.validate(hidden_states, weight, eps, out=out)

    return readings(
        validate, lambda rand, batch: (rand(batch, cols), rand(cols)), lambda x, weight: (x, weight, eps)
    )


def added_norm(definition: Definition) -> dict[str, Op]:
    """Unlike our op, which updates the residual, it returns the normalised sum alone."""
    eps, cols = epsilon(definition), definition.constants["hidden_size"]

    def validate(
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> None:
        rmsnorm.validate(hidden_states, weight, eps, residual, out)

    return readings(
        validate,
        lambda rand, batch: (rand(batch, cols), rand(batch, cols), rand(cols)),
        lambda x, residual, weight: (x, weight, eps, residual),
    )


def readings(validate, inputs, ours) -> dict[str, Op]:
    """The two readings of a norm. ours: the definition's inputs -> those of our rmsnorm."""

    def rounded_twice(*args):
        return rmsnorm.reference(*ours(*args))[:1]

    def twice_tolerance(a):
        return rmsnorm.tolerance(rmsnorm.op.bound(*ours(*vars(a).values())))

    def rounded_once(*args):
        a = rmsnorm.op.bound(*ours(*args))
        v = a.x.double() if a.residual is None else a.x.double() + a.residual.double()
        return (rmsnorm.scaled(v, a.eps) * a.w.double(),)

    def once_tolerance(a):
        x = next(iter(vars(a).values()))
        # Of the float32 sum of squares (see rmsnorm.tolerance), and of the products after it.
        return torch.finfo(x.dtype).eps / 2 + (12 + x.shape[-1] / 16) * EPS32, 1e-30

    op = replace(
        rmsnorm.op,
        validate=validate,
        outputs=lambda x, *others: torch.empty_like(x),
        inputs=inputs,
        mutates=(),
    )
    return {
        "rounded once": replace(op, reference=rounded_once, tolerance=once_tolerance),
        "rounded before the weight": replace(op, reference=rounded_twice, tolerance=twice_tolerance),
    }


ROWS = ["batch_size", "hidden_size"]
HEADS = ["batch_size", "num_qo_heads", "head_dim"]
FAMILIES = (
    Family(
        "gemm_n*_k*",
        r"gemm_n(?P<N>\d{1,7})_k(?P<K>\d{1,7})",
        "linear",
        "gemm",
        {"A": [["M", "K"]], "B": [["N", "K"]]},
        {"C": [["M", "N"]]},
        gemm,
        lambda definition: (case("one row", batch=1), case("rows of no power of two", batch=7)),
        rows_case("M"),
    ),
    Family(
        "rmsnorm_h*",
        r"rmsnorm_h(?P<hidden_size>\d{1,7})",
        "rmsnorm",
        "rmsnorm",
        {"hidden_states": [ROWS], "weight": [["hidden_size"]]},
        {"output": [ROWS]},
        norm,
        lambda definition: (case("one row", batch=1), case("several rows", batch=7)),
        rows_case("batch_size"),
    ),
    Family(
        "fused_add_rmsnorm_h*",
        r"fused_add_rmsnorm_h(?P<hidden_size>\d{1,7})",
        "rmsnorm",
        "rmsnorm",
        {"hidden_states": [ROWS], "residual": [ROWS], "weight": [["hidden_size"]]},
        {"output": [ROWS]},
        added_norm,
        lambda definition: (case("one row", batch=1), case("several rows", batch=7)),
        rows_case("batch_size"),
    ),
    Family(
        "gqa_paged_decode_h*_kv*_d*_ps*",
        r"gqa_paged_decode_h(?P<num_qo_heads>\d{1,5})_kv(?P<num_kv_heads>\d{1,5})"
        r"_d(?P<head_dim>\d{1,5})_ps(?P<page_size>\d{1,5})",
        "decode_attention",
        "gqa_paged",
        {
            "q": [HEADS],
            "k_cache": [attention.NHD, attention.HND],
            "v_cache": [attention.NHD, attention.HND],
            "kv_indptr": [["len_indptr"]],
            "kv_indices": [["num_kv_indices"]],
            "kv_last_page_len": [["batch_size"]],
            "sm_scale": [None],
        },
        {"output": [HEADS], "lse": [["batch_size", "num_qo_heads"]]},
        attention.ops,
        attention.cases,
        attention.case_of,
        attention.CONSTRAINTS,
    ),
)
OPS_WITH_FAMILY = tuple(dict.fromkeys(find(family.op).name for family in FAMILIES))
