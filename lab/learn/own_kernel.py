"""`lab try FILE --op OP`: a kernel of your own in the place of a built-in one: checked and, on a GPU, raced
and drawn.

FILE.cu has what cuda_src/OP.cu has: the launcher that launchers/OP.h declares. FILE.py has what
triton_kernels/OP.py has: a function named OP with the same arguments. A copy of the built-in file is a good
start. The contract, its cases, its tolerances and the benchmark are the built-in kernels'; in the records the
backend is called by the file's name.

The file is loaded by a worker process alone (lab/worker.py). This process compares what the kernel wrote, so
nothing that the file does, ending its process included, can make it pass.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from lab.arguments import names, numbers
from lab.backends import load
from lab.check import check_cases
from lab.contract import BACKENDS, DTYPES, Op
from lab.dispatch import bind
from lab.errors import LabError, Unavailable, one_line
from lab.files import python_module, regular_file
from lab.harness import untuned
from lab.harness.request import Request
from lab.names import known
from lab.ops import find
from lab.worker import Died, Worker

ROOT = Path(__file__).resolve().parent.parent.parent
SETUP = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib"]


def function_of(path: Path, op: Op, device: str, built: str | None = None):
    """The kernel in a file as a function like ops.<op>: the contract validates, allocates and launches.

    built: what build() returned for a .cu file. Loads the file into this process: a worker's, but for tests.
    Raises LabError for a file that is no such kernel, Unavailable where Triton is missing.
    """
    device = torch.device(device)
    if path.suffix == ".cu":
        return bind(op, CudaFile(path, op, device, built))
    return bind(op, TritonFile(path.resolve(), op, device))


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
        load("triton", device)  # Unavailable where there is no Triton
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
        """For tensors on the CPU: kernel[grid](...), as Triton's tutorials launch, goes to the
        interpreter."""
        if self.device.type == "cuda":
            return contextlib.nullcontext()
        from triton_kernels.interpreter import launches_interpreted

        return launches_interpreted()


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


def build(path: Path, op: Op, device: str, folder: Path, timeout: float) -> Path:
    """Builds the extension with the file in the place of cuda_src/<op>.cu into `folder`; returns the
    extension's path.

    The other objects are those at hand; what is missing of them is compiled first. Raises LabError for a file
    that does not compile within `timeout` seconds.
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
    }
    status, said = run_group([*SETUP, str(folder)], environment)
    if status:
        if advice := for_the_cpu(path, said, device):
            raise LabError(f"{path}: {advice}")
        if "not compiled within" in said:
            raise LabError(f"{path} was not compiled within {timeout:g} s (--timeout)")
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
    name = "_".join(source.relative_to(ROOT / "cuda_src").parts) + ".o"
    # The second is the object with a GPU's shapes (LAB_HOST_GPU_SHAPES): see setup.py.
    targets = [objects / name, objects / f"gpu_shapes_{name}"]
    return any(t.exists() and t.stat().st_mtime >= source.stat().st_mtime for t in targets)


def run_group(command, environment) -> tuple[int, str]:
    """(exit status, output) of a command. What it has started ends with it, when this process is interrupted,
    too."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate()
        return process.returncode, said
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


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

    def launcher(self, op: Op):
        return self.backend.launcher(op)


def declaration(name: str) -> str:
    """A launcher's declaration, as its header has it."""
    text = (ROOT / "cuda_src" / "launchers" / f"{name}.h").read_text()
    return re.search(rf"^void {name}\(.*?\)(?=;)", text, re.M | re.S)[0]


def main(args) -> int:
    op, device = find(args.op), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    taken = [name for name, dtype in DTYPES.items() if dtype in op.dtypes]
    dtypes = (
        [known(name, taken, f"dtype of {op.name}") for name in names(args.dtype)] if args.dtype else taken
    )
    if op.whole_step and device == "cuda" and not args.check_only:
        raise LabError(f"{op.name} is a whole step, which no race of ops has: use --check-only")
    require_kernel_file(args.file)
    name = args.file.name
    if name in BACKENDS:
        raise LabError(f"{name} is a backend's name: call the file something else")
    request = race_of(op, args, dtypes)
    spec = {
        "module": __name__,
        "file": str(args.file.resolve()),
        "op": op.name,
        "device": device,
        "built": None,
        "what": str(args.file),
    }
    with tempfile.TemporaryDirectory(prefix="lab-try-") as folder:
        if args.file.suffix == ".cu":
            spec["built"] = str(build(args.file, op, device, Path(folder), args.timeout))
        with Worker(spec, args.timeout) as worker:
            worker.start()
            return try_in(worker, op, args, request, device)


