"""Runs the kernels that are checked in a process of their own, so that the checking process survives whatever
they do.

A `Worker` loads one file or backend in a new Python process: spec["module"] names the module, whose function
in_worker(spec) does the loading. `Worker.function(name)` returns a function with a method run(arena): the
process calls the op of this name on the arena's tensors, in memory that both processes map. Only the contents
of the tensors count as a result. A worker that crashes, exits (with status 0, too) or takes too long is a
failed case with a message, and the next case gets a new process.
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
from lab.processes import LOOK_SECONDS, anonymous_bytes, descendants, end

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 1 << 30  # bytes: the largest file that a kernel may write
LONGEST_REPLY = 1 << 20  # bytes
MOST_DEATHS = 5  # after so many the remaining cases are not run, because each new process costs seconds


class Died(Exception):
    """The worker ended, or took too long. The message completes a sentence about it, such as "was ended by
    SIGSEGV". kind: what happened, in two words."""

    def __init__(self, message: str, kind: str = "process ended"):
        super().__init__(message)
        self.kind = kind


class Worker:
    """Runs the kernels that `spec` names in a process of its own. A context manager: at its end the process
    is killed.

    spec: "module", with a function in_worker(spec) that returns name -> function of an op's arguments;
    "device"; "what" is loaded, for messages; and the values that the module needs. timeout: seconds for
    loading and for each call; None means no limit. memory: bytes by which the process and what it starts may
    grow, of memory that is not shared; None means no limit.
    """

    def __init__(self, spec: dict, timeout: float | None, memory: int | None = None):
        self.spec, self.timeout, self.process = spec, timeout, None
        self.memory, self.memory_before = memory, 0
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
        """Starts the process and loads the kernels. Raises LabError if they fail to load, Unavailable if this
        machine cannot run them."""
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
        self.memory_before = anonymous_bytes([self.process.pid])
        os.set_blocking(self.requests, False)
        os.close(requests)
        os.close(replies)
        try:
            self.ask({"load": self.spec})
        except Died as died:
            raise LabError(f"while {self.spec['what']} was loaded, its process {died}") from None

    def ask(self, request: dict, limited: bool = True) -> dict:
        """Sends a request and waits for the answer. Raises Died if there is none, and LabError or Unavailable
        if the worker answers with one."""
        nonce = secrets.token_hex(8)
        message = pickle.dumps({**request, "nonce": nonce})
        deadline = time.monotonic() + self.timeout if limited and self.timeout is not None else None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read_line() reports how
            self.send(len(message).to_bytes(8, "little") + message, deadline)
        try:
            reply = json.loads(self.read_line(deadline))
            if reply.pop("nonce") != nonce:
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self.kill()
            raise Died("wrote into the pipe of the check", "forged reply") from None
        if "unavailable" in reply:
            raise Unavailable(reply["unavailable"])
        if "refused" in reply:
            raise LabError(reply["refused"])
        return reply

    def send(self, data: bytes, deadline: float | None) -> None:
        while data:
            self.wait_for([], [self.requests], deadline)
            # A pipe that select() calls writable takes at least 4096 bytes.
            data = data[os.write(self.requests, data[:4096]) :]

    def read_line(self, deadline: float | None) -> bytes:
        """The next line of the worker's answers. Raises ValueError if it is too long, Died if none comes."""
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
        """Returns when one of the pipes is ready. Raises Died at the deadline, and when the process has ended
        although a process that it started still holds the pipe open."""
        while True:
            ended = self.process.poll() is not None
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.kill()
                raise Died(f"did not end within {self.timeout:g} s (--timeout)", "time limit")
            if not ended:
                self.limit_memory()
            longest = 1.0 if self.memory is None else LOOK_SECONDS
            if any(select.select(readable, writable, [], 0 if ended else min(longest, left or longest))):
                return
            if ended:
                raise Died(how_it_ended(self.wait()))

    def limit_memory(self) -> None:
        """Raises Died if the process has taken more memory than it may. Its address space says nothing: CUDA
        reserves more than any machine has."""
        if self.memory is None:
            return
        pids = [self.process.pid, *descendants(self.process.pid)]
        if anonymous_bytes(pids) - self.memory_before > self.memory:
            self.kill()
            raise Died(f"took more than {self.memory / 2**30:g} GiB of memory (--memory)", "memory limit")

    def threads(self) -> int:
        """How many threads the process has now; 0 on a system without /proc."""
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.process.pid}/task"))
        return 0

    def wait(self) -> int | None:
        """The exit status of a process that has closed its pipe, in the form that subprocess uses; None if
        the process still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        status = self.process.poll()
        self.kill()
        return status

    def kill(self) -> None:
        """Ends the process and all processes that it started."""
        if self.process is None:
            return
        end(self.process.pid)
        self.process.wait()
        os.close(self.requests)
        os.close(self.replies)
        self.process = None

    def call(self, name: str, arena) -> str | None:
        """Lets the worker call the op on an arena that lies in `file`; returns what went wrong, or None."""
        error = self.exchange(name, arena).get("error")
        return None if error is None else str(error)

    def exchange(self, name: str, arena) -> dict:
        """The same; returns the worker's whole answer, or {"error", "kind"} if there was none."""
        if self.given_up:
            return {"error": self.given_up, "kind": "not run"}
        if self.process is None:
            self.start()
        try:
            reply = self.ask({"call": name, **self.place_of(arena)})
        except Died as died:
            self.count(died)
            return {"error": f"the kernel's process {died}", "kind": died.kind}
        if reply.get("broken"):
            self.kill()
        return reply

    def count(self, died: Died) -> None:
        """Counts a death in a case: after too many, or one that took too long, no further case is run."""
        self.deaths += 1
        if died.kind == "time limit":
            self.given_up = "not run: a case before took too long"
        elif self.deaths >= MOST_DEATHS:
            self.given_up = f"not run: its process has ended {MOST_DEATHS} times"

    def place_of(self, arena) -> dict:
        """What the worker must know to find an arena's tensors in `file`."""
        return {
            "file": self.file_name,
            "nbytes": arena.memory.numel(),
            "layout": arena.layout(),
            "recipe": arena.recipe,
        }


