"""The CUDA side of `lab inspect`: which kernels a call launches, as lab._cuda says, and their machine code
and PTX, read from lab._cuda's file.

The extension records launches instead of running them (cuda_src/trace.h), so no GPU and no driver are needed.
With each launch it gives the offset of the kernel's host function in its file. The symbol at that offset has
the same name as the kernel's machine code.
"""

import functools
import math
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from lab.backends.cuda import architecture, measured_settings
from lab.errors import LabError, Unavailable
from lab.extension import load
from lab.inspect import binary
from lab.inspect.kernel import measured


def launches(op, args, gpu):
    """What ops.<op>(*args) would launch with the CUDA backend on `gpu`: a list of dicts, which
    take_launches() of cuda_src/bindings.cpp describes."""
    module = load("_cuda")
    kernels = SimpleNamespace(
        **{name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    )
    kernels.stream = lambda: 0
    module.record_launches(gpu.multiprocessors, gpu.major)
    module.set_settings(measured_settings(gpu.triton))
    try:
        op.launchers["cuda"](kernels, *args, out=op.outputs(*args))
        return module.take_launches()
    finally:
        module.record_launches(0)
        module.set_settings(
            measured_settings(architecture(torch.device("cuda")) if torch.cuda.is_available() else None)
        )


@functools.lru_cache(maxsize=1)
def _host_symbols(path):
    return {s.value: s.name for s in binary.symbols(Path(path).read_bytes()) if s.function}


@functools.lru_cache(maxsize=1)
def _folder(path):
    """A temporary folder with the cubins and PTX files that are embedded in the extension. It lives as long
    as this process."""
    folder = tempfile.TemporaryDirectory(prefix="lab-inspect-")
    binary.run("cuobjdump", "-xelf", "all", path, cwd=folder.name)
    binary.run("cuobjdump", "-xptx", "all", path, cwd=folder.name)
    return folder


def _embedded(module, ending, text):
    """The path of the embedded file with this ending that contains `text`, or None."""
    for path in sorted(Path(_folder(module.__file__).name).glob(f"*{ending}")):
        if text.encode() in path.read_bytes():
            return path
    return None


def cubin(module, symbol, gpu):
    built = module.build_info()["archs"]
    path = _embedded(module, f".{gpu.arch}.cubin", symbol + "\0")
    # The cuobjdump of Triton 3.6 writes sm_90 where the architecture is sm_90a.
    if path is None and gpu.arch.removeprefix("sm_") in built:
        path = _embedded(module, f".{gpu.arch.rstrip('a')}.cubin", symbol + "\0")
    if path is None:
        raise LabError(
            f"lab._cuda has no machine code of {symbol} for {gpu.arch}; it was built for {', '.join(built)}: "
            "choose one of these, or rebuild with LAB_CUDA_ARCH"
        )
    return path


def kernels(op, args, gpu):
    """A Kernel for each launch of a call, in their order."""
    module = load("_cuda")
    return [_kernel(module, launch, gpu) for launch in launches(op, args, gpu)]


def _symbol(module, launch):
    symbol = _host_symbols(module.__file__).get(launch["offset"])
    if symbol is None:
        raise Unavailable(
            f"lab._cuda was stripped of its symbols: the instantiation of {launch['kernel']} is unknown"
        )
    return symbol


def _kernel(module, launch, gpu):
    symbol = _symbol(module, launch)
    path = cubin(module, symbol, gpu)
    kernel = measured(
        gpu,
        path,
        symbol,
        math.prod(launch["block"]),
        launch["smem_bytes"],
        backend="cuda",
        name=launch["kernel"],
        instance=binary.demangled(symbol),
        grid=tuple(launch["grid"]),
        cluster=launch["cluster"],
        dependent_launch=launch["pdl"],
    )
    ptx = _embedded(module, ".ptx", f".entry {symbol}(")
    kernel.texts["ptx"] = (
        entry(ptx.read_text(), symbol)
        if ptx
        else LabError('no PTX in lab._cuda: build it with LAB_CUDA_ARCH="...;90+ptx"')
    )
    kernel.texts["ttgir"] = LabError("only Triton has TTGIR: add --backend triton, or use --ptx or --sass")
    return kernel


def entry(ptx, symbol):
    """One kernel's code out of a PTX file, with the file's table of source names."""
    start = re.search(rf"^.*\.entry {re.escape(symbol)}\(", ptx, re.M).start()
    end = ptx.index("\n}", start) + 2
    return ptx[start:end] + "\n" + "\n".join(re.findall(r"^\s*\.file\s.*$", ptx, re.M)) + "\n"


def instantiations(op, launch, dtype, gpu):
    """How many instantiations of the launched kernel lab._cuda contains for this dtype. The launcher chooses
    one of them."""
    module = load("_cuda")
    symbol = _symbol(module, launch)
    head = symbol.partition("I" + MANGLED[dtype])[0]
    names = {s.name for s in binary.symbols(cubin(module, symbol, gpu).read_bytes()) if s.function}
    if head == symbol:  # not templated on the dtype
        base = re.match(r"_ZN?(?:\d+lab)?\d+" + launch["kernel"], symbol)
        return sum(name.startswith(base[0]) for name in names) if base else 1
    return sum(name.startswith(head + "I" + MANGLED[dtype]) for name in names)


MANGLED = {"fp32": "f", "fp16": "6__half", "bf16": "13__nv_bfloat16"}
