"""A solution in the judge's process for kernels: loads its sources and calls its entry point on the arena
that both processes map. What lab/judge/child.py does for a kernel's file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import PurePosixPath

import torch

from lab.backends import load
from lab.dispatch import bind
from lab.errors import LabError, error_text
from lab.flashinfer_format.families import ops_of
from lab.flashinfer_format.schema import Definition, from_json
from lab.judge.child import Watched, call, prepare, written_since
from lab.judge.kernel_file import needs_no_driver
from lab.judge.originals import watch
from lab.judge.replay import burst, fetch, release, replay  # what the race asks for by name

__all__ = ["burst", "call", "fetch", "in_worker", "prepare", "release", "replay", "written_since"]


class Solved(Watched):
    """An entry point as the function of a definition's Op, watched as a kernel's file is."""

    def __init__(self, op, spec: dict):
        self.op, self.device = op, torch.device(spec["device"])
        self.backend = SolutionBackend(spec, self.device)
        self.function = bind(op, self.backend, self.device)


class SolutionBackend:
    """An entry point as a backend. spec: "folder" in which the package "package" holds the sources, "file"
    and "function" of the entry point, "language", "returns", whether the outputs are returned, and for CUDA
    "built", the extension (lab/flashinfer_format/building.py)."""

    def __init__(self, spec: dict, device: torch.device):
        self.name, self.language, self.device = spec["what"], spec["language"], device
        self.names, self.returns = None, spec["returns"]
        if self.language == "triton":
            load("triton", device)  # Unavailable where there is no Triton
        self.function = entry_point(spec)
        require_arguments(self.function, spec)

    def launcher(self, op):
        def launch(*args, out):
            # The definition's inputs come first; then, among our arguments, its other outputs.
            extra = len(op.mutates)
            inputs, outputs = args[: len(args) - extra], [out, *args[len(args) - extra :]]
            with self.interpreted(), needs_no_driver(self.name):
                if not self.returns:
                    self.function(*inputs, *outputs)
                    return
                self.take(self.function(*inputs), outputs)

        return launch

    def take(self, returned, outputs) -> None:
        """Copies what the entry point returned into the outputs."""
        found = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        if len(found) != len(outputs) or not all(isinstance(t, torch.Tensor) for t in found):
            raise LabError(f"the entry point returns {kinds(found)}, not {len(outputs)} tensors")
        for got, wanted in zip(found, outputs, strict=True):
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                raise LabError(
                    f"the entry point returns {got.dtype} {list(got.shape)}, not {wanted.dtype} "
                    f"{list(wanted.shape)}"
                )
            wanted.copy_(got)

    def interpreted(self):
        if self.language != "triton":
            return contextlib.nullcontext()
        from triton_kernels.interpreter import launches_interpreted, launches_noted

        return launches_noted(self.names) if self.device.type == "cuda" else launches_interpreted()

    def set_trace(self, on: bool) -> None:
        """On a CPU interpreted kernels are seen by their grids, also those that a copy of our own interpreter
        runs. A call in Python or CUDA counts as one kernel."""
        if self.language != "triton" or self.device.type == "cuda":
            noted = [] if self.language == "triton" else [self.language]
            self.names = noted if on else None
            return
        from triton.runtime.interpreter import InterpreterBuilder

        if on:
            self.names, self.before = [], InterpreterBuilder.set_grid_dim

            def seen(builder, *grid):
                self.names.append("grid " + " ".join(map(str, grid)))
                return self.before(builder, *grid)

            InterpreterBuilder.set_grid_dim = seen
        else:
            InterpreterBuilder.set_grid_dim = self.before

    def take_trace(self) -> list[str]:
        return list(self.names or ())


def kinds(values) -> str:
    return ", ".join(type(value).__name__ for value in values) or "nothing"


def entry_point(spec: dict):
    """The function of the entry point. Its file is a module of a package, so that sources can import each
    other by relative imports, as flashinfer-bench loads them."""
    path = PurePosixPath(spec["file"])
    module = ".".join([spec["package"], *path.with_suffix("").parts])
    sys.path.insert(0, spec["folder"])
    try:
        with needs_no_driver(spec["what"]):
            loaded = extension(spec) if spec.get("built") else importlib.import_module(module)
            function = getattr(loaded, spec["function"], None)
    except (Exception, SystemExit) as error:
        raise LabError(f"{spec['what']}: {error_text(error)}") from error
    finally:
        sys.path.remove(spec["folder"])
    if not callable(function):
        raise LabError(f"{spec['what']}: {spec['file']} has no function {spec['function']}")
    return function


def extension(spec: dict):
    """The module that was built of the sources, loaded."""
    found = importlib.util.spec_from_file_location(spec["package"], spec["built"])
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def require_arguments(function, spec: dict) -> None:
    """Raises LabError if an entry point cannot take as many arguments as it will be given."""
    inputs, outputs = (list(spec["definition"][kind]) for kind in ("inputs", "outputs"))
    given = inputs if spec["returns"] else inputs + outputs
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        style = "false: outputs are returned" if spec["returns"] else "true: outputs are the last arguments"
        raise LabError(
            f"{spec['what']}: {spec['function']} does not take {', '.join(given)} "
            f"(destination_passing_style is {style})"
        ) from None
    except ValueError:  # a function without a signature
        return


def in_worker(spec: dict):
    """name -> the entry point as the function of the definition's Op. Its readings take the same
    arguments."""
    op = next(iter(ops_of(from_json(Definition, spec["definition"], spec["what"])).values()))
    watch(op)
    solved = Solved(op, spec)
    return lambda name: solved
