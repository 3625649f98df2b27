"""Loads a kernel's file: a .cu file is built into an extension of its own, a .py file takes the place of the
op's Triton module.

Both become a backend, whose function validates, allocates and launches as a built-in one does. Loading runs
the file's code, so it happens in a worker's process alone (lab/judge/child.py).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import torch

from lab.backends import load
from lab.contract import Op
from lab.dispatch import bind
from lab.errors import LabError
from lab.files import python_module, regular_file
from lab.processes import run_group

ROOT = Path(__file__).resolve().parent.parent.parent
SETUP = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib"]


def function_of(path: Path, op: Op, device: str, built: str | None = None):
    """The kernel in a file as a function like ops.<op>: the contract validates, allocates and launches.

    built: what build() returned for a .cu file. Loads the file into this process: a worker's, but for tests.
    Raises LabError for a file that is no such kernel, Unavailable where Triton is missing.
    """
    return bind(op, backend_of(path, op, device, built), device)


def backend_of(path: Path, op: Op, device: str, built: str | None = None) -> CudaFile | TritonFile:
    """The file as a backend that has the op alone: see function_of()."""
    device = torch.device(device)
    if path.suffix == ".cu":
        return CudaFile(path, op, device, built)
    return TritonFile(path.resolve(), op, device)


def require_kernel_file(path: Path) -> None:
    if not path.exists():
        raise LabError(f"{path}: no such file")
    regular_file(path)
    if path.suffix not in (".cu", ".py"):
        raise LabError(f"{path}: give a .cu file (CUDA) or a .py file (Triton)")


class TritonFile:
    """A file with a Triton kernel, as a backend: while the contract's launcher runs, the file takes the place
    of the module triton_kernels.<op>, from which the launcher imports the function that it calls."""

    def __init__(self, path: Path, op: Op, device: torch.device):
        self.built_in = load("triton", device)  # Unavailable where there is no Triton
        self.names = None  # of the kernels launched as kernel[grid](...), while there is a trace
        self.name, self.place = path.name, f"triton_kernels.{op.name}"
        importlib.import_module(self.place)  # so that nothing else imports the stand-in
        self.device, self.module = device, self.loaded(path)
        function = getattr(self.module, op.name, None)
        built_in = getattr(sys.modules[self.place], op.name)
        wanted = f"{op.name}({', '.join(inspect.signature(built_in).parameters)})"
        if not callable(function):
            raise LabError(
                f"{path} has no function {op.name}: write {wanted}, which launches your kernel, as that in "
                f"triton_kernels/{op.name}.py does"
            )
        if hasattr(function, "__getitem__"):  # triton.jit's and triton.autotune's objects
            raise LabError(
                f"{path}: {op.name} is a kernel itself: give it another name and write a function {wanted} "
                "that launches it, as kernel[grid](...)"
            )

    @staticmethod
    def loaded(path: Path):
        with needs_no_driver(path):
            return python_module(path)

    def launcher(self, op: Op):
        def launch(*args, **options):
            with self.in_place(), needs_no_driver(self.name):
                op.launchers["triton"](*args, **options)

        return launch

    @contextlib.contextmanager
    def in_place(self):
        built_in, sys.modules[self.place] = sys.modules[self.place], self.module
        try:
            with self.interpreted():
                yield
        finally:
            sys.modules[self.place] = built_in

    def interpreted(self):
        """kernel[grid](...), as Triton's tutorials launch: on the CPU it goes to the interpreter, on a GPU
        it is noted."""
        from triton_kernels.interpreter import launches_interpreted, launches_noted

        if self.device.type == "cuda":
            return launches_noted(self.names)
        return launches_interpreted(self.names)

    def set_trace(self, on: bool) -> None:
        self.built_in.set_trace(on)
        self.names = [] if on else None

    def take_trace(self) -> list[str]:
        """The names of the kernels launched since the last call."""
        names, self.names = self.names or [], None if self.names is None else []
        by_launch = self.built_in.take_trace()  # on a GPU these are in `names`, too
        return names if self.device.type == "cuda" else by_launch + names


@contextlib.contextmanager
def needs_no_driver(path):
    """Says what to write instead of a call of Triton's driver. Triton's own message says how many drivers are
    active, and not that one of the file's lines asked for one."""
    try:
        yield
    except Exception as error:
        if "active drivers" not in str(error):
            raise
        raise LabError(
            f"{path}: triton.runtime.driver.active needs a GPU: take the device from the tensors that your "
            "function is given"
        ) from None


