"""Checks a CUDA exercise without a GPU: cuda_src/exercises/check/NAME.cu includes the learner's file, and
both are compiled for the CPU into one program.

Shared memory starts as NaN, and threads run in a fixed order and in random ones. Checks of performance count
how many lines or banks of memory a warp touches (cuda_src/exercises/watch.cuh); nothing is timed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lab.errors import LabError, Unavailable

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (None, 1, 2, 3, 4)  # LAB_HOST_SEED: the fixed order of threads, then random ones
FLAGS = ["-std=c++17", "-O1", "-pthread", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]


def check(path: Path, timeout: float) -> str | None:
    """What is still wrong with the kernel in `path`, or None. timeout: seconds that a run may take.

    Raises LabError for a file that does not compile, Unavailable without a C++ compiler.
    """
    program = _build(path)
    try:
        for seed in SEEDS:
            environment = {k: v for k, v in os.environ.items() if not k.startswith("LAB_HOST_")}
            if seed is not None:
                environment["LAB_HOST_SEED"] = str(seed)
            done = subprocess.run(
                [program], env=environment, capture_output=True, errors="replace", timeout=timeout
            )
            if done.returncode:
                said = (done.stdout + done.stderr).strip()
                said = said or f"the program ended with exit code {done.returncode}"
                order = "the fixed order" if seed is None else f"random order {seed}"
                return f"{said} (threads in {order})"
    except subprocess.TimeoutExpired:
        return f"the kernel did not end within {timeout:g} s (--timeout)"
    finally:
        program.unlink(missing_ok=True)
    return None


def _build(path: Path) -> Path:
    """Compiles the check of an exercise with the kernel in `path` into a program that only this process
    uses."""
    cxx, folder, source = _compiler(), ROOT / "build" / "exercises", ROOT / "cuda_src"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [_host_object(cxx, file, folder) for file in sorted((source / "host").glob("*.cpp"))]
    program = folder / f"{path.stem}-{os.getpid()}"
    _compile(
        [
            *cxx,
            *FLAGS,
            f"-I{source}",
            f"-I{source / 'exercises'}",
            f'-DEXERCISE="{path.resolve()}"',
            "-x",
            "c++",
            str(source / "exercises" / "check" / path.name),
            "-x",
            "none",
            *map(str, objects),
            "-o",
            str(program),
        ],
        path,
    )
    return program


def _host_object(cxx, source: Path, folder: Path) -> Path:
    """The object file of a source of the host layer, which every program links. It is compiled again only
    after a file of that layer changed."""
    target = folder / f"{source.stem}.o"
    newest = max(file.stat().st_mtime for file in source.parent.iterdir())
    if not target.exists() or target.stat().st_mtime < newest:
        new = target.with_name(f"new-{os.getpid()}-{target.name}")
        _compile([*cxx, *FLAGS, "-c", str(source), "-o", str(new)], source)
        new.replace(target)
    return target


def _compile(command, path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise LabError(f"{path} does not compile; the compiler's messages are above")


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in [chosen[0]] if chosen else ["g++", "clang++", "c++"]:
        if shutil.which(name):
            return [name, *chosen[1:]]
    raise Unavailable("exercises in CUDA need a C++ compiler: install g++ or set CXX")
