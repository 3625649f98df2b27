"""What the contracts declare, read from their source text without running it. Never imports torch.

A contract imports torch, which takes seconds. Help, completion and reports need only a few literals of it.
"""

import ast
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "ops"
GROUPS = ("BasicOps", "FusedOps", "PersistentOps", "ParallelOps", "OtherOps")


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """{class of lab/ops/__init__.py: the names of the ops that it declares, in their order}."""
    classes = {
        node.name: node
        for node in ast.parse((FOLDER / "__init__.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    return {
        name: tuple(line.target.id for line in classes[name].body if isinstance(line, ast.AnnAssign))
        for name in GROUPS
    }


def names() -> list[str]:
    """All ops, in the order of lab.ops.OPS."""
    return [name for group in groups().values() for name in group]


@cache
def contract(name: str) -> dict[str, ast.expr]:
    """The keyword arguments of Op(...) in lab/ops/<name>.py, not evaluated; {} if there is no such op."""
    if name not in names():
        return {}
    for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.targets[0].id == "op":
            return {keyword.arg: keyword.value for keyword in node.value.keywords}
    return {}


def color(name: str) -> str | None:
    """Op.color."""
    value = contract(name).get("color")
    return None if value is None else ast.literal_eval(value)


def spaces(name: str) -> tuple[str, ...]:
    """The languages of Op.spaces: those in which `lab tune` has settings to choose from."""
    value = contract(name).get("spaces")
    return () if value is None else tuple(ast.literal_eval(key) for key in value.keys)