def try_in(worker: Worker, op: Op, args, request: Request, device: str) -> int:
    """Checks the file that a worker has loaded, and races it where there is a GPU; returns the exit
    status."""
    name, function = args.file.name, worker.function(op.name)

    def check() -> int:
        return sum(
            check_cases(op, name, function, dtype, op.cases, "cpu", args.seed) for dtype in request.dtypes
        )

    failed = check()
    if failed:
        print(f"{failed} cases failed: a kernel that is wrong is not raced")
        return 1
    if args.check_only or device == "cpu":
        print(
            "right in every case" + ("" if args.check_only else "; not raced, for emulated times say nothing")
        )
        return 0
    try:
        status = worker.ask({"run": "race_in_worker", "arguments": (name, request)}, limited=False).get(
            "result"
        )
    except Died as died:
        raise LabError(f"{args.file}: the process of the race {died}") from None
    print("checked again after the race, in the same process:")
    failed = check()
    if failed:
        print(f"{failed} cases failed after the race: these times are of a kernel that is wrong")
        return 1
    return draw(name, request.out) if status == 0 else 1


def in_worker(spec: dict):
    """name -> the function in spec["file"], in a worker's process."""
    function = function_of(Path(spec["file"]), find(spec["op"]), spec["device"], spec["built"])
    return {spec["op"]: function}.__getitem__


def race_of(op: Op, args, dtypes) -> Request:
    """The bench that races a file: its op alone, beside the built-in kernels and the vendor's."""
    return Request(
        "ops",
        args.out or f"out/try/{args.file.stem}",
        ops=(op.name,),
        models=tuple(names(args.model)),
        batches=tuple(numbers(args.batch)),
        contexts=tuple(numbers(args.context)),
        dtypes=tuple(dtypes),
        fresh=True,
    )


def race_in_worker(functions, name: str, request: Request) -> int:
    """The race, in the process that has loaded the file; its records are read and drawn by the other one."""
    return race(name, functions(request.ops[0]), request)


def race(name: str, function, request: Request) -> int:
    """Benchmarks a function beside the built-in backends and the vendor's kernels; the exit status."""
    from lab.harness import bench

    return bench.measure(request, own={name: SimpleNamespace(**{request.ops[0]: function})})


def draw(name: str, out: str) -> int:
    """Says who won, by the records in `out`, and draws the report."""
    from lab.records import schema
    from lab.report import build

    for line in verdicts(schema.read(out).rows, name):
        print(line)
    return build.report(out)


def untuned_beside(row, rows):
    """The backends that were measured at `row`'s size in its run with settings that nobody raced."""
    cards = untuned.by_cards([r for r in rows if r.kind == "fairness" and r.run == row.run])
    return {
        r.backend
        for r in rows
        if r.kind == "op"
        and (r.run, r.op, r.role, r.dtype, r.batch, r.context, r.shape)
        == (row.run, row.op, row.role, row.dtype, row.batch, row.context, row.shape)
        and untuned.is_untuned(r, cards)
    }


def verdicts(rows, name):
    """A line for each size of the last run that raced this file: its time, its share of the ceiling, and how
    each other backend did against it, with "untuned" beside one whose settings nobody raced."""
    own = [
        r
        for r in rows
        if r.kind == "op"
        and r.backend == name
        and (r.cache == "cold", r.timer) in ((True, "graph"), (False, "wall"))
    ]
    for row in (r for r in own if r.run == own[-1].run):
        size = " ".join(f"{k}={v}" for k, v in row.shape.items())
        line = one_line(f"{row.op} {row.role or ''} {row.dtype} batch {row.batch} {size}: ") + " "
        if row.error:
            yield line + one_line(f"failed: {row.error}")
            continue
        share = "" if row.of_ceiling is None else f", {row.of_ceiling:.0%} of the ceiling"
        left = untuned_beside(row, rows)
        words = {"faster": "faster than", "slower": "slower than", "same": "the same as"}
        yield (
            line
            + f"{row.us:.1f} us{share}; "
            + ", ".join(
                f"{words.get(verdict, 'too close to call against')} {one_line(other)}"
                + f" ({untuned.WORD})" * (other in left)
                for other, verdict in (row.verdict or {}).items()
            )
        )
