"""A process of its own for kernels that are checked: whatever they do, the judge stays alive, and judges.

A `Worker` loads one file or backend in a new Python process: spec["module"] names the module whose
in_worker(spec) does. `Worker.function(name)` is a function whose method run(arena) has that process call the
op of this name on the arena's tensors, in memory that both processes map. Only the tensors' contents count:
the worker's word that a call is done makes nothing right, and a worker that ends, by exit(0) too, that
crashes or takes too long is a failed case with a message. The next case gets a new process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.errors import LabError, Unavailable, error_text

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 1 << 30  # bytes that a kernel may write into one
LONGEST_REPLY = 1 << 20  # bytes
MOST_DEATHS = 5  # then the remaining cases are not tried: each new process costs seconds


class Died(Exception):
    """The worker ended, or took too long. The message is the rest of a sentence that begins with what it
    ran."""


class Worker:
    """Runs what `spec` names in a process of its own. A context manager: at its end the process is killed.

    spec: "module", whose function in_worker(spec) gives name -> function of an op's arguments; "device";
    "what" is loaded, for messages; and what the module wants.
    timeout: seconds for loading it and for each call; None: no limit.
    """

    def __init__(self, spec: dict, timeout: float | None):
        self.spec, self.timeout, self.process = spec, timeout, None
        self.file, self.file_name = arena_file()
        self.deaths, self.given_up = 0, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.file.close()

    def function(self, name: str) -> Function:
        return Function(self, name)

    def start(self) -> None:
        """Starts the process and loads the kernels. Raises LabError for what they say or do meanwhile."""
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.worker", str(requests), str(replies)],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env=environment,
            start_new_session=True,
            pass_fds=(requests, replies, self.file.fileno()),
        )
        os.set_blocking(self.requests, False)
        os.close(requests)
        os.close(replies)
        try:
            self.ask({"load": self.spec})
        except Died as died:
            raise LabError(f"while {self.spec['what']} was loaded, its process {died}") from None

    def ask(self, request: dict, limited: bool = True) -> dict:
        """Sends a request, waits for the answer. Raises Died, LabError if the worker refuses, Unavailable
        likewise."""
        nonce = secrets.token_hex(8)
        message = pickle.dumps({**request, "nonce": nonce})
        deadline = time.monotonic() + self.timeout if limited and self.timeout is not None else None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its exit status says more
            self.send(len(message).to_bytes(8, "little") + message, deadline)
        try:
            reply = json.loads(self.read_line(deadline))
            if reply.pop("nonce") != nonce:
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self.kill()
            raise Died("wrote into the pipe of the check") from None
        if "unavailable" in reply:
            raise Unavailable(reply["unavailable"])
        if "refused" in reply:
            raise LabError(reply["refused"])
        return reply

    def send(self, data: bytes, deadline: float | None) -> None:
        while data:
            self.wait_for([], [self.requests], deadline)
            data = data[os.write(self.requests, data[:4096]) :]  # what select says a pipe has room for

    def read_line(self, deadline: float | None) -> bytes:
        """Raises ValueError for more than an answer may be, Died where none comes."""
        line = b""
        while not line.endswith(b"\n"):
            self.wait_for([self.replies], [], deadline)
            part = os.read(self.replies, 65536)
            if not part:
                raise Died(how_it_ended(self.wait()))
            line += part
            if len(line) > LONGEST_REPLY:
                raise ValueError
        return line

    def wait_for(self, readable: list, writable: list, deadline: float | None) -> None:
        """Returns when one of the pipes is ready. Raises Died at the deadline, and where the process has
        ended though one that it started has the pipe open still."""
        while True:
            ended = self.process.poll() is not None
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.kill()
                raise Died(f"did not end within {self.timeout:g} s (--timeout)")
            if any(select.select(readable, writable, [], 0 if ended else min(1.0, left or 1.0))):
                return
            if ended:
                raise Died(how_it_ended(self.wait()))

    def wait(self) -> int | None:
        """The exit status of a process that has closed its pipe, as subprocess has it; None where it lived
        on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        status = self.process.poll()
        self.kill()
        return status

    def kill(self) -> None:
        """Ends the process and all that it started."""
        if self.process is None:
            return
        started = descendants(self.process.pid)  # those in a session of their own are in no group of it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.requests)
        os.close(self.replies)
        self.process = None

    def call(self, name: str, arena) -> str | None:
        """Has the op called on an arena that lies in `file`; returns what went wrong, or None."""
        if self.given_up:
            return self.given_up
        if self.process is None:
            self.start()
        try:
            reply = self.ask(
                {
                    "call": name,
                    "file": self.file_name,
                    "nbytes": arena.memory.numel(),
                    "layout": arena.layout(),
                    "recipe": arena.recipe,
                }
            )
        except Died as died:
            self.deaths += 1
            if "--timeout" in str(died):
                self.given_up = "not run: a case before took too long"
            elif self.deaths >= MOST_DEATHS:
                self.given_up = f"not run: its process has ended {MOST_DEATHS} times"
            return f"the kernel's process {died}"
        if reply.get("broken"):
            self.kill()
        return str(reply["error"]) if reply.get("error") is not None else None


