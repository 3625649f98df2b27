"""`make kernels-package`: the Triton kernels as a folder that Hugging Face's package `kernels` loads.

The folder has what hub/ holds, and in torch-ext the modules of this repository that an op in Triton needs.
They are found by following imports, so a new op needs nothing more. Such a package is loaded from any place
and under any name: every import of `lab` and `triton_kernels` in it is made relative. The folder build/ holds
the same once more with metadata, for GPUs and for CPUs, where kernels are interpreted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from lab.errors import LabError, one_line
from lab.own_modules import reached, relative

ROOT = Path(__file__).resolve().parent.parent.parent
HUB, NAME = ROOT / "hub", "decode_kernel_lab"
ROOTS = ("lab.torch_ops", "lab.backends.triton", "lab.backends.torch")
BACKENDS = ("cpu", "cuda")  # as hub/build.toml has them


def needed() -> list[Path]:
    """The modules that ops under Triton need, relative to the repository."""
    contracts = [f"lab.ops.{path.stem}" for path in (ROOT / "lab/ops").glob("[!_]*.py")]
    return sorted(reached([*ROOTS, *contracts]))


def write_modules(folder: Path) -> None:
    """The Python package, complete, into a new folder."""
    shutil.copytree(HUB / "torch-ext" / NAME, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in needed():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(relative(path))
    (folder / "lab/__init__.py").write_text('"""What the ops need of the decode kernel lab."""\n')
    shutil.copytree(ROOT / "triton_kernels/tuned", folder / "triton_kernels/tuned")


def digest(folder: Path) -> str:
    """Of all files of a folder, with their names: a name for what is in it."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def build(out: Path) -> None:
    """Writes the package to the folder `out`, which must not exist, be empty or be a package of before."""
    if out.exists() and not (out / "build.toml").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"{out} exists and is no package of kernels: choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        new = Path(folder) / "package"
        ignored = shutil.ignore_patterns("__pycache__", NAME)
        shutil.copytree(HUB, new, ignore=ignored)
        shutil.copy(ROOT / "LICENSE", new)
        modules = new / "torch-ext" / NAME
        write_modules(modules)
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
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make kernels-package", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/kernels/decode-kernel-lab"))
    out = parser.parse_args(argv).out
    try:
        build(out)
    except (LabError, OSError) as error:
        print(f"kernels-package: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(f"{out}: kernels.get_local_kernel(pathlib.Path({str(out / 'build')!r})) loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
