"""Files that are written whole or not at all."""
import os
from pathlib import Path

from lab.errors import LabError


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes beside `path` and renames the file into place, so that a reader never sees half of it.

    Raises LabError where the file cannot be written; nothing is left beside it then, nor when the write is interrupted.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
