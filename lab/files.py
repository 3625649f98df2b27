"""Files: written whole or not at all; and Python of somebody else's, loaded."""
import contextlib
import importlib.util
import os
from pathlib import Path

from lab.errors import LabError


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes beside `path` and renames the file into place, so that a reader never sees half of it.

    A link is followed. A pipe or a device (/dev/stdout) is written to: a rename would put a file in its place. Raises
    LabError where the file cannot be written; nothing is left beside it then, nor when the write is interrupted.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if Path(path).exists() and not target.is_file():
            Path(path).write_bytes(data)
        else:
            beside.write_bytes(data)
            beside.replace(target)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):              # in a folder that is not ours nothing was left
            beside.unlink()


def python_module(path: Path):
    """The module in a Python file that somebody else wrote. Raises LabError for whatever goes wrong in it."""
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:                    # sys.exit(0) in it must not end the verb with success
        raise LabError(f"{path}: {type(error).__name__}: {error}") from error
    return module
