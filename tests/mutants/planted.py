"""Plants a fault in a copy of the CUDA sources, and builds the host extension with it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lab import dispatch
from lab.backends.cuda import Backend
from mutants.mutant import Mutant, mutate

ROOT = Path(__file__).resolve().parent.parent.parent
# Calls after which something may be read or written that could not be before.
STATEMENT = re.compile(
    r"\b(?:host::)?(?P<name>__syncthreads|__syncwarp|__threadfence|named_barrier|cluster_sync"
    r"|ring_sync|pdl_wait|mbarrier_wait|mbarrier_fence_init|wgmma_publish|wgmma_begin|wgmma_wait"
    r"|cp_async_wait)(?:<[^;()]*>)?\([^;{}]*\);"
)
FUNCTION = re.compile(
    r"LAB_DEVICE [^(]*?(?P<device>\w+)\(|(?P<kernel>\w+_kernel)\((?=const|Problem|StepArguments)"
)


def sources() -> list[Path]:
    """The kernels of the ops and of the ladders, and the headers that they share."""
    folder = ROOT / "cuda_src"
    return sorted(
        [*folder.glob("*.cu"), *folder.glob("*.cuh"), *folder.glob("core/*.cuh"), *folder.glob("ladder/*.cu")]
    )


def removals(path: Path, text: str | None = None) -> list[Mutant]:
    """A mutant for each barrier, fence and wait of a file, which leaves that one out."""
    lines = (path.read_text() if text is None else text).splitlines(keepends=True)
    found, function = [], ""
    for i, line in enumerate(lines):
        code = line.partition("//")[0]
        if match := FUNCTION.search(code):
            function = match["device"] or match["kernel"]
        match = STATEMENT.search(code)
        if match and not line.lstrip().startswith(("inline", "asm")):
            found.append((i, function, match))
    names = [(function, match["name"]) for _, function, match in found]
    mutants = []
    for n, (i, function, match) in enumerate(found):
        first = last = i  # as many lines as make the text unique
        whole = "".join(lines)
        while whole.count("".join(lines[first : last + 1])) > 1:
            first, last = max(first - 1, 0), min(last + 1, len(lines) - 1)
        before = "".join(lines[first:i]) + lines[i][: match.start()]
        after = lines[i][match.end() - 1 :] + "".join(lines[i + 1 : last + 1])
        number, of = names[: n + 1].count(names[n]), names.count(names[n])
        which = f", {number} of {of}" if of > 1 else ""
        mutants.append(
            Mutant(
                str(path.relative_to(ROOT)),
                "".join(lines[first : last + 1]),
                before + after,
                f"{function}: without {match['name']}{which}",
            )
        )
    return mutants


def kernels_with(mutant: Mutant) -> list[str]:
    """The kernels (`linear`, `ladder/linear`) that run what a mutant changes, the quickest to compile first:
    those that include its file and, of these, the ones that name the changed function elsewhere, if any
    do."""
    folder, changed = ROOT / "cuda_src", (ROOT / mutant.file).resolve()
    texts = {path.resolve(): path.read_text() for path in sources()}
    function = re.compile(rf"\b{mutant.why.partition(':')[0]}\b")

    def closure(path, seen):
        if path in texts and path not in seen:
            seen.add(path)
            for name in re.findall(r'#include "(\S+)"', texts[path]):
                closure((path.parent / name).resolve(), seen)
        return seen

    parts = {path: closure(path, set()) for path in texts if path.suffix == ".cu" and path.stem != "stream"}
    found = [path for path, files in parts.items() if changed in files]
    named = [path for path in found if any(function.search(texts[file]) for file in parts[path] - {changed})]
    chosen = sorted(named or found, key=lambda path: path.stat().st_size)
    return [str(path.relative_to(folder).with_suffix("")) for path in chosen]


def build(
    mutant: Mutant | None, kernel: str, folder: Path, environment: dict[str, str] | None = None
) -> Path:
    """The host extension's file with `kernel` compiled from sources that hold the fault, or none
    (mutant=None); the other objects are those at hand. folder: an empty one."""
    copy = folder / "cuda_src"
    shutil.copytree(ROOT / "cuda_src", copy, ignore=shutil.ignore_patterns("exercises", "tuned"))
    if mutant:
        changed = folder / mutant.file
        changed.write_text(mutate(changed.read_text(), mutant))
    environment = {
        **os.environ,
        **(environment or {}),
        "LAB_CUDA": "0",
        "LAB_TRY": f"{kernel}={copy / kernel}.cu",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", str(folder / "lib")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return max((folder / "lib/lab").glob("_host.*"), key=lambda file: file.stat().st_mtime_ns)


def load(file: Path):
    """The extension in a file, as a module of its own beside lab._host."""
    spec = importlib.util.spec_from_file_location(f"{file.parent}._host", file)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def bind(op, extension):
    """ops.<op> with the CUDA kernels of an extension."""
    return dispatch.bind(op, Backend(torch.device("cpu"), extension), "cpu")
