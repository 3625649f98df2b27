"""Loads lab._host and lab._cuda, the compiled CUDA kernels, if they were built from the sources as they are
now.

setup.py links the digests of all source files into an extension (build_info()["sources"]). A kernel that was
edited after the build is not in the extension, so every number that it gave would be the old kernel's.
"""

import hashlib
from importlib import import_module
from pathlib import Path

from lab.errors import LabError, Unavailable

ROOT = Path(__file__).resolve().parent.parent
BUILD = {"_host": "make build", "_cuda": "LAB_CUDA=1 make build"}


def load(name: str):
    """The module lab.<name>, for name "_host" or "_cuda". Raises Unavailable if it is not built or does not
    load, and LabError if a file that it was built from has changed or gone, or one was added."""
    try:
        module = import_module(f"lab.{name}")
    except ImportError as error:
        needs = {"_host": "a C++ compiler", "_cuda": "nvcc, no GPU"}[name]
        raise Unavailable(
            f"lab.{name} is not built ({error}); it needs {needs}: run `make setup` or `{BUILD[name]}`"
        ) from None
    if difference := changed(module):
        raise LabError(f"{difference} since lab.{name} was built: run `{BUILD[name]}`")
    return module


def changed(module, root: Path = ROOT) -> str | None:
    """The difference between the sources in `root` and those that an extension was built from, as in
    "cuda_src/rope.cu has changed". None if there is no difference, or no sources, as beside an installed
    package."""
    if not (root / "cuda_src").is_dir():
        return None
    info = module.build_info()
    if "sources" not in info:  # built before setup.py noted them
        return "setup.py has changed"
    made_of = info["sources"]
    there = {path.relative_to(root).as_posix() for pattern in info["patterns"] for path in root.glob(pattern)}
    found = [(name, "was added") for name in sorted(there - made_of.keys())]
    for name, made in made_of.items():
        now = digest(root / name)
        if now != made:
            found.append((name, "is gone" if now is None else "has changed"))
    if not found:
        return None
    (name, what), *more = found
    return f"{name} {what}" + (f", and {len(more)} more file{'s' * (len(more) > 1)} differ," if more else "")


def digest(path: Path) -> str | None:
    """A digest of a file's contents, 16 hexadecimal digits, as setup.py computes it; None if there is no
    file."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except FileNotFoundError:
        return None
