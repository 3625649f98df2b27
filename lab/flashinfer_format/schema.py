"""The JSON of flashinfer-bench: Definition, Solution, Workload and Trace. Never imports torch.

Names and conditions are those of flashinfer-bench 0.1.2 (flashinfer_bench/data): a Definition says what is
computed, a Workload names sizes and contents of inputs, a Solution holds the sources of one implementation,
and a Trace is one measurement of it. A workload is stored as a Trace whose solution and evaluation are null.
The format has no version number, so a field that is not listed here is an error: nothing that is read is
ignored.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from lab.errors import LabError, named, shown
from lab.files import deeper, read_text, strict_json

LARGEST = 1 << 26  # bytes of a file
DEEPEST = 20  # levels of nesting; the format has about five

DType = Literal[
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float4_e2m1",
    "int64",
    "int32",
    "int16",
    "int8",
    "bool",
]
Status = Literal[
    "PASSED",
    "INCORRECT_SHAPE",
    "INCORRECT_NUMERICAL",
    "INCORRECT_DTYPE",
    "RUNTIME_ERROR",
    "COMPILE_ERROR",
    "TIMEOUT",
]


@dataclass
class AxisConst:
    value: int
    type: Literal["const"] = "const"
    description: str | None = None


@dataclass
class AxisVar:
    type: Literal["var"] = "var"
    description: str | None = None


@dataclass
class TensorSpec:
    """shape: names of axes; None: a scalar."""

    shape: list[str] | None
    dtype: DType
    description: str | None = None


@dataclass
class Definition:
    """What is computed. reference: Python code with a function `run`, which takes the inputs in their order
    and returns the outputs in theirs."""

    name: str
    op_type: str
    axes: dict[str, AxisConst | AxisVar]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    reference: str
    tags: list[str] = field(default_factory=list)
    description: str | None = None
    constraints: list[str] = field(default_factory=list)

    def check(self) -> str | None:
        if problem := file_name_problem(self.name):
            return problem
        try:
            tree = ast.parse(self.reference)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"reference is no Python code: {error}"
        if not any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            return "reference has no function `run` at its top level"
        if both := sorted(set(self.inputs) & set(self.outputs)):
            return f"{shown(both[0])} is both an input and an output"
        for name, spec in {**self.inputs, **self.outputs}.items():
            for axis in spec.shape or ():
                if axis not in self.axes:
                    return f"the shape of {shown(name)} names the axis {shown(axis)}, which is not in axes"
        return None

    @property
    def constants(self) -> dict[str, int]:
        return {name: axis.value for name, axis in self.axes.items() if isinstance(axis, AxisConst)}


@dataclass
class RandomInput:
    type: Literal["random"] = "random"


@dataclass
class ScalarInput:
    value: int | float | bool
    type: Literal["scalar"] = "scalar"


@dataclass
class SafetensorsInput:
    path: str
    tensor_key: str
    type: Literal["safetensors"] = "safetensors"


@dataclass
class Workload:
    axes: dict[str, int]
    inputs: dict[str, RandomInput | ScalarInput | SafetensorsInput]
    uuid: str


@dataclass
class Source:
    path: str
    content: str

    def check(self) -> str | None:
        windows = PureWindowsPath(self.path)
        parts = PurePosixPath(self.path).parts
        if windows.is_absolute() or windows.drive or self.path.startswith(("/", "\\")):
            return f"path {shown(self.path)} is absolute: sources lie in a folder of their own"
        if ".." in (*parts, *windows.parts):
            return f"path {shown(self.path)} leads outside the folder of the sources"
        if not parts or not self.path.isprintable() or "\\" in self.path:
            return f"path {shown(self.path)} is no name of a file"
        return None


@dataclass
class BuildSpec:
    """destination_passing_style: whether `entry_point` takes the outputs as its last arguments; otherwise it
    returns them. binding: of C++ and CUDA."""

    language: Literal["python", "triton", "cpp", "cuda", "tilelang"]
    target_hardware: list[str]
    entry_point: str
    dependencies: list[str] = field(default_factory=list)
    destination_passing_style: bool = True
    binding: Literal["tvm-ffi", "torch"] | None = None

    def check(self) -> str | None:
        if not self.target_hardware:
            return "target_hardware is empty"
        if self.entry_point.count("::") != 1:
            return f"entry_point {shown(self.entry_point)} is not FILE::FUNCTION"
        return None


@dataclass
class Solution:
    name: str
    definition: str
    author: str
    spec: BuildSpec
    sources: list[Source]
    description: str | None = None

    def check(self) -> str | None:
        paths = [source.path for source in self.sources]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            return f"sources has {shown(twice)} twice"
        if self.entry[0] not in paths:
            return f"entry_point names {shown(self.entry[0])}, which is not among the sources"
        return None

    @property
    def entry(self) -> tuple[str, str]:
        """(file, function)."""
        file, _, function = self.spec.entry_point.partition("::")
        return file, function


@dataclass
class Correctness:
    max_relative_error: float = 0.0
    max_absolute_error: float = 0.0
    extra: dict[str, Any] | None = None


@dataclass
class Performance:
    latency_ms: float = 0.0
    reference_latency_ms: float = 0.0
    speedup_factor: float = 0.0


@dataclass
class Environment:
    hardware: str
    libs: dict[str, str] = field(default_factory=dict)


@dataclass
class Evaluation:
    status: Status
    environment: Environment
    timestamp: str
    log: str = ""
    correctness: Correctness | None = None
    performance: Performance | None = None

    def check(self) -> str | None:
        wanted = {
            "correctness": self.status in ("PASSED", "INCORRECT_NUMERICAL"),
            "performance": self.status == "PASSED",
        }
        for name, needed in wanted.items():
            if (getattr(self, name) is not None) != needed:
                return f"status {self.status} {'needs' if needed else 'has no'} {name}"
        return None


@dataclass
class Trace:
    definition: str
    workload: Workload
    solution: str | None = None
    evaluation: Evaluation | None = None

    @property
    def is_workload(self) -> bool:
        return self.solution is None and self.evaluation is None


def file_name_problem(name: str) -> str | None:
    if name in (".", "..") or set(name) & set("/\\\0") or not name.isprintable():
        return f"name {shown(name)} is no name of a file"
    return None


# ---- reading -----------------------------------------------------------------------------------------------

MAY_BE_EMPTY = {"log", "description"}
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as the format writes errors


def from_json(cls, value, where: str):
    """`value`, parsed JSON, as an object of one of the classes above. Raises LabError, which begins with
    `where`, for a field that is missing, unknown or of another type."""
    if not isinstance(value, dict):
        raise LabError(f"{where} is {shown(value)}, not an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            raise LabError(f"{where}: unknown field {shown(name)}: a {cls.__name__} has {', '.join(fields)}")
    kinds = typing.get_type_hints(cls)
    found = {}
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if name in value:
            found[name] = converted(kinds[name], value[name], f"{where}: {name}", name)
        elif required:
            raise LabError(f"{where}: the field {name} is missing")
    made = cls(**found)
    if problem := getattr(made, "check", lambda: None)():
        raise LabError(f"{where}: {problem}")
    return made


def converted(kind, value, where: str, name: str = ""):
    """`value` as a value of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise LabError(f"{where} is {shown(value)}, none of {', '.join(arguments)}")
        return value
    if origin in (types.UnionType, typing.Union):
        return one_of(arguments, value, where, name)
    if origin is list:
        if not isinstance(value, list):
            raise LabError(f"{where} is {shown(value)}, not a list")
        return [converted(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise LabError(f"{where} is {shown(value)}, not an object")
        return {key: converted(arguments[1], item, f"{where}.{named(key)}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)
    return plain(kind, value, where, name)


def one_of(kinds, value, where: str, name: str):
    """`value` as a value of one of several annotations: one is None, classes differ in their `type`."""
    if value is None and type(None) in kinds:
        return None
    classes = {kind.type: kind for kind in kinds if dataclasses.is_dataclass(kind) and hasattr(kind, "type")}
    if classes:
        tag = value.get("type") if isinstance(value, dict) else None
        if not isinstance(tag, str) or tag not in classes:
            raise LabError(f"{where} is {shown(value)}: its type must be {' or '.join(classes)}")
        return from_json(classes[tag], value, where)
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return converted(others[0], value, where, name)
    if type(value) not in others:
        raise LabError(f"{where} is {shown(value)}, not {' or '.join(kind.__name__ for kind in others)}")
    return value


def plain(kind, value, where: str, name: str):
    if name.startswith("max_") and isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1 << 63 else value
    if type(value) is not kind:
        raise LabError(f"{where} is {shown(value)}, not {kind.__name__}")
    if kind in (int, float) and not 0 <= value < 1 << 63:
        raise LabError(f"{where} is {shown(value)}, not a number from 0 on")
    if kind is str and not value and name not in MAY_BE_EMPTY:
        raise LabError(f"{where} is empty")
    return value


def parse(text: str, where: str):
    """The value of a JSON text. Raises LabError for text that is none, and for an object with a key twice."""
    try:
        found = strict_json(text)
    except RecursionError:
        raise LabError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise LabError(f"{where} is no JSON: {error}") from None
    if deeper(found, DEEPEST):
        raise LabError(f"{where} is nested more than {DEEPEST} levels deep")
    return found


def read(path: Path) -> list[Definition | Solution | Trace]:
    """What a file holds: one Definition or Solution (.json), or Traces, one on each line (.jsonl)."""
    text = read_text(path, LARGEST)
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [from_json(Trace, parse(line, f"{path}:{n}"), f"{path}:{n}") for n, line in lines]
    value = parse(text, str(path))
    keys = set(value) if isinstance(value, dict) else set()
    for cls, key in ((Definition, "reference"), (Solution, "sources"), (Trace, "workload")):
        if key in keys:
            return [from_json(cls, value, str(path))]
    raise LabError(
        f"{path} is no JSON of flashinfer-bench: it has no reference (a Definition), no sources (a Solution) "
        "and no workload (a Trace)"
    )


# ---- writing -----------------------------------------------------------------------------------------------


def to_json(made) -> dict:
    """An object of the classes above as JSON's types; what is None and may be absent is left out."""
    found = {}
    for one in dataclasses.fields(made):
        value = getattr(made, one.name)
        if value is None and one.name not in ("shape", "solution", "evaluation"):
            continue
        found[one.name] = json_value(value)
    return found


def json_value(value):
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, one in NOT_FINITE.items() if str(one) == str(value))
    return value