class Function:
    """An op in a worker. lab.check.check_case calls its run(arena) instead of a function."""

    def __init__(self, worker: Worker, name: str):
        self.worker, self.name, self.file = worker, name, worker.file

    def run(self, arena) -> str | None:
        return self.worker.call(self.name, arena)


def arena_file():
    """A file for arenas, and the name by which a worker opens it. On Linux it is memory that cannot be
    shortened: if a kernel cut the file off, reading it would end the checking process by SIGBUS."""
    if not hasattr(os, "memfd_create"):
        file = tempfile.NamedTemporaryFile(prefix="lab-arena-")
        return file, file.name
    import fcntl

    fd = os.memfd_create("lab-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return os.fdopen(fd, "r+b", buffering=0), f"/proc/self/fd/{fd}"


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
    """Runs a function on the arena of a request. When it returns, the file has what the function wrote."""

    from lab.arena import unpack_from

    shared = shared_memory(request["file"], request["nbytes"])
    memory = shared.to(device)
    storages = [memory[start : start + nbytes] for start, nbytes in request["layout"]]
    # Under compute-sanitizer each storage is an allocation of its own, so that memcheck sees an access beyond
    # it. In the arena such an access would hit a guard zone, which is valid memory.
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
            shared.copy_(memory)  # this also waits for the kernel
    except Unavailable as error:
        return {"unavailable": str(error)}
    except BaseException as error:  # also of sys.exit() in a kernel's file
        return {"error": error_text(error), "broken": memory.is_cuda and context_is_lost()}
    return {} if out is None or returned is out else {"error": "did not return the tensor given as out="}


def shared_memory(name: str, nbytes: int):
    """The first `nbytes` of the file of arenas as a uint8 tensor: in one place as long as they are as
    many."""
    from lab.arena import map_file

    if _mapped.get("nbytes") != nbytes:
        _mapped.clear()  # unmaps the old one
        with open(name, "r+b") as file:
            _mapped.update(nbytes=nbytes, memory=map_file(file, nbytes))
    return _mapped["memory"]


_mapped: dict = {}


def context_is_lost() -> bool:
    """Whether the CUDA context has failed for good, as after an illegal access."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def answer(state: dict, request: dict) -> dict:
    try:
        if "load" in request:
            state["spec"] = spec = request["load"]
            state["module"] = importlib.import_module(spec["module"])
            state["functions"] = state["module"].in_worker(spec)
            return {}
        if "call" in request:
            run = getattr(state["module"], "call", call)  # a module may watch its kernels more closely
            return run(state["functions"](request["call"]), state["spec"]["device"], request)
        return {"result": getattr(state["module"], request["run"])(state["functions"], *request["arguments"])}
    except Unavailable as error:
        return {"unavailable": str(error)}
    except LabError as error:
        return {"refused": str(error)}
    except BaseException as error:  # raised by the file that is loaded
        return {"refused": f"{state['spec']['what']}: {error_text(error)}"}


def main(requests: int, replies: int) -> None:
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: this process is killed when its parent ends.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # PR_SET_CHILD_SUBREAPER: orphaned descendants become its children, so that Worker.kill() finds them.
        ctypes.CDLL(None).prctl(36, 1)
        import resource

        # The arena's file lies in memory, which a kernel must not fill.
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    state, pipe = {}, os.fdopen(requests, "rb")
    while size := pipe.read(8):
        request = pickle.loads(pipe.read(int.from_bytes(size, "little")))
        reply = {**answer(state, request), "nonce": request["nonce"]}
        sys.stdout.flush()
        try:
            write_all(replies, json.dumps(reply).encode() + b"\n")
        except OSError:  # the kernel has closed the pipe
            os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
