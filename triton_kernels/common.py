"""Functions that all Triton launchers share: launch, trace, and the choice of a configuration by
architecture."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from lab.errors import LabError
from triton_kernels import interpreter

_trace = None  # kernel names launched since the last take_trace(), or None
_recording = None  # (architecture, list of Launch) while launches are recorded instead of run


class Launch(NamedTuple):
    """One launch as a launcher requested it, which `lab inspect` compiles without running it."""

    kernel: Any
    grid: tuple
    args: tuple
    meta: dict


def launch(kernel, grid, *args, reads=(), **meta):
    """Runs a triton.jit `kernel` over `grid`: interpreted for CPU tensors, compiled for CUDA tensors.

    args[0] is a tensor, which decides between the two. The CUDA stream is torch's current one, so a launch
    can be captured in a graph. `meta` has the kernel's constexprs and the compiler's options (num_warps,
    num_stages, launch_pdl ...). reads: tensors whose addresses the kernel finds in memory; besides its
    arguments, the interpreter lets it access only these.
    """
    # Makes the compiler round a * b + c once, which is not the default of every Triton release.
    meta["enable_fp_fusion"] = True
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, args, meta))
        return
    if _trace is not None:
        _trace.append(kernel.fn.__name__)
    device = args[0].device
    if device.type == "cpu":
        interpreter.run(kernel, grid, args, meta, reads)
    elif device.index == torch.cuda.current_device():
        kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)


def set_trace(on):
    """Start (True) or stop (False) recording the name of each kernel launched."""
    global _trace
    _trace = [] if on else None


def take_trace():
    """The kernel names launched since the last call, in order; empty when tracing is off."""
    global _trace
    names, _trace = _trace or [], (None if _trace is None else [])
    return names


@contextlib.contextmanager
def recording(architecture):
    """Collect launches as they would be on `architecture` ("sm_90") and run none of them: no GPU needed.

    with recording("sm_90") as launches: rmsnorm(...)      # launches[0].kernel, .grid, .args, .meta
    """
    global _recording
    previous, _recording = _recording, (architecture, [])
    try:
        yield _recording[1]
    finally:
        _recording = previous


@functools.lru_cache(maxsize=None)
def _architecture(device):
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.lru_cache(maxsize=None)
def _nearest(keys, architecture):
    if architecture in keys:
        return architecture
    known = [int(key[3:]) for key in keys if key.startswith("sm_")]
    lower = [n for n in known if n <= int(architecture[3:])]
    if not lower:
        raise LabError(
            f"no Triton configuration for {architecture}; the oldest supported GPU is sm_{min(known)}"
        )
    return f"sm_{max(lower)}"


def architecture(tensor):
    """ "interpreter" for a CPU tensor, else the GPU's "sm_NN"."""
    return _recording[0] if _recording is not None else _architecture(tensor.device)


def config(table, tensor):
    """The entry of `table` ("sm_90", "sm_80", "interpreter") for the tensor's device.

    For an architecture without an entry it is that of the nearest lower one. Raises LabError below all of
    them.
    """
    return table[_nearest(tuple(table), architecture(tensor))]
