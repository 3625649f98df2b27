"""`lab try FILE --op OP`: a kernel of your own in the place of a built-in one: checked and, on a GPU, raced and drawn.

FILE.cu has what cuda_src/OP.cu has: the launcher that launchers.h declares. FILE.py has what triton_kernels/OP.py has: a
function named OP with the same arguments. A copy of the built-in file is a good start. The contract, its cases, its
tolerances and the benchmark are the built-in kernels'; in the records the backend is called by the file's name.
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from lab.backends import load
from lab.check import check_cases
from lab.dispatch import BACKENDS, DTYPES, Op, bind, known
from lab.errors import LabError, Unavailable
from lab.files import python_module

ROOT = Path(__file__).resolve().parent.parent
SETUP = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib"]


def function_of(path: Path, op: Op, device: str):
    """The kernel in a file as a function like ops.<op>: the contract validates, allocates and launches.

    Raises LabError for a file that is no such kernel, Unavailable where its compiler is missing.
    """
    if not path.is_file():
        raise LabError(f"{path}: no such file")
    kinds = {".cu": CudaFile, ".py": TritonFile}
    if path.suffix not in kinds:
        raise LabError(f"{path}: give a .cu file (CUDA) or a .py file (Triton)")
    return bind(op, kinds[path.suffix](path.resolve(), op, torch.device(device)))


class TritonFile:
    """Stands in for triton_kernels.<op> while the contract's Triton half runs."""

    def __init__(self, path: Path, op: Op, device: torch.device):
        load("triton", device)                      # Unavailable where there is no Triton
        self.name, self.place = path.name, f"triton_kernels.{op.name}"
        importlib.import_module(self.place)         # so that nothing else imports the stand-in
        self.module = python_module(path)
        if not callable(getattr(self.module, op.name, None)):
            raise LabError(f"{path} has no function {op.name}: it needs one with the arguments of that in "
                           f"triton_kernels/{op.name}.py")

    def launcher(self, op: Op):
        def launch(*args, **options):
            with self.in_place():
                op.triton(*args, **options)
        return launch

    @contextlib.contextmanager
    def in_place(self):
        built_in, sys.modules[self.place] = sys.modules[self.place], self.module
        try:
            yield
        finally:
            sys.modules[self.place] = built_in


class CudaFile:
    """The extension built again with the file in the place of cuda_src/<op>.cu; the other objects are those at hand."""

    def __init__(self, path: Path, op: Op, device: torch.device):
        from lab.backends.cuda import Backend
        if not (ROOT / "cuda_src" / f"{op.name}.cu").exists():
            raise LabError(f"{op.name} has no CUDA half")
        self.name = path.name
        # Python gives the same module again for the same place, and pybind11 for the same name: both are new each time.
        self.folder = tempfile.TemporaryDirectory(prefix="lab-try-")
        folder = Path(self.folder.name)
        environment = {**os.environ, "LAB_TRY": f"{op.name}={path}", "LAB_CUDA": "1" if device.type == "cuda" else "0"}
        done = subprocess.run([*SETUP, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            raise LabError(f"{path} does not compile, or lacks the launcher {op.name} of cuda_src/launchers.h; what the "
                           "compiler says is above")
        name = "_cuda" if device.type == "cuda" else "_host"
        built = max(folder.glob(f"lab/{name}.*"), key=lambda file: file.stat().st_mtime_ns)
        spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", built)
        try:
            extension = importlib.util.module_from_spec(spec)
        except ImportError as error:                # the linker leaves a missing launcher to the loader
            raise LabError(f"{path} lacks the launcher {op.name} of cuda_src/launchers.h: {error}") from None
        spec.loader.exec_module(extension)
        self.backend = Backend(device, extension)

    def launcher(self, op: Op):
        return self.backend.launcher(op)


def main(args) -> int:
    from lab.harness.shapes import STEPS
    from lab.ops import find
    op, device = find(args.op), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    taken = [name for name, dtype in DTYPES.items() if dtype in op.dtypes]
    dtypes = [known(name, taken, f"dtype of {op.name}") for name in args.dtype.split(",")] if args.dtype else taken
    if op.name in STEPS and device == "cuda" and not args.check_only:
        raise LabError(f"{op.name} is a whole step, which no race of ops has: use --check-only")
    function, name = function_of(args.file, op, device), args.file.name
    if name in BACKENDS:
        raise LabError(f"{name} is a backend's name: call the file something else")
    failed = sum(check_cases(op, name, function, dtype, op.cases, device, args.seed) for dtype in dtypes)
    if failed:
        print(f"{failed} cases failed: a kernel that is wrong is not raced")
        return 1
    if args.check_only or device == "cpu":
        print("right in every case" + ("" if args.check_only else "; not raced, for emulated times say nothing"))
        return 0
    return race(op, name, function, args, dtypes)


def race(op: Op, name: str, function, args, dtypes) -> int:
    """Benchmarks the file beside the built-in backends and the vendor's kernels, says who won, and draws the report."""
    from lab import cli
    from lab.harness import bench, records
    out = args.out or f"out/try/{args.file.stem}"
    words = ["ops", op.name, "--out", out, "--model", args.model, "--batch", args.batch, "--context", args.context,
             "--dtype", ",".join(dtypes), "--fresh"]
    status = bench.main(bench.parse(words), own={name: SimpleNamespace(**{op.name: function})})
    for line in verdicts(records.read(out).rows, name):
        print(line)
    return status or cli.main(["report", out])


def verdicts(rows, name):
    """A line for each size of the last run that raced this file: its time, its share of the ceiling, and how each other
    backend did against it."""
    own = [r for r in rows if r.kind == "op" and r.backend == name and (r.cache == "cold", r.timer) in (
        (True, "graph"), (False, "wall"))]
    for row in (r for r in own if r.run == own[-1].run):
        size = " ".join(f"{k}={v}" for k, v in row.shape.items())
        line = f"{row.op} {row.role or ''} {row.dtype} batch {row.batch} {size}: "
        if row.error:
            yield line + f"failed: {row.error}"
            continue
        share = "" if row.of_ceiling is None else f", {row.of_ceiling:.0%} of the ceiling"
        words = {"faster": "faster than", "slower": "slower than", "same": "the same as"}
        yield line + f"{row.us:.1f} us{share}; " + ", ".join(
            f"{words.get(verdict, 'too close to call against')} {other}" for other, verdict in (row.verdict or {}).items())
