"""The tables that `lab tune` writes: launch settings by op, bytes of an element, rows and shape, for one architecture.

cuda_src/tuned/sm_90.json and triton_kernels/tuned/sm_90.json hold what was measured on such a GPU: a list of entries
{"op", "itemsize", "rows", "shape", "settings", "gpu", "compiler", ...}; "by" says so where whole tokens chose
(`lab tune --by-token`). Nothing is tuned while a model runs.
"""
import hashlib
from pathlib import Path

from lab.errors import LabError, shown
from lab.files import is_there, read_json, regular_file

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {"cuda": ROOT / "cuda_src/tuned", "triton": ROOT / "triton_kernels/tuned"}


def path_of(backend, arch):
    """Of the table of a backend on an architecture, as in "sm_90"; it need not exist."""
    return FOLDERS[backend] / f"{arch}.json"


def digests(arch):
    """{backend: the first 8 hexadecimal digits of its table's SHA-256, None where there is no table}."""
    return {b: hashlib.sha256(regular_file(p).read_bytes()).hexdigest()[:8] if is_there(p := path_of(b, arch)) else None
            for b in FOLDERS}


def lookup(entries, op, itemsize, rows, shape):
    """The settings that a launch with `rows` rows takes, or None: of the entry for this shape with the least number of
    rows that holds `rows` and is not 16 times as many, for those of 64 say nothing about 1."""
    found = [entry for entry in entries if entry["op"] == op and entry["itemsize"] == itemsize
             and entry["shape"] == shape and rows <= entry["rows"] < 16 * rows]
    return min(found, key=lambda entry: entry["rows"])["settings"] if found else None


def read(path):
    """The entries of a table; [] where there is none. Raises LabError for a file that is no such table."""
    if not is_there(path):
        return []
    try:
        entries = read_json(path)["entries"]
        for entry in entries:
            entry["op"], entry["itemsize"], entry["rows"], entry["shape"].items(), entry["settings"].items()
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:          # a LabError of the file, too
        raise LabError(f"{path} is no table of `lab tune` ({shown(str(error), 200, quotes=False)}); delete it or tune again") from None
