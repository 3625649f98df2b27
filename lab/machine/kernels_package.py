"""`make kernels-package`: the kernels as two folders in the layout of Hugging Face's package `kernels`.

The one in Triton has what hub/ holds, and in torch-ext the modules of this repository that an op needs. They
are found by following imports, so a new op needs nothing more. Such a package is loaded from any place and
under any name: every import of `lab` and `triton_kernels` in it is made relative. The folder build/ holds the
same once more with metadata, for GPUs and for CPUs, where kernels are interpreted: it can be loaded as it is.

The one in CUDA has the same modules, the sources of cuda_src, and a binding that registers the launchers
with torch (hub/cuda). Hugging Face's kernel-builder compiles it, for each version of torch and of CUDA; until
then it has no folder build/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from lab.errors import LabError, one_line
from lab.own_modules import included, reached, relative

ROOT = Path(__file__).resolve().parent.parent.parent
HUB, NAME = ROOT / "hub", "decode_kernel_lab"
ROOTS = ("lab.torch_ops", "lab.backends.torch")
SOURCES, CUDA = ROOT / "cuda_src", "decode_kernel_lab_cuda"
ARCHITECTURES = ("8.0", "9.0a")  # of A100 and H100, as setup.py has them
BACKENDS = ("cpu", "cuda")  # as hub/build.toml has them


def needed(language: str) -> list[Path]:
    """The modules that ops in a language need, relative to the repository."""
    contracts = [f"lab.ops.{path.stem}" for path in (ROOT / "lab/ops").glob("[!_]*.py")]
    return sorted(reached([*ROOTS, f"lab.backends.{language}", *contracts], triton=language == "triton"))


def write_modules(folder: Path, language: str) -> None:
    """The Python package, complete, into a new folder."""
    shutil.copytree(HUB / "torch-ext" / NAME, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in needed(language):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(relative(path))
    (folder / "lab/__init__.py").write_text('"""What the ops need of the decode kernel lab."""\n')
    tuned = "triton_kernels/tuned" if language == "triton" else "cuda_src/tuned"
    shutil.copytree(ROOT / tuned, folder / tuned)


def launchers() -> dict[str, tuple[str, ...]]:
    """{launcher of an op: the fields of its struct}, as cuda_src/bindings.cpp lists them."""
    contracts = {path.stem for path in (ROOT / "lab/ops").glob("[!_]*.py")}
    found = re.findall(r"\bOP\((\w+),([^)]*)\);", (SOURCES / "bindings.cpp").read_text())
    return {name: tuple(fields.replace(",", " ").split()) for name, fields in found if name in contracts}


def write_cuda(new: Path) -> None:
    """What kernel-builder compiles, into a new folder: cuda_src, torch-ext and build.toml."""
    modules, names = new / "torch-ext" / CUDA, launchers()
    write_modules(modules, "cuda")
    entry = modules / "__init__.py"
    entry.write_text(
        entry.read_text().replace("in Triton:", "in CUDA:").replace('use("triton")', 'use("cuda")')
    )
    shutil.copy(HUB / "cuda/extension.py", modules / "lab/extension.py")
    fields = "".join(f"    {name!r}: {fields},\n" for name, fields in names.items())
    (modules / "lab/launchers.py").write_text(
        f'"""The fields of each launcher."""\n\nFIELDS = {{\n{fields}}}\n'
    )
    shutil.copy(HUB / "cuda/torch_binding.cpp", new / "torch-ext")
    listed = "".join(f"OP({name}, {', '.join(fields)});\n" for name, fields in names.items())
    (new / "torch-ext/launcher_list.h").write_text(listed)
    kernels = [SOURCES / f"{name}.cu" for name in names]
    files = included([*kernels, SOURCES / "settings_table.h", SOURCES / "groups.h"])
    for path in files:
        target = new / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    sources = sorted(path.relative_to(ROOT).as_posix() for path in files)
    (new / "build.toml").write_text(build_toml(sources))
    for name in ("LICENSE", "hub/cuda/README.md"):
        shutil.copy(ROOT / name, new)
    shutil.copytree(HUB / "tests", new / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def build_toml(sources: list[str]) -> str:
    """For kernel-builder: what is compiled, and how."""

    def array(values) -> str:
        return "[\n" + "".join(f"  {json.dumps(value)},\n" for value in values) + "]"

    return f"""\
[general]
name = "{CUDA.replace("_", "-")}"
version = 1
license = "Apache-2.0"
backends = ["cuda"]

[torch]
include = ["cuda_src", "torch-ext"]
pyext = ["py", "json"]
src = {array(["torch-ext/torch_binding.cpp", "torch-ext/launcher_list.h"])}

[kernel.decode]
backend = "cuda"
cuda-capabilities = {array(ARCHITECTURES)}
cuda-flags = ["-O3", "-DLAB_SM90A=1"]
depends = ["torch"]
include = ["cuda_src"]
src = {array(sources)}
"""


def digest(folder: Path) -> str:
    """Of all files of a folder, with their names: a name for what is in it."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def write_triton(new: Path) -> None:
    """The package without compiled code, into a new folder."""
    shutil.copytree(HUB, new, ignore=shutil.ignore_patterns("__pycache__", NAME, "cuda"))
    shutil.copy(ROOT / "LICENSE", new)
    modules = new / "torch-ext" / NAME
    write_modules(modules, "triton")
    for backend in BACKENDS:
        variant = new / "build" / f"torch-{backend}"
        shutil.copytree(modules, variant)
        metadata = {
            "id": f"_{NAME}_{backend}_{digest(modules)}",
            "name": NAME.replace("_", "-"),
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def build(out: Path, language: str = "triton") -> None:
    """Writes the package of a language to the folder `out`, which must not exist, be empty or be a package of
    before."""
    if out.exists() and not (out / "build.toml").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"{out} exists and is no package of kernels: choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        new = Path(folder) / "package"
        write_triton(new) if language == "triton" else write_cuda(new)
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make kernels-package", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/kernels/decode-kernel-lab"))
    out = parser.parse_args(argv).out
    compiled = out.with_name(f"{out.name}-cuda")
    try:
        build(out)
        build(compiled, "cuda")
    except (LabError, OSError) as error:
        print(f"kernels-package: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(f"{out}: kernels.get_local_kernel(pathlib.Path({str(out / 'build')!r})) loads it")
    print(f"{compiled}: sources, which `kernel-builder build` compiles; nothing in it is compiled yet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
