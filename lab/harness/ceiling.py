"""The bandwidth that a plain read, copy or write reaches on this card, by size: what every share divides by.

Each direction and size is measured with the CUDA kernel (cuda_src/bandwidth.cu), the Triton kernel
(triton_kernels/bandwidth.py) and, for a copy, torch's own; in several launch shapes; the best one counts.
Sizes below 64 MiB are there because a short read or copy cannot reach the ceiling, and a small op should be
held to what is reachable at its size.
"""

import math
from dataclasses import dataclass, field

import torch

from lab.errors import Unavailable, error_text
from lab.extension import load
from lab.harness import timing
from lab.records.compare import MOST_OF_CEILING
from lab.records.schema import Ceiling

MIB = 1 << 20
SIZES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB)
QUICK_SIZES = (MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB)
DIRECTIONS = ("read", "copy", "write")  # write last: it replaces the random data
MODES = {"read": 0, "copy": 1, "write": 2}
CUDA_SHAPES = (
    {"blocks_per_sm": 4, "threads": 512},
    {"blocks_per_sm": 2, "threads": 1024},
    {"blocks_per_sm": 16, "threads": 256},
)
TRITON_SHAPES = (
    {"programs_per_sm": 8, "block": 8192, "warps": 8},
    {"programs_per_sm": 8, "block": 4096, "warps": 4},
    {"programs_per_sm": 4, "block": 16384, "warps": 16},
)


@dataclass
class Ceilings:
    """The ceilings of one run: {direction: [(bytes, gbps), ...] by size}; empty on a CPU."""

    curves: dict = field(default_factory=dict)

    @classmethod
    def of(cls, rows):
        """From ceiling records: the best of every direction and size."""
        best = {}
        for r in rows:
            if r.kind == "ceiling" and r.gbps:
                best[r.direction, r.bytes] = max(r.gbps, best.get((r.direction, r.bytes), 0.0))
        return cls(
            {
                d: sorted((size, gbps) for (dd, size), gbps in best.items() if dd == d)
                for d in {d for d, _ in best}
            }
        )

    def best(self, direction="read"):
        """GB/s of the best size; None where nothing was measured."""
        return max((gbps for _, gbps in self.curves.get(direction, ())), default=None)

    def at(self, direction, nbytes):
        """GB/s that a plain kernel of nbytes reaches: its time interpolated linearly between the sizes
        measured."""
        curve = self.curves.get(direction)
        if not curve or nbytes <= 0:
            return None
        times = [(size, size / gbps) for size, gbps in curve]  # ns
        if len(times) == 1:
            return curve[0][1]
        upper = next((i for i, (size, _) in enumerate(times) if size >= nbytes), len(times) - 1)
        (s0, t0), (s1, t1) = times[max(upper - 1, 0)], times[max(upper, 1)]
        slope = (t1 - t0) / (s1 - s0)
        if upper == len(times) - 1 and nbytes > s1:
            return curve[-1][1]  # longer than any measured: the longest's rate
        return nbytes / max(t0 + slope * (nbytes - s0), 1e-9)

    def fields(self, direction, nbytes, us, cache="cold", l2_bytes=None):
        """gbps, of_ceiling, of_stream and flag of a measurement; {} with no ceiling (nothing is claimed on a
        CPU)."""
        if not self.best(direction) or not us or not nbytes:
            return {}
        gbps = nbytes / us / 1e3
        share = gbps / self.best(direction)
        flag = None
        if cache == "warm":
            if l2_bytes and nbytes < l2_bytes:
                flag = "fits in L2"
        elif share > MOST_OF_CEILING:
            flag = "above the ceiling"
        return {
            "gbps": gbps,
            "of_ceiling": share,
            "of_stream": gbps / self.at(direction, nbytes),
            "flag": flag,
        }


def cuda_call(extension, mode, src, dst, blocks, threads, passes=1):
    """A call of the CUDA bandwidth kernel over torch tensors of equal size (for a read, dst is 16 bytes of
    sink)."""
    nbytes = (dst if mode == MODES["write"] else src).nbytes

    def call():
        extension.bandwidth(
            src=src.data_ptr(),
            dst=dst.data_ptr(),
            bytes=nbytes,
            mode=mode,
            passes=passes,
            blocks=blocks,
            threads=threads,
            stream=torch.cuda.current_stream().cuda_stream if src.is_cuda else 0,
        )

    return call


