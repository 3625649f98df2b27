"""lab._host and lab._cuda, the compiled CUDA kernels: loaded only where they are made of the sources as they
are now.

setup.py links the digests of all that went into an extension into it (build_info()["sources"]). A kernel that
has been edited since is not in the extension, and every number that it gave would be the old kernel's.
"""

import hashlib
from importlib import import_module
from pathlib import Path

from lab.errors import LabError, Unavailable

ROOT = Path(__file__).resolve().parent.parent
BUILD = {"_host": "make build", "_cuda": "LAB_CUDA=1 make build"}


def load(name: str):
    """The module lab.<name>, for name "_host" or "_cuda". Raises Unavailable where it is not built or does
    not load, and LabError where a file that it was made of has changed, gone or been added since."""
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
    """What distinguishes the sources in `root` from those that an extension was made of, as in
    "cuda_src/rope.cu has changed"; None where nothing does, or where there are no sources, as beside an
    installed package."""
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
    """16 hexadecimal digits that stand for a file's contents, as setup.py makes them; None for no file."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except FileNotFoundError:
        return None
