"""Reads regular files, writes files whole or not at all, parses JSON, and loads a Python file that a user
wrote."""

import contextlib
import importlib.util
import json
import os
import stat
from pathlib import Path

from lab.errors import LabError, error_text, shown

LARGEST_TEXT = 1 << 28  # bytes: larger than the JSON file or template of any model
DEEPEST = 100  # levels of nesting in a JSON file; real ones have about six


def regular_file(path: str | os.PathLike) -> Path:
    """`path`, which must be a regular file or a link to one.

    Raises LabError otherwise: a pipe keeps a reader waiting for ever, and a device such as /dev/zero never
    ends.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise LabError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LabError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise LabError(f"{path} is {_kind(mode)}, not a regular file")
    return Path(path)


def _kind(mode: int) -> str:
    """What a file that is not regular is, from its st_mode."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text(path: str | os.PathLike, limit: int = LARGEST_TEXT) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes; LabError for everything else."""
    try:
        with regular_file(path).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise LabError(f"{path} is larger than {limit >> 20} MiB")
        return data.decode("utf-8")
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabError(
            f"{path} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes to a new file beside `path` and renames it to `path`, so that no reader
    sees a part of it. Makes the folder where there is none.

    A link is followed. A pipe or a device (/dev/stdout) is written to directly, because a rename would
    replace it by a file. Raises LabError if the file cannot be written. The new file is removed after a
    failure or an interruption.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = None
    try:
        target = Path(os.path.realpath(path))
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        if Path(path).exists() and not target.is_file():
            Path(path).write_bytes(data)
        else:
            if not target.parent.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            beside.replace(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or no name
        raise LabError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if beside is not None:
            with contextlib.suppress(OSError):  # there is nothing to remove after the rename
                beside.unlink()


def is_there(path: str | os.PathLike) -> bool:
    """Whether the file exists. Raises LabError if it is not a regular file, because reading a pipe or a
    device may never end."""
    if not os.path.lexists(path):
        return False
    regular_file(path)
    return True


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises LabError if the file is missing or not regular, is nested too deeply,
    holds no object, or one that has a key twice."""
    too_deep = LabError(f"{path} is nested more than {DEEPEST} levels deep; no file of a model is")
    try:
        found = json.loads(read_text(path), object_pairs_hook=_without_twins)
    except LabError:
        raise
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise LabError(f"{path} cannot be read: {error}") from error
    if deeper(found, DEEPEST):
        raise too_deep
    if not isinstance(found, dict):
        raise LabError(f"{path}: expected a JSON object")
    return found


def strict_json(text: str | bytes):
    """The value of a JSON text. Raises ValueError or RecursionError for what is none, NaN and infinities
    included, and for an object that has a key twice: one of the two would be ignored."""
    return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_number)


def _without_twins(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} stands twice")
    return found


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def deeper(value, levels: int) -> bool:
    """Whether a parsed JSON value has more than `levels` levels of lists and objects."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def python_module(path: Path):
    """Loads a Python file that a user wrote as a module. Raises LabError for any error in it."""
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit(0) in it must not end the verb with success
        raise LabError(f"{path}: {error_text(error)}") from error
    return module