def build(path: Path, op: Op, device: str, folder: Path, timeout: float, memory: int | None = None) -> Path:
    """Builds the extension with the file in the place of cuda_src/<op>.cu into `folder`; returns the
    extension's path.

    The other objects are those at hand; what is missing of them is compiled first. Raises LabError for a file
    that does not compile within `timeout` seconds and `memory` bytes.
    """
    if not (ROOT / "cuda_src" / f"{op.name}.cu").exists():
        raise LabError(f"{op.name} has no CUDA kernel")
    of_device, name = ("1", "_cuda") if device == "cuda" else ("0", "_host")
    objects = ROOT / "build" / name.strip("_")
    sources = [*(ROOT / "cuda_src").glob("*.cu"), *(ROOT / "cuda_src/ladder").glob("*.cu")]
    missing = [source for source in sources if not compiled(source, objects)]
    if missing:
        print(
            f"{len(missing)} of the {len(sources)} files in cuda_src are not compiled: that is done first, "
            "once, and takes minutes",
            file=sys.stderr,
            flush=True,
        )
    environment = {
        **os.environ,
        "LAB_TRY": f"{op.name}={path.resolve()}",
        "LAB_CUDA": of_device,
        "LAB_TRY_SECONDS": str(timeout),
        "LAB_TRY_MEMORY": "" if memory is None else str(memory),
    }
    status, said = run_group([*SETUP, str(folder)], environment, folder=ROOT)
    if status:
        if advice := for_the_cpu(path, said, device):
            raise LabError(f"{path}: {advice}")
        if over := re.search(r"compiling it took more than .*", said):
            raise LabError(f"{path}: {over[0]}")
        sys.stderr.write(said)
        raise LabError(
            f"{path} does not compile, or lacks the launcher {op.name} of cuda_src/launchers/{op.name}.h; "
            "what the compiler says is above"
        )
    return max(folder.glob(f"lab/{name}.*"), key=lambda file: file.stat().st_mtime_ns)


def for_the_cpu(path: Path, said: str, device: str) -> str | None:
    """Advice for a file that uses what nvcc compiles and the C++ compiler of the CPU does not; None where it
    failed for another reason.

    said: the compiler's output.
    """
    if device == "cuda":
        return None
    if found := re.search(r":(\d+):\d+: error: (use lab::smem.*)", said):
        return f"line {found[1]}: {found[2]}"
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if "<<<" in line.partition("//")[0]:
            return (
                f"line {number}: kernel<<<grid, block, bytes, stream>>>(...) does not compile for the CPU: "
                "write "
                'launch({grid, block, bytes, stream}, "name", kernel, ...)'
            )
    return None


def compiled(source: Path, objects: Path) -> bool:
    """Whether there is an object of a kernel's file that is newer than the file (setup.py looks closer)."""
    name = "_".join(source.relative_to(ROOT / "cuda_src").parts)
    # The second is the object with a GPU's shapes (LAB_HOST_GPU_SHAPES); the last are parts: see setup.py.
    targets = [objects / f"{name}.o", objects / f"gpu_shapes_{name}.o", *objects.glob(f"{name}.*.o")]
    return any(t.exists() and t.stat().st_mtime >= source.stat().st_mtime for t in targets)


class CudaFile:
    """A file that build() has built, as a backend."""

    def __init__(self, path: Path, op: Op, device: torch.device, built: str):
        from lab.backends.cuda import Backend

        self.name = path.name
        name = "_cuda" if device.type == "cuda" else "_host"
        spec = importlib.util.spec_from_file_location(f"lab_try.{name}", built)
        try:
            extension = importlib.util.module_from_spec(spec)
        except ImportError as error:  # the linker leaves what is missing to the loader
            symbol = re.search(r"undefined symbol: (\w+)", str(error))
            if symbol and op.name not in symbol[1]:
                raise LabError(f"{path} declares and uses {symbol[1]}, which is defined nowhere") from None
            raise LabError(
                f"{path} lacks the launcher {op.name} of cuda_src/launchers/{op.name}.h, "
                f"{declaration(op.name)} ({error})"
            ) from None
        spec.loader.exec_module(extension)
        self.backend = Backend(device, extension)
        self.launcher, self.set_trace = self.backend.launcher, self.backend.set_trace
        self.take_trace = self.backend.take_trace


def declaration(name: str) -> str:
    """A launcher's declaration, as its header has it."""
    text = (ROOT / "cuda_src" / "launchers" / f"{name}.h").read_text()
    return re.search(rf"^void {name}\(.*?\)(?=;)", text, re.M | re.S)[0]
