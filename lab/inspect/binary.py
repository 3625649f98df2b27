"""Compiled code: the symbols of an ELF file, and what NVIDIA's disassemblers say about a cubin."""

import functools
import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from lab.errors import Unavailable


class Symbol(NamedTuple):
    index: int  # in the symbol table, for nvdisasm -fun
    name: str
    value: int
    function: bool


@functools.lru_cache(maxsize=None)
def tool(name):
    """The path of cuobjdump or nvdisasm: the one that Triton brings, or else that of the CUDA toolkit on
    PATH."""
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        path = Path(triton.origin).parent / "backends/nvidia/bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if not found:
        raise Unavailable(
            f"{name} was not found: `pip install triton` brings it, and so does the CUDA toolkit"
        )
    return found


def run(name, *words, cwd=None):
    """What a tool of NVIDIA prints. Raises Unavailable if it cannot read the file."""
    done = subprocess.run([tool(name), *map(str, words)], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(
            f"{name} failed on {words[-1]}: {said[-1] if said else f'exit code {done.returncode}'}"
        )
    return done.stdout


def symbols(data):
    """The symbol table of a 64-bit little-endian ELF file (an extension module on Linux, or a cubin); [] if
    it has none."""
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    found = []
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for i in range(length // 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, offset + i * 24)
            text = data[names + name : data.index(b"\0", names + name)].decode()
            found.append(Symbol(i, text, value, info & 15 == 2))
    return found


def demangled(name):
    """A C++ name as the source writes it, without parameters. Without c++filt, the name is unchanged."""
    if not name.startswith("_Z") or not shutil.which("c++filt"):
        return name
    text = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True).stdout.strip()
    return text.replace("__nv_bfloat16", "bf16").replace("__half", "half").removeprefix("void ") or name


def usage(cubin, function):
    """The resources of a function in a cubin's file, as a dict: REG per thread; STACK, LOCAL and SHARED in
    bytes."""
    text = run("cuobjdump", "-res-usage", cubin)
    found = re.search(rf"Function {re.escape(function)}:\s*((?:[\w\[\]]+:\d+ ?)+)", text)
    if not found:
        raise Unavailable(f"{Path(cubin).name} has no function {function}")
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", found[1])}


def disassembly(cubin, function):
    """nvdisasm's text of one function, with the source lines that the compiler noted."""
    index = next(
        (s.index for s in symbols(Path(cubin).read_bytes()) if s.function and s.name == function), None
    )
    if index is None:
        raise Unavailable(f"{Path(cubin).name} has no function {function}")
    return run("nvdisasm", "-gi", "-c", "-fun", index, cubin)
