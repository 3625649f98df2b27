"""How long a call takes: distinct buffers in one CUDA graph, interleaved samples, medians with their spread.

A `Timed` is something that can be sampled: `GraphTimed` (device time), `EagerTimed` (host included),
`WallTimed` (CPU, emulated). `measure` samples several of them ABBA, so that a drift of the clock hits all
alike.

Why a graph: events around one launch of a few microseconds measure the launch. A graph of hundreds of calls,
replayed between two events while the queue is never empty, measures the device. Why distinct buffers: an op
that re-reads what it read a moment ago measures L2. Sets rotate until they total five times L2; where ops are
too small for that, an untimed read of five times L2 runs between replays and each set is used once a replay.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lab.formats import PackedMatrix

COLD_L2 = 5  # cold: at least this many times L2 passes between two uses of a buffer
MAX_SETS = 256  # distinct buffer sets a graph rotates over
GRAPH_US = 700.0  # a graph lasts at least about this long, so that its own launch (1-2 us) is below 0.3%
ASSUMED_GBPS = 2500.0  # only to size graphs before anything was measured
LAUNCH_US = 2.0  # the least a kernel in a graph takes, for the same purpose


@dataclass(frozen=True)
class Stats:
    """Microseconds per call: median, 10th, 90th and 99th percentile of n samples."""

    us: float
    us_p10: float
    us_p90: float
    us_p99: float
    n: int

    def fields(self, p99=False):
        names = ("us", "us_p10", "us_p90", "n") + (("us_p99",) if p99 else ())
        return {name: getattr(self, name) for name in names}


def summarize(samples: Sequence[float]) -> Stats:
    ordered = sorted(samples)
    return Stats(
        statistics.median(ordered),
        percentile(ordered, 0.10),
        percentile(ordered, 0.90),
        percentile(ordered, 0.99),
        len(ordered),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as numpy.percentile does."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# Buffers


def clone_args(args: Sequence) -> tuple:
    """The arguments with every tensor in new memory; views keep their strides and go on sharing one
    storage."""
    storages = {}

    def clone(t):
        if isinstance(t, PackedMatrix):
            return replace(t, codes=clone(t.codes), scales=clone(t.scales))
        if not isinstance(t, torch.Tensor):
            return t
        old = t.untyped_storage()
        if old.data_ptr() not in storages:
            storages[old.data_ptr()] = old.clone()
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        return new.set_(storages[old.data_ptr()], t.storage_offset(), t.size(), t.stride())

    return tuple(clone(a) for a in args)


def bytes_of_args(args: Sequence) -> int:
    """Bytes of memory that the tensors of a call occupy, each storage counted once."""
    tensors = [t for a in args for t in (a.tensors() if isinstance(a, PackedMatrix) else (a,))]
    return sum(
        {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor)}.values()
    )


def plan_sets(
    nbytes: int,
    l2_bytes: int,
    set_bytes: int | None = None,
    free_bytes: int | None = None,
    once: bool = False,
):
    """(sets, calls, flush): how many buffer sets, calls a graph, and whether a flush runs between replays.

    nbytes: what one call moves. set_bytes: what one set occupies (default nbytes). free_bytes: memory to stay
    within. once: a replay uses each set once, so that no call finds its result there already; of sets there
    are then as many as memory allows for a graph of the usual length.
    """
    target = COLD_L2 * l2_bytes
    calls = math.ceil(GRAPH_US / max(nbytes / ASSUMED_GBPS / 1e3, LAUNCH_US))
    sets = max(math.ceil(target / max(nbytes, 1)), calls if once else 0)
    sets = max(2, min(MAX_SETS, sets))
    if free_bytes is not None:
        sets = max(2, min(sets, int(free_bytes // max(set_bytes or nbytes, 1))))
    if once or sets * nbytes < target:
        return sets, sets, True
    return sets, math.ceil(calls / sets) * sets, False


class Flush:
    """Reads five times L2, so that nothing of before is left in it. A read: a write would leave dirty lines
    behind."""

    def __init__(self, l2_bytes: int, device):
        self.buffer = torch.randn(COLD_L2 * l2_bytes // 4, device=device)

    def __call__(self):
        self.buffer.sum()


# What can be sampled


class GraphTimed:
    """`calls` (no arguments each) captured in order in one CUDA graph.

    before: runs untimed before every replay (a flush, a state to restore). graph: one that exists already,
    instead.
    """

    timer, host = "graph", False

    def __init__(self, calls: Sequence[Callable], before: Callable | None = None, graph=None):
        self.count, self.before, self.owned = len(calls), before, graph is None
        self.calls = calls  # they hold the memory whose addresses the graph has captured
        self.graph = graph or capture(calls)

    def sample(self):
        if self.before:
            self.before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def read(self, sample) -> float:
        return sample[0].elapsed_time(sample[1]) * 1e3 / self.count

    def close(self):
        if self.owned:
            self.graph.reset()


def capture(calls: Sequence[Callable]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls in order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles what compiles at first use, outside the capture
        calls[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return graph


class EagerTimed:
    """Calls made one by one from Python with the queue empty before: the time a caller waits, host
    included."""

    timer, host = "event", True

    def __init__(self, calls: Sequence[Callable], before: Callable | None = None):
        self.calls, self.before = calls, before
        calls[0]()

    def sample(self):
        if self.before:
            self.before()
        torch.cuda.synchronize()  # or the device's backlog would hide the host's time
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in self.calls:
            call()
        end.record()
        return start, end

    def read(self, sample) -> float:
        return sample[0].elapsed_time(sample[1]) * 1e3 / len(self.calls)

    def close(self):
        pass


class WallTimed:
    """The host's clock around a call on the CPU. Emulated: it says nothing about a GPU."""

    timer, host = "wall", True

    def __init__(self, call: Callable, before: Callable | None = None):
        self.call, self.before = call, before
        self.first_us = self.sample()  # warms up; an interpreted kernel is too slow to do that twice

    def sample(self):
        if self.before:
            self.before()
        start = time.perf_counter()
        self.call()
        return (time.perf_counter() - start) * 1e6

    def read(self, sample) -> float:
        return sample

    def close(self):
        pass


