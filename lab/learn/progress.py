"""What a learner has done, in a file in the user's own state folder.

The file is $XDG_STATE_HOME/decode-kernel-lab/progress.json, ~/.local/state if the variable is not set. It is
replaced as a whole (lab.files.write_whole), so a reader never finds a part of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lab.errors import LabError
from lab.files import is_there, read_json, write_whole

PARTS = {"solved": list, "hints": dict, "lessons": dict}


def path() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification of base directories says that a relative path is to be ignored.
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "decode-kernel-lab" / "progress.json"


def load() -> dict:
    """{"solved": ["barrier/cuda", ...], "hints": {"barrier/cuda": how many were shown}, "lessons": {"1":
    {"prediction": text, "ran": bool, "hints": count}}}, empty parts where there is none.

    Raises LabError for a file that holds something else.
    """
    found = read_json(path()) if is_there(path()) else {}
    if any(not isinstance(found.get(part, kind()), kind) for part, kind in PARTS.items()):
        raise LabError(f"{path()} is not a file of `lab learn`: move it away to begin anew")
    return {part: found.get(part, kind()) for part, kind in PARTS.items()}


def save(progress: dict) -> None:
    write_whole(path(), json.dumps(progress, indent=1, sort_keys=True) + "\n")


def solve(key: str) -> None:
    """Notes that an exercise is solved, by its key: "barrier/cuda"."""
    progress = load()
    if key not in progress["solved"]:
        progress["solved"].append(key)
        save(progress)


def next_hint(key: str, most: int) -> int:
    """Counts one more hint as shown, at most `most`. Returns how many have been."""
    progress = load()
    shown = min(int(progress["hints"].get(key, 0)) + 1, most)
    progress["hints"][key] = shown
    save(progress)
    return shown
