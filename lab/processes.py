"""Processes with limits: what a process has started, the memory that it takes, and a command that is ended at
a limit of its time or its memory. Imports nothing but the standard library, for setup.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

LOOK_SECONDS = 0.2  # how often the memory of a process that has a limit is read


class OverLimit(Exception):
    """A command was ended at a limit. The message completes a sentence about it, such as "took more than 2
    GiB of memory (--memory)". In brackets is the option of `lab try` and `lab import`."""


def run_group(
    command,
    environment=None,
    timeout: float | None = None,
    memory: int | None = None,
    folder: Path | None = None,
) -> tuple[int, str]:
    """(exit status, output) of a command that runs in `folder`. What it has started ends with it, when this
    process is interrupted, too.

    Raises OverLimit if it has not ended after `timeout` seconds, or takes, with what it has started, more
    than `memory` bytes that are neither shared nor a file's. None means no limit.
    """
    begin = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            while True:
                left = None if timeout is None else max(0.0, begin + timeout - time.monotonic())
                look = None if memory is None else LOOK_SECONDS
                wait = min((seconds for seconds in (left, look) if seconds is not None), default=None)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = process.communicate(timeout=wait)
                    return process.returncode, said
                if timeout is not None and time.monotonic() - begin >= timeout:
                    raise OverLimit(f"took more than {timeout:g} s (--timeout)")
                pids = [process.pid, *descendants(process.pid)]
                if memory is not None and anonymous_bytes(pids) > memory:
                    raise OverLimit(f"took more than {memory / 2**30:g} GiB of memory (--memory)")
        finally:
            end(process.pid)


def end(pid: int) -> None:
    """Kills the process group of a process and all processes that it started."""
    started = descendants(pid)  # one that has begun a session of its own is no longer in the group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for one in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The ids of all processes below a process: those that it started, those that these started, and so on.
    [] on a system without /proc."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def anonymous_bytes(pids: list[int]) -> int:
    """The memory of processes that is neither shared nor a file's; 0 on a system without /proc."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(status.split("RssAnon:")[1].split()[0]) << 10 if "RssAnon:" in status else 0
    return total
