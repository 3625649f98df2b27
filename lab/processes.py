"""Processes with limits: what a process has started, the memory that it takes, and a command that is ended at
a limit of its time, its memory or its output. Imports nothing but the standard library, for setup.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

LOOK_SECONDS = 0.2  # how often the memory and the output of a command are looked at
MOST_OUTPUT = 64 << 20  # bytes; what a compiler says of a thousand errors takes 1 MiB


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

    Raises OverLimit if it has not ended after `timeout` seconds, takes, with what it has started, more than
    `memory` bytes that are neither shared nor a file's, or prints more than MOST_OUTPUT. None means no limit.
    """
    begin = time.monotonic()
    with (
        tempfile.TemporaryFile() as output,  # a pipe would be read into this process's memory
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            while True:
                left = LOOK_SECONDS if timeout is None else max(0.0, begin + timeout - time.monotonic())
                status = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(left, LOOK_SECONDS))
                if os.fstat(output.fileno()).st_size > MOST_OUTPUT:
                    raise OverLimit(f"printed more than {MOST_OUTPUT >> 20} MiB")
                if status is not None:
                    break
                if timeout is not None and time.monotonic() - begin >= timeout:
                    raise OverLimit(f"took more than {timeout:g} s (--timeout)")
                if memory is not None and anonymous_bytes([process.pid, *descendants(process.pid)]) > memory:
                    raise OverLimit(f"took more than {memory / 2**30:g} GiB of memory (--memory)")
            output.seek(0)
            return status, output.read().decode(errors="replace")
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
