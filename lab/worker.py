"""A process of its own for kernels that are checked: whatever they do, the judge stays alive, and judges.

A `Worker` loads one file or backend in a new Python process. `Worker.function(name)` is a function whose method
run(arena) has that process call the op of this name on the arena's tensors, in memory that both processes map. Only the
tensors' contents count: the worker's word that a call is done makes nothing right, and a worker that ends, by exit(0)
too, that crashes or takes too long is a failed case with a message. The next case gets a new process.
"""
from __future__ import annotations

import contextlib
import ctypes
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

from lab.errors import LabError, Unavailable

ROOT = Path(__file__).resolve().parent.parent
MOST_DEATHS = 5         # then the remaining cases are not tried: each new process costs seconds


class Died(Exception):
    """The worker ended, or took too long. The message is the rest of a sentence that begins with what it ran."""


class Worker:
    """Runs what `spec` names in a process of its own (see load()). A context manager: at its end the process is killed.

    timeout: seconds for loading it and for each call; None: no limit.
    """

    def __init__(self, spec: dict, timeout: float | None):
        self.spec, self.timeout, self.process = spec, timeout, None
        self.file = tempfile.NamedTemporaryFile(prefix="lab-arena-")
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
        environment = {**os.environ,
                       "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        self.process = subprocess.Popen([sys.executable, "-m", "lab.worker", str(requests), str(replies)],
                                        stdin=subprocess.DEVNULL, env=environment, pass_fds=(requests, replies),
                                        start_new_session=True)
        os.close(requests)
        os.close(replies)
        try:
            self.ask({"load": self.spec})
        except Died as died:
            raise LabError(f"while {self.spec['what']} was loaded, its process {died}") from None

    def ask(self, request: dict, limited: bool = True) -> dict:
        """Sends a request, waits for the answer. Raises Died, LabError if the worker refuses, Unavailable likewise."""
        nonce = secrets.token_hex(8)
        message = pickle.dumps({**request, "nonce": nonce})
        with contextlib.suppress(BrokenPipeError):               # it has ended: its exit status says more
            write_all(self.requests, len(message).to_bytes(8, "little") + message)
        try:
            reply = json.loads(self.read_line(self.timeout if limited else None))
            if reply.pop("nonce") != nonce:
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            self.kill()
            raise Died("wrote into the pipe of the check") from None
        if "unavailable" in reply:
            raise Unavailable(reply["unavailable"])
        if "refused" in reply:
            raise LabError(reply["refused"])
        return reply

    def read_line(self, timeout: float | None) -> bytes:
        deadline, line = None if timeout is None else time.monotonic() + timeout, b""
        while not line.endswith(b"\n"):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0 or not select.select([self.replies], [], [], left)[0]:
                self.kill()
                raise Died(f"did not end within {timeout:g} s (--timeout)")
            part = os.read(self.replies, 65536)
            if not part:
                raise Died(how_it_ended(self.wait()))
            line += part
        return line

    def wait(self) -> int:
        """The exit status of a process that has closed its pipe, as subprocess has it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        status = self.process.poll()
        self.kill()
        return 0 if status is None else status

    def kill(self) -> None:
        """Ends the process and all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
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
            reply = self.ask({"call": name, "file": self.file.name, "nbytes": arena.memory.numel(),
                              "layout": arena.layout(), "recipe": arena.recipe})
        except Died as died:
            self.deaths += 1
            if "--timeout" in str(died):
                self.given_up = "not run: a case before took too long"
            elif self.deaths >= MOST_DEATHS:
                self.given_up = f"not run: its process has ended {MOST_DEATHS} times"
            return f"the kernel's process {died}"
        if reply.get("broken"):
            self.kill()
        return reply.get("error")


class Function:
    """An op in a worker, for lab.check.check_case: run(arena) instead of a call."""

    def __init__(self, worker: Worker, name: str):
        self.worker, self.name, self.file = worker, name, worker.file

    def run(self, arena) -> str | None:
        return self.worker.call(self.name, arena)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]


def how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} before it was done"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


# ---- in the worker's process -----------------------------------------------------------------------------------------

def load(spec: dict):
    """(name -> function of an op's arguments) for {"backend", "device"}, or {"file", "op", "device", "built"}."""
    from lab.ops import OPS, find
    if "file" in spec:
        from lab.learn import own_kernel
        function = own_kernel.function_of(Path(spec["file"]), find(spec["op"]), spec["device"], spec["built"])
        return {spec["op"]: function}.__getitem__
    if "rungs" in spec:
        from lab import ladder
        return lambda name: ladder.bind(ladder.rung_called(name), spec["rungs"], spec["device"])
    from lab.dispatch import select as select_ops
    ops = select_ops(spec["backend"], spec["device"], {op.name: spec["backend"] for op in OPS},
                     check_contents=True, partial=True)
    return lambda name: getattr(ops, name)


def call(function, device: str, request: dict) -> dict:
    """Runs a function on the arena of a request; what it wrote is in the file when this returns."""
    import torch

    from lab.arena import map_file, unpack
    with open(request["file"], "r+b") as file:
        shared = map_file(file, request["nbytes"])
    memory = shared.to(device)
    values = unpack(memory, request["layout"], request["recipe"])
    out = values.pop("out", None)
    try:
        returned = function(*values.values()) if out is None else function(*values.values(), out=out)
        if memory.is_cuda:
            shared.copy_(memory)                                 # waits for the kernel
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:
        broken = False
        if memory.is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception:                                    # the CUDA context is lost
                broken = True
        return {"error": f"{type(error).__name__}: {error}", "broken": broken}
    return {} if out is None or returned is out else {"error": "did not return the tensor given as out="}


def answer(state: dict, request: dict) -> dict:
    try:
        if "load" in request:
            state["spec"] = request["load"]
            state["functions"] = load(request["load"])
            return {}
        if "call" in request:
            return call(state["functions"](request["call"]), state["spec"]["device"], request)
        from lab.learn import own_kernel
        return {"status": own_kernel.race_in_worker(state["functions"](request["race"]), *request["arguments"])}
    except Unavailable as error:
        return {"unavailable": str(error)}
    except LabError as error:
        return {"refused": str(error)}


def main(requests: int, replies: int) -> None:
    if sys.platform == "linux":                                  # ends with its parent, whatever the kernel does
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    state, pipe = {}, os.fdopen(requests, "rb")
    while size := pipe.read(8):
        request = pickle.loads(pipe.read(int.from_bytes(size, "little")))
        reply = {**answer(state, request), "nonce": request["nonce"]}
        sys.stdout.flush()
        write_all(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
