"""The race in the kernel's process: calls on distinct buffers, captured once and replayed with ever new
contents.

Before each replay the parent sends a seed that nobody could know before. From it all inputs are made anew in
the same memory, the outputs are filled with NaN, and the caches are emptied; only then does the clock run.
Afterwards the parent, which makes the same contents from the seed, asks for the memory of a few calls. A
replay uses each buffer once, so that no call finds its result there already.

On a CPU a replay calls the functions one by one. Its times say nothing; tests run all the rest there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections import Counter

import torch

from lab import worker
from lab.arena import Arena
from lab.check import values_of
from lab.contract import DTYPES, Rand
from lab.harness import timing
from lab.harness.shapes import arguments
from lab.judge.originals import keep, patched

FLUSHES = 4  # reads of five times L2: while they run, the host has the time to launch the graph behind them


def values_at(op, point, dtype_name: str, device: str, multiprocessors: int, seed: int, number: int) -> dict:
    """The contents of buffer set `number` for a replay: what the parent and the kernel's process agree on."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest()
    rand = Rand(device, DTYPES[dtype_name], int.from_bytes(digest, "little"))
    return values_of(op, arguments(op, point, rand, multiprocessors)[0])


class Replays:
    """The calls of one point: see the module's text. order: the buffer sets in the order of their calls."""

    def __init__(self, function, point, dtype_name, multiprocessors, l2_bytes, order, seed):
        self.device = function.device.type
        self.op, self.order = function.op, order
        self.values = functools.partial(values_at, self.op, point, dtype_name, self.device, multiprocessors)
        self.arenas = [Arena(self.values(seed, number), self.device) for number in range(len(order))]
        self.calls = [call_on(function, arena) for arena in self.arenas]
        self.flush = timing.Flush(l2_bytes, self.device) if self.device == "cuda" else None
        self.graph = None

    def launches(self, function, seed: int) -> dict:
        """The kernels of one call, and those of one replay, {name: how many}; and whether the file launched
        one of the call's itself, not torch."""
        if self.device == "cuda":
            timing.device_events(
                lambda: torch.zeros(1, device="cuda")
            )  # the profiler attaches before the graph is captured
        for number in self.order:
            self.calls[number]()  # compiles, tunes, allocates what a call needs once
        self.fill(seed)
        one = Counter(function.launched(self.calls[self.order[0]]))
        own = bool(function.own)
        in_order = [self.calls[number] for number in self.order]
        self.graph = timing.capture(in_order) if self.device == "cuda" else InOrder(in_order)
        self.fill(seed)
        return {"call": one, "own": own, "replay": Counter(function.launched(self.graph.replay))}

    def fill(self, seed: int) -> None:
        """New contents for all buffers, and outputs without any."""
        for number, arena in enumerate(self.arenas):
            arena.fill(self.values(seed, number), keep=self.op.state)

    def replay(self, seed: int) -> float:
        """Microseconds for each call of one replay with the contents of `seed`."""
        self.fill(seed)
        if self.device != "cuda":
            start = keep.perf_counter()
            self.graph.replay()
            return (keep.perf_counter() - start) * 1e6 / len(self.order)
        reset_persisting_l2()
        for _ in range(FLUSHES):
            self.flush()
        start, end = keep.Event(enable_timing=True), keep.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        keep.synchronize()
        reset_persisting_l2()
        return start.elapsed_time(end) * 1e3 / len(self.order)

    def burst(self, count: int) -> None:
        """`count` replays, and nothing else: the parent's clock runs meanwhile."""
        for _ in range(count):
            self.graph.replay()
        if self.device == "cuda":
            keep.synchronize()


class InOrder:
    """What stands for a graph on a CPU."""

    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()


def call_on(function, arena: Arena):
    args, out = call_values(arena)
    return functools.partial(function, *args, out=out)


def call_values(arena: Arena) -> tuple:
    """(arguments, output or None) of a call on an arena's tensors."""
    values = arena.values()
    out = values.pop("out", None)
    return tuple(values.values()), out


def reset_persisting_l2() -> None:
    """Makes all lines of L2 ordinary ones, also those that a kernel asked to keep. Nothing where the driver
    has no such function."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache()


# What the parent asks for: lab.worker calls these with the functions of the file.


def prepare(functions, name: str, seed: int, *point) -> dict:
    function = functions(name)
    function.replays = None  # frees the memory of the point before
    if function.device.type == "cuda":
        torch.cuda.empty_cache()
    function.replays = Replays(function, *point, seed)
    launches = function.replays.launches(function, seed)
    return {**launches, "patched": patched()}


def replay(functions, name: str, seed: int) -> dict:
    return {"us": functions(name).replays.replay(seed), "patched": patched()}


def burst(functions, name: str, count: int) -> None:
    functions(name).replays.burst(count)


def fetch(functions, name: str, number: int, file: str, nbytes: int) -> None:
    """Copies one buffer set with its guard zones to the file that the parent maps."""
    worker.shared_memory(file, nbytes).copy_(functions(name).replays.arenas[number].memory)


def release(functions, name: str) -> None:
    functions(name).replays = None
    if functions(name).device.type == "cuda":
        torch.cuda.empty_cache()
