"""The judge's part in the kernel's own process: it loads the file, calls it on the arena that both processes
map, and says what the call did besides writing its output.

Nothing here decides. The parent (lab/judge/verdict.py, lab/judge/race.py) compares what the kernel wrote
with its own references; a file that rewrites this module can at most hide what only this process can see.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from lab import worker
from lab.arena import unpack_from
from lab.dispatch import bind
from lab.errors import Unavailable, error_text
from lab.harness.timing import device_events
from lab.judge.kernel_file import backend_of
from lab.judge.originals import keep, patched, watch
from lab.judge.replay import burst, fetch, release, replay  # what the race asks for by name
from lab.judge.replay import prepare as prepare_race
from lab.ops import find

__all__ = ["burst", "call", "fetch", "in_worker", "prepare", "release", "replay", "written_since"]


class Watched:
    """The op's function, made of a file, with what is needed to watch it. Called as ops.<op> is.

    own: the names of the kernels that the file itself launched when launched() last ran something.
    """

    own: list[str] = []

    def __init__(self, spec: dict):
        self.op, self.device = find(spec["op"]), torch.device(spec["device"])
        self.backend = backend_of(Path(spec["file"]), self.op, spec["device"], spec["built"])
        self.function = bind(self.op, self.backend, self.device)

    def __call__(self, *args, out=None):
        return self.function(*args, out=out) if out is not None else self.function(*args)

    def launched(self, run) -> list[str]:
        """The names of the kernels that run() launched, in order; on a GPU those that the device ran, copies
        and fills included."""
        on_gpu = self.device.type == "cuda"
        self.backend.set_trace(True)
        try:
            events = device_events(run) if on_gpu else run()
            self.own = self.backend.take_trace()
        finally:
            self.backend.set_trace(False)
        return [name for name, *_ in events] if on_gpu else self.own


def in_worker(spec: dict):
    """name -> the function in spec["file"], in a worker's process."""
    watch(find(spec["op"]))
    return {spec["op"]: Watched(spec)}.__getitem__


def call(function: Watched, device: str, request: dict) -> dict:
    """Calls the op on the arena of a request, as lab.worker.call does.

    The answer also has "launched", how often each kernel ran, by name; "own", whether the file launched one
    itself, not torch; "late", whether something was still being written when the call had returned and its
    stream had ended; and "patched", see lab/judge/originals.py.
    """
    _last.clear()  # first: the same tensors get the same addresses in the next call
    shared = worker.shared_memory(request["file"], request["nbytes"])
    memory = shared.to(device)
    storages = [memory[start : start + nbytes] for start, nbytes in request["layout"]]
    values = unpack_from(storages, memory[:0], request["recipe"])
    out = values.pop("out", None)
    reply, at_return = {}, []

    def run():
        returned = function(*values.values(), out=out)
        at_return.append(memory.clone())  # in the same stream
        if out is not None and returned is not out:
            reply["error"] = "did not return the tensor given as out="

    try:
        # Not the default stream, which waits for the work of most others.
        with torch.cuda.stream(torch.cuda.Stream() if memory.is_cuda else None):
            names = function.launched(run)
        if memory.is_cuda:
            keep.synchronize()
            names = without_last_copy(names)
        _last.update(memory=memory, at_return=at_return[0])
        reply |= {"launched": Counter(names), "own": bool(function.own), "late": written_since(None)}
        if memory.is_cuda:
            shared.copy_(memory)
    except Unavailable as error:
        return {"unavailable": str(error)}
    except BaseException as error:  # also of sys.exit() in a kernel's file
        reply |= {"error": error_text(error), "broken": memory.is_cuda and worker.context_is_lost()}
    return {**reply, "patched": patched()}


_last: dict = {}  # the memory of the last call, and a copy of what it was when the call had returned


def written_since(functions) -> bool:
    """Whether the memory of the last call is no longer what it was when the call had returned."""
    if _last and _last["memory"].is_cuda:
        keep.synchronize()
    return bool(_last) and not keep.equal(_last["at_return"], _last["memory"])


def prepare(functions, name: str, *arguments) -> dict:
    _last.clear()  # the race needs the memory
    return prepare_race(functions, name, *arguments)


def without_last_copy(names: list[str]) -> list[str]:
    """Without the copy that call() itself has added."""
    copies = [i for i, name in enumerate(names) if "Memcpy" in name]
    return names[: copies[-1]] + names[copies[-1] + 1 :] if copies else names