def measure(timed: dict, seconds: float = 0.15, least: int = 15, most: int = 200) -> dict[str, Stats]:
    """Samples every entry in turn, A B B A, and summarizes each.

    seconds: about how long the sampling of all entries together lasts; `least` and `most` bound the samples
    of each.
    """
    names = list(timed)
    sync = torch.cuda.synchronize if any(t.timer != "wall" for t in timed.values()) else lambda: None
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of an eager sample would be timed
    try:
        start = time.perf_counter()
        for name in names:  # warms up, and says how many rounds fit
            if timed[name].timer != "wall":
                timed[name].sample()
        sync()
        once = (
            time.perf_counter() - start + sum(t.first_us for t in timed.values() if t.timer == "wall") * 1e-6
        )
        rounds = int(min(max(seconds / max(once, 1e-6), least), most))
        samples = {name: [] for name in names}
        for i in range(rounds + 1):
            for name in names if i % 2 == 0 else reversed(names):
                # A graph's first replay finds the queue idle, so its time would hold the host's launch time.
                # Graphs therefore take one sample more in round 0, which is dropped below.
                if i or not timed[name].host:
                    samples[name].append(timed[name].sample())
        sync()
    finally:
        if collecting:
            gc.enable()
    kept = {name: samples[name][0 if timed[name].host else 1 :] for name in names}
    return {name: summarize([timed[name].read(s) for s in kept[name]]) for name in names}


def device_events(run):
    """[(name, start ns, duration ns)] of what the device did during run(), in order of start."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [
        (e.name(), e.start_ns(), e.duration_ns())
        for e in profiled.profiler.kineto_results.events()
        if e.device_type() == DeviceType.CUDA
    ]
    return sorted(events, key=lambda e: e[1])


def settle(timed, window_s: float = 0.1, tolerance: float = 0.005, limit_s: float = 4.0) -> dict:
    """Runs `timed` until the medians of two successive windows agree: the clocks have settled.

    Returns {"seconds", "settled", "us"}: how long it took, whether it did, and the last median.
    """
    begin, before = time.perf_counter(), None
    while True:
        now = measure({"load": timed}, window_s, 5, 10_000)["load"].us
        elapsed = time.perf_counter() - begin
        settled = before is not None and abs(now - before) <= tolerance * now
        if (settled and elapsed > 0.5) or elapsed > limit_s:
            return {"seconds": round(elapsed, 2), "settled": settled, "us": now}
        before = now
