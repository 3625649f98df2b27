"""Makes .venv ready, for `make setup` and `make demo`. Standard library only; PYTHON names the python that
runs it.

If that python has a CUDA build of torch, .venv borrows its packages: torch and triton stay as they are, only
missing packages are added, and if nothing is missing no network is needed. Otherwise .venv gets the versions
pinned in pyproject.toml. Each file except torch's is checked against requirements-hashed.txt (HASHES=0 omits
that, for a package index with builds of its own). TORCH_INDEX may name another index for torch:
https://download.pytorch.org/whl/cpu spares a machine without a GPU the download of the CUDA build.

    python -m lab.machine.setup_env           packages
    python -m lab.machine.setup_env --model   the default model's package, without its dependencies
    python -m lab.machine.setup_env --test    transformers and accelerate, for the oracle tests
"""

import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"


def project():
    """pyproject.toml as a dict. Python 3.10 has no tomllib, but its pip carries the same parser."""
    try:
        import tomllib
    except ImportError:
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def cuda_torch():
    """("2.11.0+cu130", "13.0") if this python has torch built for CUDA, else None. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        return None
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return (version["__version__"], version["cuda"]) if version.get("cuda") else None


def create_venv(borrow):
    """Makes .venv from this python. With `borrow` it sees this python's packages, even if this python is in a
    venv itself."""
    in_venv = sys.prefix != sys.base_prefix
    if not PYTHON.exists():
        options = ["--system-site-packages"] if borrow and not in_venv else []
        # A pip of its own may bring an old setuptools, which would hide the borrowed one.
        borrowed_pip = borrow and importlib.util.find_spec("pip")
        if borrowed_pip or not importlib.util.find_spec("ensurepip"):
            options.append("--without-pip")
        run([sys.executable, "-m", "venv", *options, str(VENV)])
    if borrow and in_venv:
        here = sysconfig.get_paths()["purelib"]
        target = VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (target / "borrowed.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    if subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode != 0:
        sys.exit(
            f"setup: {PYTHON} has no pip: install it (Debian: python3-venv), `make clean-all`, then again"
        )


def pip_install(*arguments):
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # progress bars on a terminal only
    options = [*quiet, "--disable-pip-version-check", "--no-build-isolation"]
    run([str(PYTHON), "-m", "pip", "install", *options, *arguments])


def run(command):
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"setup: failed: {' '.join(command)}")


def keep(borrowed):
    """pip's options that keep torch and triton at the borrowed versions, whatever another package
    requires."""
    if not borrowed:
        return []
    probe = (
        "from importlib.metadata import version as v; [print(f'{n}=={v(n)}') for n in ('torch', 'triton')]"
    )
    versions = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True, check=True).stdout
    path = VENV / "keep.txt"
    path.write_text(versions)
    return ["--constraint", str(path)]


def main(arguments):
    if sys.version_info < (3, 10):
        sys.exit(
            f"setup: Python {sys.version.split()[0]} is too old: make setup PYTHON=python3.12 (3.10 or newer)"
        )
    meta = project()
    if "--model" in arguments:
        return pip_install("--no-deps", meta["tool"]["lab"]["model"])
    borrowed = cuda_torch()
    extras = meta["project"]["optional-dependencies"]
    if "--test" in arguments:
        return pip_install(*keep(borrowed), *extras["test"])
    create_venv(borrowed)
    if borrowed:
        print(
            f"setup: using torch {borrowed[0]} (CUDA {borrowed[1]}) of {sys.executable}; adding what is "
            "missing"
        )
        return pip_install(
            *keep(borrowed), *meta["project"]["dependencies"], *meta["build-system"]["requires"]
        )
    print(f"setup: installing the versions pinned in pyproject.toml into {VENV.relative_to(ROOT)}")
    torch = [pin for pin in extras["pinned"] if pin.startswith("torch==")]
    if os.environ.get("HASHES") != "0":
        pip_install("--no-deps", "--require-hashes", "-r", "requirements-hashed.txt")
    index = os.environ.get("TORCH_INDEX")
    if index:
        pip_install("--index-url", index, *torch)
    pip_install(*extras["pinned"])  # what is still missing


if __name__ == "__main__":
    main(sys.argv[1:])
