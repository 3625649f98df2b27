"""The tables that `lab tune` writes: launch settings by op, bytes of an element, rows and shape, for one
architecture.

cuda_src/tuned/sm_90.json and triton_kernels/tuned/sm_90.json hold what was measured on such a GPU: a list of
entries {"op", "itemsize", "rows", "shape", "settings", "gpu", "compiler", ...}; "format" is the weight format
of packed weights, and "by" says so where whole tokens chose (`lab tune --by-token`). "context" is that of
attention; where it is a list, "us" and "us_by_hand" are geometric means over several. Nothing is tuned while
a model runs.
"""

import hashlib
from pathlib import Path

from lab.errors import LabError, error_text, shown
from lab.files import is_there, read_text, regular_file, strict_json

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = "sum", "dot"  # of Triton's matrix products
WHOLE_K = 16  # rows of x, up to which no program divides k (SPLITS; triton_kernels/core/packed_splits.py)
FOLDERS = {"cuda": ROOT / "cuda_src/tuned", "triton": ROOT / "triton_kernels/tuned"}


def path_of(backend, arch):
    """Of the table of a backend on an architecture, as in "sm_90"; it need not exist."""
    return FOLDERS[backend] / f"{arch}.json"


def digests(arch):
    """{backend: the first 8 hexadecimal digits of its table's SHA-256, None where there is no table}."""
    return {
        b: hashlib.sha256(regular_file(p).read_bytes()).hexdigest()[:8]
        if is_there(p := path_of(b, arch))
        else None
        for b in FOLDERS
    }


def lookup(entries, op, itemsize, rows, shape, format=None):
    """The settings that a launch with `rows` rows takes, or None: of the entry for this shape and format (of
    packed weights, or None) with the least number of rows that holds `rows` and is not 16 times as many, for
    those of 64 say nothing about 1. Settings that divide k are for more than WHOLE_K rows."""
    found = [
        entry
        for entry in entries
        if entry["op"] == op
        and entry["itemsize"] == itemsize
        and entry["shape"] == shape
        and entry.get("format") == format
        and fewest_rows(entry["rows"]) <= rows <= entry["rows"]
        and (rows > WHOLE_K or "SPLITS" not in entry["settings"])
    ]
    return min(found, key=lambda entry: entry["rows"])["settings"] if found else None


def fewest_rows(rows):
    """The least number of rows that takes the settings of an entry for `rows`, where no entry is for less."""
    return rows // 16 + 1


def read(path):
    """The entries of a table; [] where there is none. Raises LabError for a file that is no such table."""
    if not is_there(path):
        return []
    advice = "delete the file or tune again"
    try:
        table = strict_json(read_text(path))
    except (LabError, ValueError, RecursionError) as error:
        raise LabError(f"{path} is no table of `lab tune` ({error_text(error)}); {advice}") from None
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise LabError(f'{path} is no table of `lab tune`: it has no list "entries"; {advice}')
    for i, entry in enumerate(table["entries"]):
        if problem := wrong(entry):
            raise LabError(f"{path} is no table of `lab tune`: entry {i}: {problem}; {advice}")
    return table["entries"]


def is_count(value) -> bool:
    """Whether a value is a number of things: a whole one from 1 that a launcher's int holds."""
    return type(value) is int and 0 < value < 2**31


def wrong(entry) -> str | None:
    """What is wrong with an entry, or None. Launchers take its numbers as they are."""
    if not isinstance(entry, dict):
        return f"is {shown(entry)}, not an object"
    texts = {"by": "", "gpu": "", "compiler": "", "format": "", **entry}
    for name in ("op", "by", "gpu", "compiler", "format"):
        if not isinstance(texts.get(name), str):
            return f"{name} is {shown(texts.get(name))}, not text"
    for name in ("itemsize", "rows"):
        if not is_count(entry.get(name)):
            return f"{name} is {shown(entry.get(name))}, not a whole number above 0"
    for name in ("shape", "settings"):
        if not isinstance(entry.get(name), dict):
            return f"{name} is {shown(entry.get(name))}, not an object"
    for name, value in entry["shape"].items():
        if type(value) is not int or not 0 <= value < 2**31:
            return f"shape has {shown(name)}: {shown(value)}, not a whole number"
    for name, value in entry["settings"].items():
        if (
            type(value) is not bool
            and not (type(value) is int and 0 <= value < 2**31)
            and not (name == "path" and value in PATHS)
        ):
            return f"settings has {shown(name)}: {shown(value)}, which no launcher takes"
    if not (type(entry.get("tried", 0)) is int and entry.get("tried", 0) >= 0):
        return f"tried is {shown(entry['tried'])}, not a whole number"
    return None
