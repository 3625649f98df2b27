"""Builds the kernels' two extensions; the project's metadata is in pyproject.toml.

lab._host   the CUDA kernels for the CPU: cuda_src/*.cu and cuda_src/host/*.cpp by a C++ compiler. Always
            built.
lab._cuda   the same kernels for the GPU, by nvcc. Built where nvcc is found: on PATH, in CUDA_HOME or
            CUDA_PATH, in /usr/local/cuda, or in the pip packages of CUDA's compiler
            (site-packages/nvidia/*/bin).

    python3 setup.py build_ext --inplace          pip install -e . --no-build-isolation --no-deps

Environment:
    LAB_CUDA=0|1                        skip lab._cuda | fail when nvcc is missing
    LAB_CUDA_ARCH="80;90a;90+ptx"       GPU architectures; +ptx embeds PTX, for GPUs newer than the list
    LAB_HOST_GPU_SHAPES=0|1             lab._host with the launch shapes of a GPU, too, for tests (default: 0)
    LAB_HOST_SANITIZE=thread|address    build lab._host with a sanitizer (default: none)
    LAB_BUILD_JOBS=n                    compilers at a time (default: the cores this process may use)
    CXX                                 the C++ compiler (default: g++, else clang++, else c++)
    LAB_TRY="linear=/path/mine.cu"      build one module, lab._cuda with LAB_CUDA=1 and else lab._host, with
                                        this file in the place of cuda_src/linear.cu (`lab try`; give it a
                                        --build-lib of its own)
    LAB_TRY_SECONDS=n                   how long compiling that file may take (default: no limit)
    LAB_TRY_MEMORY=n                    how many bytes of memory that may take (default: no limit)

nvcc compiles a file that declares parts once for each of them (parts_of() says how it does).
Objects are kept in build/ and reused while neither their command nor the contents of a file they include have
changed.
Each extension carries the digests of the files that it was made of: lab/extension.py compares them with the
files there are when a backend loads it. In build/, too: build/cuda/ptxas.log (what ptxas said),
build/cuda/resources.json (registers and spills of every kernel), and the seconds that each file took
(*.seconds).
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "cuda_src"
BUILD = ROOT / "build"
DEFAULT_ARCHS = "80;90a;90+ptx"  # A100; H100 and H200 with their own instructions; PTX for what comes after
SANITIZERS = ("none", "thread", "address")
# Of -O2: host_module() says why.
SKIPPED_PASSES = """
    ivopts tree-dominator-opts tree-pta schedule-insns2 ipa-cp ipa-sra ipa-icf ipa-vrp ipa-bit-cp crossjumping
    tree-tail-merge store-merging isolate-erroneous-paths-dereference optimize-strlen caller-saves
    devirtualize optimize-sibling-calls tree-switch-conversion gcse
