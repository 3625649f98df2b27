"""The fairness card of a comparison: how much effort went into each of the two kernels, and what came of it.

A comparison says little if one kernel was tuned for a week and the other written in an hour. For one call of
an op, the card states for each language: how many configurations the launcher can choose from, how many the
tuner measured, the resources of the launched kernel, the lines of code of its file, and the seconds that its
compiler takes.
"""

import ast
import datetime
import re
import secrets
import tokenize
from pathlib import Path

from lab.errors import LabError
from lab.inspect import cuda_code, triton_code
from lab.inspect import gpu as gpus
from lab.inspect.call import arguments, as_json
from lab.records import schema
from lab.tune import tuned

ROOT = Path(__file__).resolve().parents[2]
# Files that every op uses. Their lines count for none.
BASE = {"common.cuh", "sizes.h", "trace.h", "launchers.h", "common.py", "interpreter.py"}


def fairness(op, dtype, sizes, arch, run=None):
    """(records, errors): a Fairness record for each kernel in each language, and a line for each language
    that has none.

    op: a contract of lab.ops. dtype: "bf16" ... sizes: keyword arguments of its `inputs`. arch: "sm_90a" or
    "sm_80". run: the id of the bench run that the card belongs to; None makes a new one.
    """
    gpu, run = gpus.find(arch), run or new_run()
    args = arguments(op, dtype, sizes)
    rows, errors = [], []
    for backend, code in (("cuda", cuda_code), ("triton", triton_code)):
        try:
            kernels, launches = code.kernels(op, args, gpu), code.launches(op, args, gpu)
            path = (
                ROOT / ("cuda_src" if backend == "cuda" else "triton_kernels") / (op.name + SUFFIX[backend])
            )
            own, shared = code_lines(path)
            for kernel, launch in zip(kernels, launches, strict=True):
                if backend == "cuda":
                    choices, seconds = cuda_code.instantiations(op, launch, dtype, gpu), built_in(path)
                else:
                    choices = triton_code.configurations(op, gpu)
                    seconds = triton_code.compile_seconds(launch, gpu)
                rows.append(
                    schema.Fairness(
                        run=run,
                        op=op.name,
                        backend=backend,
                        dtype=dtype,
                        arch=gpu.arch,
                        shape=as_json(sizes),
                        kernel=kernel.name,
                        configurations=choices,
                        tried=tried(backend, op, gpu),
                        registers=kernel.registers,
                        spill_bytes=kernel.spills,
                        shared_bytes=kernel.shared_static + kernel.shared_dynamic,
                        threads=kernel.threads,
                        occupancy=kernel.occupancy,
                        instructions=kernel.mix["all"],
                        mix={name: count for name, count in kernel.mix.items() if count and name != "all"},
                        code_lines=own,
                        shared_lines=shared,
                        compile_s=seconds,
                    )
                )
        except LabError as error:
            errors.append(f"{op.name} {dtype} {backend}: {error}")
    return rows, errors


def tried(backend, op, gpu):
    """How many settings `lab tune` measured for the op on this architecture, over all shapes and dtypes."""
    return sum(
        e.get("tried", 0) for e in tuned.read(tuned.path_of(backend, gpu.triton)) if e["op"] == op.name
    )


SUFFIX = {"cuda": ".cu", "triton": ".py"}


def new_run():
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    return f"{stamp}-{secrets.token_hex(2)}"


def built_in(source):
    """How many seconds nvcc took for the file in its last build, with all its parts, instantiations and
    architectures; None if that is unknown."""
    folder = ROOT / "build/cuda"
    parts = sorted(folder.glob(f"{source.name}.*.seconds")) or [folder / f"{source.name}.seconds"]
    try:
        return sum(float(part.read_text()) for part in parts)
    except (OSError, ValueError):
        return None


def code_lines(path):
    """(lines of code of the file, lines of code of the project's files that it includes or imports), without
    blank lines, comments and docstrings. The files in BASE count for neither."""
    files, todo = [], [path.resolve()]
    while todo:
        file = todo.pop()
        if file not in files and file.is_file():
            files.append(file)
            todo += _taken_in(file)
    own, *others = [len(_python(f) if f.suffix == ".py" else _cpp(f)) for f in files]
    return own, sum(others)


def _taken_in(file):
    text = file.read_text()
    if file.suffix == ".py":
        names = re.findall(r"^\s*from triton_kernels\.([\w.]+) import", text, re.M)
        for line in re.findall(r"^\s*from triton_kernels import (.+)$", text, re.M):
            names += [name.strip() for name in line.split(",")]
        package = file.parent.parent if file.parent.name == "core" else file.parent
        found = [package / (name.replace(".", "/") + ".py") for name in names]
    else:
        found = [(file.parent / name).resolve() for name in re.findall(r'^#include "([^"]+)"', text, re.M)]
    return [path for path in found if path.name not in BASE and path.parent.name not in ("host", "launchers")]


def _cpp(file):
    """The numbers of the lines that hold C++ code."""
    # Blanks the comments. Strings are matched too, and kept, because they may contain //.
    blank = lambda m: "\n" * m[0].count("\n") if m[0].startswith("/") else m[0]
    text = re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, file.read_text(), flags=re.S)
    return [i for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _python(file):
    """The numbers of the lines that hold Python code."""
    skip = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    with open(file, "rb") as f:
        held = {
            n
            for t in tokenize.tokenize(f.readline)
            if t.type not in skip
            for n in range(t.start[0], t.end[0] + 1)
        }
    for node in ast.walk(ast.parse(file.read_text())):  # docstrings
        if (
            isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            held -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sorted(held)
