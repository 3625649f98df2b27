"""`lab check --exercise NAME`: checks whether the fault that was planted in a small kernel has been mended.

The kernels are cuda_src/exercises/NAME.cu and triton_kernels/exercises/NAME.py, with a question at the top;
the folder solutions beside them has a solution of each. CUDA kernels are compiled for the CPU by the C++
compiler. Their shared memory starts as NaN, and their threads run in a fixed order and in random ones; their
checks are in cuda_src/exercises/check. Triton kernels run in the interpreter, in a process of their own
(lab/worker.py) and with NaN around every tensor. Performance exercises count exactly how many lines or banks
of memory a warp touches; nothing is timed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.arena import Arena
from lab.errors import LabError, Unavailable, one_line
from lab.files import python_module
from lab.names import known
from lab.worker import Worker

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (None, 1, 2, 3, 4)  # LAB_HOST_SEED: the fixed order of threads, then random ones
FLAGS = ["-std=c++17", "-O1", "-pthread", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]


@dataclass(frozen=True)
class Exercise:
    name: str
    summary: str
    path: Path  # the file that the learner mends
    run: Callable  # (path, limit in seconds) -> what is wrong, or None

    @property
    def solution(self) -> Path:
        return self.path.parent / "solutions" / self.path.name


def check(name: str, path: Path | None = None, timeout: float = 60.0) -> str | None:
    """What is still wrong with the exercise (or with the file `path` in its place), or None if it is mended.

    timeout: seconds that a call of a kernel may take. Raises LabError for an unknown name and for a file that
    does not compile.
    """
    exercise = EXERCISES[known(name, list(EXERCISES), "exercise")]
    path = path or exercise.path
    if not path.exists():
        raise LabError(f"exercise {name}: {path} is not there")
    return exercise.run(path, timeout)


def main(name: str, timeout: float = 60.0) -> int:
    """Prints whether the exercise is mended; the name `list` prints all exercises. Returns the exit
    status."""
    if name == "list":
        for exercise in EXERCISES.values():
            print(f"{exercise.name:14} {exercise.summary}  ({exercise.path.relative_to(ROOT)})")
        return 0
    wrong = check(name, timeout=timeout)
    shown = EXERCISES[name].path.relative_to(ROOT)
    if wrong is None:
        print(f"{name}: mended")
        return 0
    print(f"{name}: not mended yet: {wrong}\n    the question is at the top of {shown}")
    return 1


# ---- CUDA: compiled for the CPU ----------------------------------------------------------------------------


def _cuda(path: Path, timeout: float) -> str | None:
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


# ---- Triton: interpreted -----------------------------------------------------------------------------------


def in_worker(spec: dict) -> Callable:
    """Returns a function that gives the function of a name in spec["file"], in a worker's process."""
    from triton_kernels.interpreter import launches_interpreted

    module = python_module(Path(spec["file"]))

    def function(name):
        def call(*args, out):
            with launches_interpreted():
                getattr(module, name)(*args, out)
            return out

        return call

    return function


def _triton(name: str, cases: Callable) -> Callable:
    """The `run` of an Exercise whose file has a function `name`, which takes tensors and the output.

    cases: yields (a description of the case, the tensors, the right output).
    """

    def run(path: Path, timeout: float) -> str | None:
        spec = {"module": __name__, "device": "cpu", "file": str(path), "what": str(path)}
        with Worker(spec, timeout) as worker:
            worker.start()
            for what, tensors, want in cases():
                wrong = _differs(worker.function(name), tensors, want)
                if wrong:
                    return f"{what}: {wrong}"
        return None

    return run


def _tail_mask():
    for rows, cols in ((3, 64), (4, 40), (2, 7)):
        # NaN follows x in memory, so that a read past its end spoils the mean.
        memory = torch.full((rows * cols + 64,), torch.nan)
        x = memory[: rows * cols].view(rows, cols).copy_(torch.arange(rows * cols).view(rows, cols) % 13)
        yield f"{rows} rows of {cols}", (x,), x.double().mean(1)


def _split_merge():
    generator = torch.Generator().manual_seed(0)
    for lengths, spread in (((8, 8), 0.0), ((8, 5, 3), 2.0), ((1, 16), 9.0)):
        scores = torch.randn(sum(lengths), generator=generator).double() * spread
        values = torch.randn(sum(lengths), 16, generator=generator).double()
        splits = list(zip(scores.split(lengths), values.split(lengths)))
        tops = torch.stack([s.max() for s, _ in splits])
        weights = [torch.exp(s - s.max()) for s, _ in splits]
        sums = torch.stack([w @ v for w, (_, v) in zip(weights, splits)])
        masses = torch.stack([w.sum() for w in weights])
        yield (
            f"splits of {', '.join(map(str, lengths))} tokens, largest scores "
            f"{', '.join(f'{t:.2f}' for t in tops)}",
            (sums.float(), tops.float(), masses.float()),
            torch.softmax(scores, 0) @ values,
        )


def _differs(function, tensors, want) -> str | None:
    """Calls function(*tensors, out) in a worker. Says where `out` differs from `want`, or what else went
    wrong; or None."""
    values = {str(i): t for i, t in enumerate(tensors)} | {"out": torch.full(want.shape, torch.nan)}
    arena = Arena(values, file=function.file)
    arena.remember()
    error = function.run(arena) or arena.damage({"out"})
    if error:
        return one_line(error)
    out = arena.values()["out"]
    bad = ~((out.double() - want).abs() <= 1e-4 * (1 + want.abs()))  # true for NaN as well
    if not bad.any():
        return None
    i = int(bad.nonzero()[0])
    return f"element {i} is {float(out[i]):.6g}, not {float(want[i]):.6g}"


def _exercises():
    cuda, triton = ROOT / "cuda_src" / "exercises", ROOT / "triton_kernels" / "exercises"
    return [
        Exercise(
            "tail_mask",
            "a row whose end is no multiple of the block",
            triton / "tail_mask.py",
            _triton("row_mean", _tail_mask),
        ),
        Exercise("barrier", "a tile in shared memory that is overwritten", cuda / "barrier.cu", _cuda),
        Exercise(
            "split_merge",
            "how the parts of a split softmax are merged",
            triton / "split_merge.py",
            _triton("merge", _split_merge),
        ),
        Exercise("empty_split", "a split without a token", cuda / "empty_split.cu", _cuda),
        Exercise("coalescing", "which thread reads which numbers", cuda / "coalescing.cu", _cuda),
        Exercise("bank_conflict", "a column of a tile in shared memory", cuda / "bank_conflict.cu", _cuda),
    ]


EXERCISES = {exercise.name: exercise for exercise in _exercises()}