""".split()

# By the C++ compiler with -O1: they are as fast as with -O2 (a whole step within 3 %), and compiled in two
# thirds of the time.
LIGHTLY_OPTIMISED = re.compile("attention|decode_step")


@dataclass
class Unit:
    """One source file and the command that compiles it; the object's path and the dependency file are added
    to it."""

    source: Path
    command: list[str]
    name: str = ""
    own: bool = False  # of the file that is tried (LAB_TRY)
    part: str = ""  # LAB_PART, if it is a part of its file

    def __post_init__(self):
        self.name = self.name or self.source.name


@dataclass
class Module:
    """One extension: what to compile, how to link it, and what build_info() will say about it."""

    name: str
    directory: Path
    units: list[Unit]
    link: list[str]  # everything but the objects and the output
    facts: dict = field(default_factory=dict)


# ---- what is on this machine -------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The C++ compiler as a command; CXX may hold flags too."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in [chosen[0]] if chosen else ["g++", "clang++", "c++"]:
        if shutil.which(name):
            return [name, *chosen[1:]]
    raise SetupError("no C++ compiler: install g++ (Debian: apt-get install g++) or set CXX")


def find_nvcc() -> Path | None:
    """The first nvcc of: PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda, the pip packages."""
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path)] if on_path else []
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [Path(root, "bin/nvcc") for root in roots if root]
    for entry in sys.path:
        candidates += sorted(Path(entry or ".", "nvidia").glob("*/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def cuda_directories(nvcc: Path) -> tuple[list[Path], list[Path]]:
    """(include, library) directories that this nvcc may not know by itself: pip splits CUDA over several
    packages."""
    packages = nvcc.parent.parent.parent
    if packages.name != "nvidia":
        return [], []
    roots = sorted(path for path in packages.iterdir() if path.is_dir())
    return (
        [root / "include" for root in roots if (root / "include").is_dir()],
        [root / "lib" for root in roots if (root / "lib").is_dir()],
    )


def first_line(command: list[str], pattern: str = ".*") -> str:
    """The first line that `command` prints and that matches."""
    text = subprocess.run(command, capture_output=True, text=True).stdout
    return next((match[0] for line in text.splitlines() if (match := re.search(pattern, line))), "unknown")


def vector_flags() -> list[str]:
    """x86-64 vector instructions of this CPU: the emulated kernels run four times faster with them."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    except (OSError, TypeError):
        return []
    return ["-mavx2", "-mfma", "-mf16c"] if {"avx2", "fma", "f16c"} <= flags else []


def jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LAB_BUILD_JOBS", str(cores))
    if not text.isdigit() or int(text) < 1:
        raise SetupError(f"LAB_BUILD_JOBS={text!r}: give a number from 1 up")
    return int(text)


def choice(name: str, choices: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, default)
    if value not in choices:
        raise SetupError(f"{name}={value!r}: choose from {', '.join(choices)}")
    return value


# ---- the two modules ---------------------------------------------------------------------------------------


def kernels() -> list[Path]:
    """The attention ops and then the largest first: they take longest, and the others fill the other cores
    meanwhile."""
    return sorted(
        [*SOURCES.glob("*.cu"), *SOURCES.glob("ladder/*.cu")],
        key=lambda path: ("attention" not in path.name, -path.stat().st_size),
    )


def tried() -> tuple[Path, Path] | None:
    """(the kernel's file, the file in its place) of LAB_TRY."""
    op, _, path = os.environ.get("LAB_TRY", "").partition("=")
    return (SOURCES / f"{op}.cu", Path(path).resolve()) if op else None


def parts_of(source: Path) -> list[str]:
    """The template arguments of the functions that a kernel's file, or one that it includes, declares with
    `extern template` (CONTRIBUTING.md, "Kernels that take long to compile"); of most files none."""
    text = source.read_text(errors="replace") if source.exists() else ""
    for name in re.findall(r'^#include "([^"]+\.cu)"', text, re.M):
        included = next((path for path in (source.parent / name, SOURCES / name) if path.exists()), None)
        text += included.read_text() if included else ""
    return re.findall(r"^extern template void \w+<(.+)>\(", text, re.M)


def units_of(source: Path, command: list[str], name: str, in_parts: bool, own: bool = False) -> list[Unit]:
    """One unit for a kernel's file, or one for each of its parts."""
    parts = parts_of(source) if in_parts else []
    if not parts:
        return [Unit(source, command, name, own)]
    return [Unit(source, command, f"{name}.{part.replace(', ', '-')}", own, part) for part in parts]


def kernel_units(command: list[str], in_parts: bool) -> list[Unit]:
    """ladder/linear.cu and linear.cu have objects of different names, and so has the file that is tried.
    in_parts: compile a file that takes long in its parts."""
    replaced, own = tried() or (None, None)
    units = []
    if own:
        # First: of a function in a header, which other kernels have too, the linker takes the first. The
        # file may come with headers of its own.
        units += units_of(own, [*command, f"-I{SOURCES}"], f"try_{replaced.name}", in_parts, own=True)
    for path in kernels():
        if path != replaced:
            units += units_of(path, command, "_".join(path.relative_to(SOURCES).parts), in_parts)
    return units