class Function:
    """An op in a worker, for lab.check.check_case: run(arena) instead of a call."""

    def __init__(self, worker: Worker, name: str):
        self.worker, self.name, self.file = worker, name, worker.file

    def run(self, arena) -> str | None:
        return self.worker.call(self.name, arena)


def arena_file():
    """(a file for arenas, the name by which a worker opens it). On Linux it is memory that nobody can
    shorten: a file cut off by a kernel would end the process that reads it, the judge, by SIGBUS."""
    if not hasattr(os, "memfd_create"):
        file = tempfile.NamedTemporaryFile(prefix="lab-arena-")
        return file, file.name
    import fcntl

    fd = os.memfd_create("lab-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return os.fdopen(fd, "r+b", buffering=0), f"/proc/self/fd/{fd}"


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; [] where there is no /proc."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def how_it_ended(status: int | None) -> str:
    if status is None:
        return "closed the pipe of the check"
    if status >= 0:
        return f"ended with exit status {status} before it was done"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


# ---- in the worker's process -------------------------------------------------------------------------------


def call(function, device: str, request: dict) -> dict:
    """Runs a function on the arena of a request; what it wrote is in the file when this returns."""
    import torch

    from lab.arena import map_file, unpack_from

    with open(request["file"], "r+b") as file:
        shared = map_file(file, request["nbytes"])
    memory = shared.to(device)
    storages = [memory[start : start + nbytes] for start, nbytes in request["layout"]]
    # Under compute-sanitizer each storage is an allocation of its own: memcheck then sees an access beyond
    # it, which in the arena would be an access to a guard zone.
    apart = (
        [storage.clone() for storage in storages] if os.environ.get("LAB_CHECK_APART") == "1" else storages
    )
    values = unpack_from(apart, memory[:0], request["recipe"])
    out = values.pop("out", None)
    try:
        returned = function(*values.values()) if out is None else function(*values.values(), out=out)
        if apart is not storages:
            for storage, mine in zip(storages, apart, strict=True):
                storage.copy_(mine)
        if memory.is_cuda:
            shared.copy_(memory)  # waits for the kernel
    except Unavailable as error:
        return {"unavailable": str(error)}
    except BaseException as error:  # sys.exit() in a kernel, too
        broken = False
        if memory.is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception:  # the CUDA context is lost
                broken = True
        return {"error": error_text(error), "broken": broken}
    return {} if out is None or returned is out else {"error": "did not return the tensor given as out="}


def answer(state: dict, request: dict) -> dict:
    try:
        if "load" in request:
            state["spec"] = spec = request["load"]
            state["module"] = importlib.import_module(spec["module"])
            state["functions"] = state["module"].in_worker(spec)
            return {}
        if "call" in request:
            return call(state["functions"](request["call"]), state["spec"]["device"], request)
        return {"result": getattr(state["module"], request["run"])(state["functions"], *request["arguments"])}
    except Unavailable as error:
        return {"unavailable": str(error)}
    except LabError as error:
        return {"refused": str(error)}
    except BaseException as error:  # of the file that is loaded: the lab's own are tested
        return {"refused": f"{state['spec']['what']}: {error_text(error)}"}


def main(requests: int, replies: int) -> None:
    if sys.platform == "linux":  # ends with its parent, whatever the kernel does
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        ctypes.CDLL(None).prctl(36, 1)  # and is the parent of what a child of it leaves behind
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))  # the arena's file is memory
    state, pipe = {}, os.fdopen(requests, "rb")
    while size := pipe.read(8):
        request = pickle.loads(pipe.read(int.from_bytes(size, "little")))
        reply = {**answer(state, request), "nonce": request["nonce"]}
        sys.stdout.flush()
        try:
            write_all(replies, json.dumps(reply).encode() + b"\n")
        except OSError:  # a kernel has closed it
            os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
