"""The modules of this repository that another needs, for copies that run anywhere: imports are followed, and
made relative. The same for sources in CUDA and what they include."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab.errors import LabError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lab", "triton_kernels")
CUDA = ROOT / "cuda_src"


def path_of(module: str) -> Path | None:
    """The file of a module of this repository, relative to it, or None for a name that is no module."""
    path = Path(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((one for one in found if (ROOT / one).is_file()), None)


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Its imports from this repository's packages. Raises LabError for one that cannot be made relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module.split(".")[0] in PACKAGES:
                yield node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    raise LabError(
                        f"import {alias.name}: write `from ... import`, which can be made relative"
                    )


def reached(modules: Iterable[str], triton: bool = True) -> set[Path]:
    """The files, relative to the repository, of the modules and of what they import.

    Of imports inside functions only those of Triton's kernels count, and only with `triton`: the others serve
    checks and tests.
    """
    waiting, found = [path_of(module) for module in modules], set()
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found.add(path)
        tree = ast.parse((ROOT / path).read_text())
        for node in imports(tree):
            if node in tree.body or triton and node.module.startswith("triton_kernels"):
                waiting += [path_of(node.module), *(path_of(f"{node.module}.{a.name}") for a in node.names)]
        waiting += [
            parent / "__init__.py" for parent in path.parents if (ROOT / parent / "__init__.py").is_file()
        ]
    # The names of `import lab` lead to models, which no op needs.
    return found - {Path("lab/__init__.py")}


def relative(path: Path) -> str:
    """The text of a module with its imports of this repository made relative to the package's root."""
    lines = (ROOT / path).read_text().splitlines(keepends=True)
    for node in imports(ast.parse("".join(lines))):
        dots = "." * len(path.parts)
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {dots}{node.module} ", 1)
    return "".join(lines)


def included(sources: Iterable[Path]) -> set[Path]:
    """Files of cuda_src and all of this repository that they include, one after the other. Raises LabError
    for a name that is no file."""
    waiting, found = list(sources), set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            here = next((one for one in (path.parent / name, CUDA / name) if one.is_file()), None)
            if here is None:
                raise LabError(f"{path}: there is no file {name}")
            waiting.append(here.resolve())
    return found
