"""Builds a solution in CUDA with a binding by torch: an extension in the process of whose module the entry
point is a function.

For a GPU torch.utils.cpp_extension builds it, as flashinfer-bench lets it. For a CPU the C++ compiler builds
it with this repository's emulation of CUDA (cuda_src/host), which has no kernel<<<...>>>.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from lab import extension
from lab.errors import LabError, Unavailable, named
from lab.flashinfer_format.schema import Solution
from lab.judge.kernel_file import ROOT, for_the_cpu
from lab.processes import OverLimit, run_group

COMPILED = (".cu", ".cpp", ".cc", ".cxx", ".c")  # what flashinfer-bench compiles; the rest is included
# Builds only: the module is imported in the judge's process, which has limits.
LOAD = """
import sys
from torch.utils import cpp_extension
cpp_extension._import_module_from_library = lambda *_: None
name, folder, *sources = sys.argv[1:]
cpp_extension.load(name, sources, extra_include_paths=[folder], build_directory=folder, with_cuda=True)
"""


def build(solution: Solution, folder: Path, device: str, timeout: float, memory: int | None = None) -> Path:
    """Builds the sources that lie in `folder`, whose name is the module's; returns the extension's path.

    Raises LabError for sources that do not compile within `timeout` seconds and `memory` bytes (of all
    compilers together), and Unavailable for those that only a GPU's compiler takes.
    """
    sources = [folder / source.path for source in solution.sources if source.path.endswith(COMPILED)]
    built = folder / f"{folder.name}.so"
    # Tools that pip installed beside this Python, as ninja, are on no PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if device == "cuda":
        for tool in ("ninja", "nvcc"):
            if not shutil.which(tool, path=path):
                raise Unavailable(f"torch builds it with {tool}, which is not installed")
        command = [sys.executable, "-c", LOAD, folder.name, str(folder), *map(str, sources)]
    else:
        command = for_host(sources, folder, built)
    try:
        status, said = run_group(command, {**os.environ, "PATH": path}, timeout, memory, ROOT)
    except OverLimit as over:
        raise LabError(f"compiling its sources {over}") from None
    if built.exists() and status == 0:
        return built
    lines = [line.replace(f"{folder}/", "") for line in said.splitlines()]
    # A compiler's line: torch's traceback, which comes before it, has CalledProcessError.
    seen = next((line for line in lines if re.search(r"\berror\b", line)), lines[-1] if lines else "no word")
    advice = [for_the_cpu(source, said, device) for source in sources if source.suffix == ".cu"]
    if device == "cpu":
        why = next(filter(None, advice), named(seen))
        raise Unavailable(f"its CUDA does not compile for the CPU, judge it on a GPU: {why}")
    raise LabError(f"its sources do not compile: {named(seen)}")


def for_host(sources: list[Path], folder: Path, built: Path) -> list[str]:
    """The command that builds an extension for the CPU, with flags and emulation of lab._host."""
    from torch.utils import cpp_extension

    _host = extension.load("_host")
    emulation = sorted((ROOT / "cuda_src/host").glob("*.cpp"))
    objects = [ROOT / "build/host" / f"{source.name}.o" for source in emulation]
    # The second: our kernels in core/ name the emulation as ../host/, and their copies come without it.
    ours = ROOT / "cuda_src", ROOT / "cuda_src/core"
    includes = [folder, *ours, *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = cpp_extension.library_paths()
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared", "-DLAB_HOST"]
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        *flags,
        *_host.build_info()["flags"],
        f"-DTORCH_EXTENSION_NAME={folder.name}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        *(f"-I{path}" for path in includes),
        *(str(made if made.exists() else source) for made, source in zip(objects, emulation, strict=True)),
        "-x",
        "c++",
        *map(str, sources),
        "-x",
        "none",
        *(f"-L{path}" for path in libraries),
        *(f"-Wl,-rpath,{path}" for path in libraries),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        "-o",
        str(built),
    ]
