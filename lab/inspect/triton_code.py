"""The Triton side of `lab inspect`: which kernels a call launches, as triton_kernels.common records them,
compiled for the architecture that was asked for."""

import importlib
import tempfile
import time
from pathlib import Path

from lab.errors import Unavailable
from lab.inspect.gpu import WARP
from lab.inspect.kernel import measured
from lab.tune import tuned


def launches(op, args, gpu):
    """What ops.<op>(*args) would launch with the Triton backend on `gpu`: a list of
    triton_kernels.common.Launch."""
    try:
        from triton_kernels import common

        with common.recording(gpu.triton) as found:
            op.launchers["triton"](*args, out=op.outputs(*args))
    except ModuleNotFoundError as error:
        if error.name == f"triton_kernels.{op.name}":
            raise Unavailable(
                f"{op.name} has no Triton kernel: triton_kernels/{op.name}.py does not exist"
            ) from None
        raise Unavailable(f"the Triton kernel: {error}; install it with `pip install triton`") from None
    return found


def kernels(op, args, gpu):
    """A Kernel for each launch of a call, in their order."""
    return [_kernel(launch, gpu) for launch in launches(op, args, gpu)]


def _kernel(launch, gpu):
    from triton_kernels import offline

    code = offline.compile(launch, gpu.triton)
    name = code.metadata.name
    settings = {k: v for k, v in launch.meta.items() if k.isupper() or k.startswith("num_")}
    with tempfile.TemporaryDirectory(prefix="lab-inspect-") as folder:
        path = Path(folder, f"{name}.cubin")
        path.write_bytes(code.asm["cubin"])
        kernel = measured(
            gpu,
            path,
            name,
            code.metadata.num_warps * WARP,
            code.metadata.shared,
            backend="triton",
            name=name,
            instance=" ".join(f"{k}={v}" for k, v in settings.items()),
            grid=grid_of(launch),
            dependent_launch=bool(launch.meta.get("launch_pdl")),
        )
    kernel.texts |= {"ptx": code.asm["ptx"], "ttgir": code.asm["ttgir"]}
    return kernel


def grid_of(launch):
    grid = launch.grid(launch.meta) if callable(launch.grid) else tuple(launch.grid)
    return (*grid, 1, 1)[:3]


def compile_seconds(launch, gpu):
    """How many seconds Triton takes to compile the kernel of one launch without its cache. Call it after
    kernels(): the first compile of a process also starts the compiler."""
    from triton import knobs

    from triton_kernels import offline

    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        start = time.perf_counter()
        offline.compile(launch, gpu.triton)
        return time.perf_counter() - start


def configurations(op, gpu):
    """How many launch settings the op has for this architecture, written by hand and tuned, those for packed
    weights included. The launcher chooses one of them."""
    from triton_kernels import common

    module = importlib.import_module(f"triton_kernels.{op.name}")
    tables = [getattr(module, name) for name in ("CONFIGS", "PACKED") if hasattr(module, name)]
    entries = tuned.read(tuned.path_of("triton", gpu.triton))
    found = {repr(sorted(entry["settings"].items())) for entry in entries if entry["op"] == op.name}
    with common.recording(gpu.triton):
        found = found.union(*(_leaves(common.config(table, None)) for table in tables))
    return max(1, len(found))


def _leaves(entry):
    """The distinct innermost dicts of settings in a table's entry."""
    inner = entry.values() if isinstance(entry, dict) else entry
    deeper = [v for v in inner if isinstance(v, (dict, list, tuple))]
    if isinstance(entry, dict) and not deeper:
        return {repr(sorted(entry.items(), key=str))}
    return set().union(*map(_leaves, deeper)) if deeper else set()
