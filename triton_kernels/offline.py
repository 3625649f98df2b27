"""Compiles a kernel exactly as a launch would, on a machine without a GPU: registers, spills, PTX and SASS.

with common.recording("sm_90") as launches:
    rmsnorm(x, w, eps, None, y)                 # tensors on the CPU, or torch.empty(..., device="meta")
code = offline.compile(launches[0], "sm_90")    # code.asm["ptx"], code.asm["cubin"], offline.usage(code)
"""

import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

# Which arguments the source of a compiled launch lists. Since Triton 3.7 these include arguments without an
# attribute. A kernel compiled here must list the same ones, or a launch would not find it in Triton's cache.
LISTS_EMPTY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


def _specialised(value, fixed):
    """(type, constant or None, divisible by 16?) of a run-time argument, as Triton's launcher classifies it.

    Triton compiles None and the integer 1 into the code as constants, and tells the compiler which values are
    divisible by 16; without that there are no 16-byte loads. `fixed` arguments (do_not_specialize) get
    neither treatment.
    """
    if value is None or (type(value) is int and value == 1 and not fixed):
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return mangle_type(value), None, value.data_ptr() % 16 == 0  # a meta tensor's address is 0
    return mangle_type(value), None, type(value) is int and value % 16 == 0 and not fixed


def compile(launch, architecture):
    """The triton CompiledKernel of a recorded `common.Launch` for "sm_NN"."""
    jit = launch.kernel
    names = jit.arg_names
    values = {**dict(zip(names, launch.args)), **{k: v for k, v in launch.meta.items() if k in names}}
    options = {k: v for k, v in launch.meta.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(jit.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            kind, constant, divisible = "constexpr", value, False
        else:
            kind, constant, divisible = _specialised(value, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = constant
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif LISTS_EMPTY and not (isinstance(values[parameter.name], float) or parameter.do_not_specialize):
            attributes[(i,)] = []
    source = ASTSource(fn=jit, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(architecture[3:]), 32), options=options)


def _cuobjdump(code, flag):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
        ).stdout


def usage(code):
    """The resources of a kernel as a dict: regs per thread; stack and local in bytes per thread (if not 0,
    registers were spilled); shared in bytes per block."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _cuobjdump(code, "-res-usage"))
    regs, stack, _, local = map(int, found.groups())
    return dict(regs=regs, stack=stack, local=local, shared=code.metadata.shared)


def sass(code):
    """The machine code, one instruction a line."""
    return _cuobjdump(code, "-sass")