def built_with_gpu_shapes() -> str:
    """LAB_HOST_GPU_SHAPES of the extension at hand, whose objects a file that is tried is linked with."""
    return "1" if any("gpu_shapes_" in link.read_text() for link in (BUILD / "host").glob("*.link")) else "0"


def bindings(cxx: list[str], name: str, flags: list[str]) -> Unit:
    """What Python calls, by pybind11: the same for both modules but for their name; one object per Python."""
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command = [
        *cxx,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        f"-DLAB_MODULE={name}",
        *includes,
        *flags,
    ]
    return Unit(SOURCES / "bindings.cpp", command, f"bindings.{sysconfig.get_config_var('SOABI')}")


def shared_library(cxx: list[str]) -> list[str]:
    if platform.system() == "Darwin":
        return [*cxx, "-bundle", "-undefined", "dynamic_lookup"]
    return [*cxx, "-shared"]


def host_module() -> Module:
    cxx = find_compiler()
    sanitizer = choice("LAB_HOST_SANITIZE", SANITIZERS, "none")
    instrument = (
        [] if sanitizer == "none" else ["-g", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}"]
    )
    # The race detector must not see how the scheduler switches threads: host/*.cpp tells it of each switch.
    scheduler = ["-g", "-DLAB_HOST_TSAN"] if sanitizer == "thread" else instrument
    common = [*cxx, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"]
    # -O3 takes twice as long to compile and decodes no faster; -O1 decodes at half the speed. This is -O2
    # without the passes that take time and whose absence showed in no decode time that was measured (fp32
    # norm_linear at SmolLM2's width: 190 to 196 us with and without them). VRP stays: without it fp32's
    # linear takes twice as long.
    clang = "clang" in first_line([*cxx, "--version"])  # has other passes, and refuses some of these names
    skipped = [] if clang else [f"-fno-{name}" for name in SKIPPED_PASSES]
    kernel_flags = [
        "-O2",
        "-ftree-slp-vectorize",
        *skipped,
        "-fno-strict-aliasing",
        "-fno-math-errno",
        "-fno-trapping-math",
        *vector_flags(),
        *instrument,
    ]
    if sanitizer == "thread":
        kernel_flags.append("-DLAB_HOST_TSAN")
    units = [bindings(cxx, "_host", ["-DLAB_HOST"])]
    # Objects with and without a GPU's shapes are kept side by side: `make test` and `make build` take turns.
    gpu_shapes = choice("LAB_HOST_GPU_SHAPES", ("0", "1"), built_with_gpu_shapes() if tried() else "0") == "1"
    kernels_for_cpu = kernel_units(
        [*common, *kernel_flags, f"-DLAB_HOST_GPU_SHAPES={int(gpu_shapes)}", "-x", "c++"], in_parts=False
    )
    for unit in kernels_for_cpu:
        unit.name = f"gpu_shapes_{unit.name}" if gpu_shapes else unit.name
        if LIGHTLY_OPTIMISED.search(unit.source.name):
            unit.command = [*unit.command, "-O1"]
    units += kernels_for_cpu
    units += [Unit(path, [*common, "-O2", *scheduler]) for path in sorted((SOURCES / "host").glob("*.cpp"))]
    link = [*shared_library(cxx), "-pthread", *([] if sanitizer == "none" else [f"-fsanitize={sanitizer}"])]
    facts = {
        "compiler": first_line([*cxx, "--version"]),
        "archs": [platform.machine()],
        "flags": kernel_flags,
        "sanitizer": sanitizer,
        "gpu_shapes": gpu_shapes,
    }
    directory = BUILD / ("host" if sanitizer == "none" else f"host-{sanitizer}")
    return Module("lab._host", directory, units, link, facts)


def gencode(arch: str) -> str:
    """80 or 90a: machine code; 90+ptx: PTX."""
    match = re.fullmatch(r"(\d{2,3}[af]?)(\+ptx)?", arch.strip().lower())
    if not match:
        raise SetupError(f"LAB_CUDA_ARCH: {arch!r} is no architecture; write for example {DEFAULT_ARCHS!r}")
    number, ptx = match.groups()
    return f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"


def cuda_module(nvcc: Path) -> Module:
    archs = re.split("[;,]", os.environ.get("LAB_CUDA_ARCH", DEFAULT_ARCHS).strip(";,"))
    includes, libraries = cuda_directories(nvcc)
    hopper = int(any("arch=compute_90a," in gencode(arch) for arch in archs))  # wgmma exists there alone
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-DLAB_SM90A={hopper}", *map(gencode, archs)]
    command = [str(nvcc), *flags, "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [f"-I{path}" for path in includes]
    units = [bindings(find_compiler(), "_cuda", [])]
    units += kernel_units([*command, "-x", "cu"], in_parts=True)
    # The static runtime loads the driver when the first call needs it, so that importing needs no GPU.
    link = [str(nvcc), "-shared", "-cudart=static", *(f"-L{path}" for path in libraries)]
    facts = {
        "compiler": first_line([str(nvcc), "--version"], r"release.*"),
        "nvcc": str(nvcc),
        "archs": archs,
        "flags": flags,
        "host_compiler": first_line([*find_compiler(), "--version"]),
        "sanitizer": "none",
    }
    return Module("lab._cuda", BUILD / "cuda", units, link, facts)


def modules() -> dict[str, Module]:
    found = {"lab._host": host_module()}
    wanted = choice("LAB_CUDA", ("0", "1", "auto"), "auto")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc:
        found["lab._cuda"] = cuda_module(nvcc)
    elif wanted == "1":
        raise SetupError(
            "LAB_CUDA=1, but there is no nvcc on PATH, in CUDA_HOME, CUDA_PATH, /usr/local/cuda or "
            "site-packages/nvidia/*/bin: install the CUDA toolkit, or unset LAB_CUDA"
        )
    if tried():
        found = {name: found[name] for name in ("lab._cuda" if wanted == "1" else "lab._host",)}
    return found


# ---- compiling what has changed ----------------------------------------------------------------------------


def digest(path: Path) -> str:
    """16 hexadecimal digits that stand for a file's contents; lab/extension.py makes the same."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def made_of(target: Path) -> dict:
    """What an object was made of: {"command": ..., "inputs": {file: digest}}; empty where that is not
    known."""
    try:
        record = json.loads(target.with_suffix(".made").read_text())
        return record if target.exists() else {}
    except (OSError, ValueError):
        return {}


def shown(path: Path) -> str:
    """A file's path, relative to ROOT if it is of the project."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def command_of(unit: Unit) -> str:
    """What compiles a unit, in one line; a copy of the project has the same."""
    return shlex.join([*unit.command, "-c", shown(unit.source)])


def current(target: Path, unit: Unit) -> bool:
    """True if `target` was made by the command of `unit` out of files that still have the same contents."""
    record = made_of(target)
    try:
        return record.get("command") == command_of(unit) and all(
            digest(ROOT / name) == made for name, made in record["inputs"].items()
        )
    except OSError:
        return False


def inputs(unit: Unit, depfile: Path, started: float) -> dict[str, str]:
    """{file: digest} of all that the compiler read, by its dependency file; those of the project relative to
    ROOT, so that a copy of the project with its objects goes by its own files."""
    found = {}
    for name in shlex.split(depfile.read_text().replace("\\\n", " ").partition(": ")[2]):
        path = Path(name).resolve()
        if path.stat().st_mtime > started:  # which of its contents the compiler read is not known
            raise CompileError(f"{name} changed while {unit.name} was compiled: build again")
        found[shown(path)] = digest(path)
    return found


def beside(path: Path) -> Path:
    """Where to write what will be renamed to `path`; builds that run at the same time do not meet there."""
    return path.with_name(f"new-{os.getpid()}-{path.name}")


def write(path: Path, text: str) -> None:
    """Writes beside and renames; a file that already says this keeps its time."""
    if path.exists() and path.read_text() == text:
        return
    new = beside(path)
    new.write_text(text)
    new.replace(path)


def run(command: list[str], what: str, limited: bool = False) -> str:
    """Runs a compiler and returns what it printed; a failure shows that and then one line. limited: by
    LAB_TRY_SECONDS and LAB_TRY_MEMORY."""
    try:
        status, said = within_limits(command) if limited else unlimited(command)
    except OSError as error:
        raise CompileError(f"{what}: cannot run {command[0]}: {error}") from None
    if status is None:
        raise CompileError(f"{what}: compiling it {said}")
    if status:
        sys.stderr.write(f"{shlex.join(command)}\n{said}")
        name = Path(command[0]).name
        raise CompileError(f"{what}: {name} failed with exit code {status}; its output is above")
    return said


def unlimited(command: list[str]) -> tuple[int, str]:
    """(exit status, output)"""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def within_limits(command: list[str]) -> tuple[int | None, str]:
    """The same; at a limit (None, what the command took)."""
    from lab.processes import OverLimit, run_group  # here, for a build that pip isolates cannot import lab

    seconds, memory = (os.environ.get(f"LAB_TRY_{what}") for what in ("SECONDS", "MEMORY"))
    try:
        return run_group(
            command, timeout=float(seconds) if seconds else None, memory=int(memory) if memory else None
        )
    except OverLimit as over:
        return None, str(over)


def source_of_part(target: Path) -> Path:
    """The file that setup.py writes for the object of a part. It is not enough to define LAB_PART for the
    compiler: cuobjdump, which `lab inspect` asks, calls machine code by the name of what was compiled."""
    return target.with_suffix(".cu")


def compile_unit(unit: Unit, directory: Path) -> tuple[Path, bool]:
    """(object, whether it had to be compiled)."""
    target = directory / f"{unit.name}.o"
    if current(target, unit):
        return target, False
    source = unit.source
    if unit.part:
        source = source_of_part(target)
        included = os.path.relpath(unit.source, directory.resolve())
        write(source, f'#define LAB_PART {unit.part}\n#include "{included}"\n')
    new, depfile, start = beside(target), target.with_suffix(".d"), time.time()
    what = shown(unit.source) + (f" <{unit.part}>" if unit.part else "")
    output = run(
        [*unit.command, "-c", str(source), "-MMD", "-MF", str(depfile), "-o", str(new)],
        what,
        limited=unit.own,
    )
    record = {"command": command_of(unit), "inputs": inputs(unit, depfile, start)}
    write(target.with_suffix(".log"), output)
    target.with_suffix(".made").unlink(missing_ok=True)  # until the object is there
    new.replace(target)
    write(target.with_suffix(".made"), json.dumps(record, indent=1))
    seconds = f"{time.time() - start:.1f}"
    write(target.with_suffix(".seconds"), seconds)
    # Threads print here: with its end in the same write, no other's line comes into the middle of this one.
    print(f"  {Path(unit.command[0]).name} {what}  {seconds} s\n", end="", flush=True)
    return target, True


# What is compiled, so that a file that was added later is noticed; relative to ROOT.
PATTERNS = {
    "lab._host": ["cuda_src/*.cu", "cuda_src/ladder/*.cu", "cuda_src/host/*.cpp"],
    "lab._cuda": ["cuda_src/*.cu", "cuda_src/ladder/*.cu"],
}


def folder_of(unit: Unit, module: Module, folder: Path) -> Path:
    """Where a unit's object is kept. Those of a file that is tried are not shared: two that are tried at the
    same time must not link each other's."""
    return folder if unit.own else module.directory


def sources(module: Module, folder: Path) -> dict[str, str]:
    """{file: digest} of the project's files that went into the objects of a module, and of this file."""
    found = {"setup.py": digest(Path(__file__))}
    for unit in module.units:
        target = folder_of(unit, module, folder) / f"{unit.name}.o"
        found |= made_of(target)["inputs"]
        found.pop(shown(source_of_part(target).resolve()), None)
    return {name: made for name, made in sorted(found.items()) if not Path(name).is_absolute()}


def facts_unit(module: Module, folder: Path) -> Unit:
    """What build_info() says, as a source file in `folder`."""
    facts = folder / "build_facts.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**module.facts, "sources": sources(module, folder), "patterns": PATTERNS[module.name]})
    write(facts, f'namespace lab {{\nconst char* build_facts() {{ return R"json({text})json"; }}\n}}\n')
    return Unit(facts, [*find_compiler(), "-O1", "-fPIC", "-fvisibility=hidden"])


def build(module: Module, output: Path) -> None:
    """Compiles what has changed, and links if anything did."""
    folder = output.parent if tried() else module.directory  # one of its own for each file that is tried
    for directory in (module.directory, folder):
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPool(jobs()) as pool:
        made = pool.map(
            lambda unit: compile_unit(unit, folder_of(unit, module, folder)), module.units, chunksize=1
        )
    made.append(compile_unit(facts_unit(module, folder), folder))
    objects = [str(path) for path, _ in made]
    compiled = sum(fresh for _, fresh in made)
    library = output.with_name(f"linked-{output.name}") if tried() else module.directory / output.name
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [*module.link, *objects]
    record = library.with_suffix(".link")
    linked = library.exists() and record.exists() and record.read_text() == shlex.join(command)
    # An object may be newer though nothing was compiled: a build that was interrupted before it linked.
    if compiled or not linked or any(library.stat().st_mtime < path.stat().st_mtime for path, _ in made):
        new = beside(library)
        run([*command, "-o", str(new)], module.name)
        new.replace(library)
        write(record, shlex.join(command))
    output.parent.mkdir(parents=True, exist_ok=True)
    new = beside(output)
    shutil.copy2(library, new)
    new.replace(output)
    print(f"{module.name}: {compiled} of {len(made)} files compiled", flush=True)


# ---- what ptxas said ---------------------------------------------------------------------------------------

PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def save_resources(module: Module) -> None:
    """Registers and spills of every kernel, from the logs of all objects, those of earlier runs too."""
    logs = {
        unit.name: module.directory / f"{unit.name}.log"
        for unit in module.units
        if unit.source.suffix == ".cu"
    }
    rows, text = [], []
    for source, log in sorted(logs.items()):
        said = log.read_text()
        text.append(f"==== {source}\n{said}")
        for match in PTXAS.finditer(said):
            row = {key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()}
            rows.append({"source": source, **row})
    write(module.directory / "ptxas.log", "".join(text))
    write(module.directory / "resources.json", json.dumps(rows, indent=1))
    for row in rows:
        if row["spill_stores"] or row["spill_loads"]:
            print(
                f"  note: {row['source']}: {row['kernel']} spills {row['spill_stores']} bytes on "
                f"{row['arch']}"
            )


class BuildKernels(build_ext):
    def build_extension(self, ext):
        module = MODULES[ext.name]
        build(module, Path(self.get_ext_fullpath(ext.name)))
        if ext.name == "lab._cuda" and not tried():
            save_resources(module)


try:
    MODULES = modules()
except SetupError as error:
    sys.exit(f"setup.py: {error}")
if "lab._cuda" not in MODULES and "build_ext" in sys.argv and not tried():
    print(
        "lab._cuda: not built: "
        + (
            "LAB_CUDA=0, as make says where there is no GPU; LAB_CUDA=1 builds it"
            if os.environ.get("LAB_CUDA") == "0"
            else "no nvcc found"
        )
    )

setup(
    ext_modules=[
        Extension(name, [os.path.relpath(unit.source, ROOT) for unit in module.units])
        for name, module in MODULES.items()
    ],
    cmdclass={"build_ext": BuildKernels},
)