def triton_call(mode, src, dst, programs, block, warps, passes=1):
    from triton_kernels.bandwidth import bandwidth

    return lambda: bandwidth(src, dst, mode, passes, programs, block, warps)


def implementations(direction, sms, payload):
    """[(backend, config, make)] where make(src, dst) is a call; a grid has at most one block for each
    tile."""
    mode, found = MODES[direction], []
    try:
        _cuda = load("_cuda")
    except Unavailable:
        _cuda = None
    if _cuda is not None:
        for shape in CUDA_SHAPES:
            tiles = math.ceil(payload / (16 * 8 * shape["threads"]))  # 8 vectors of 16 bytes a thread
            blocks = max(1, min(shape["blocks_per_sm"] * sms, tiles))
            found.append(
                (
                    "cuda",
                    shape,
                    lambda src, dst, b=blocks, t=shape["threads"]: cuda_call(_cuda, mode, src, dst, b, t),
                )
            )
    for shape in TRITON_SHAPES:
        programs = max(1, min(shape["programs_per_sm"] * sms, math.ceil(payload / (4 * shape["block"]))))
        found.append(
            (
                "triton",
                shape,
                lambda src, dst, p=programs, s=shape: triton_call(mode, src, dst, p, s["block"], s["warps"]),
            )
        )
    if direction == "copy":
        found.append(("torch", {}, lambda src, dst: lambda: dst.copy_(src)))
    return found


def pieces(arena, direction, size, sink):
    """[(src, dst)]: distinct parts of the arena, each of `size` bytes in all: a copy reads the one half and
    writes the other."""
    if direction == "copy":
        half, step = arena.numel() // 2, size // 8
        src, dst = arena[:half], arena[half:]
        return [(src[i : i + step], dst[i : i + step]) for i in range(0, half - step + 1, step)]
    parts = arena[: arena.numel() // (size // 4) * (size // 4)].split(size // 4)
    return [(p, sink) if direction == "read" else (p, p) for p in parts]


def measure(run, quick=False, device="cuda", progress=None, seconds=0.25, known=()):
    """Measures the ceilings and yields lists of Ceiling records, one list per direction and size.

    known: (direction, bytes) pairs already recorded, left out. A launch shape that fails is a record with
    `error`.
    """
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    free = torch.cuda.mem_get_info()[0]
    sizes = [s for s in (QUICK_SIZES if quick else SIZES) if s <= free // 2]
    arena = torch.empty(max(sizes) // 4, dtype=torch.int32, device=device).random_()
    sink = torch.zeros(4, dtype=torch.int32, device=device)
    flush = timing.Flush(properties.L2_cache_size, device)
    for direction in DIRECTIONS:
        for size in sizes:
            if (direction, size) in known:
                continue
            if progress:
                progress(f"ceiling {direction} {size // MIB or size / MIB} MiB")
            yield measure_one(
                run, direction, size, arena, sink, flush, properties, seconds / (2 if quick else 1)
            )


def measure_one(run, direction, size, arena, sink, flush, properties, seconds):
    """The records of one direction and size: every launch shape interleaved, the best marked."""
    parts = pieces(arena, direction, size, sink)
    sets, calls, flushed = timing.plan_sets(size, properties.L2_cache_size)
    sets = min(sets, len(parts))
    payload = size // 2 if direction == "copy" else size
    rows, timed = [], {}
    ways = implementations(direction, properties.multi_processor_count, payload)
    for number, (backend, config, make) in enumerate(ways):
        row = Ceiling(run, direction, backend, size, config=dict(config))
        rows.append(row)
        try:
            distinct = [make(*parts[i]) for i in range(sets)]
            timed[number] = timing.GraphTimed(
                [distinct[i % sets] for i in range(calls)], flush if flushed else None
            )
        except Exception as e:  # one shape that cannot run must not cost the others
            row.error = error_text(e)
    if timed:
        for number, stats in timing.measure(timed, seconds).items():
            for name, value in stats.fields().items():
                setattr(rows[number], name, value)
            rows[number].gbps = size / stats.us / 1e3
        max((rows[n] for n in timed), key=lambda r: r.gbps).best = True
    for t in timed.values():
        t.close()
    return rows
