"""The parent's part in the race: it asks the kernel's process for timed replays, between its own
measurements of the other backends, and verifies what they wrote.

The other backends run in this process, which never loads the kernel's file. A crash, an endless kernel or a
refusal costs the file's row of that size; the next size gets a new process.
"""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections import Counter

import torch

from lab.arena import Arena, allocate
from lab.check import check_call, values_of
from lab.errors import LabError
from lab.harness import timing
from lab.judge.precision import ErrorsByWidth
from lab.judge.refusal import Refusal
from lab.judge.replay import FLUSHES, call_values, values_at
from lab.judge.verdict import Outputs, first_difference, named, only_of_torch, written, wrong
from lab.worker import Died, Worker

VERIFIED_BYTES = 64 << 20  # a larger buffer set is not verified after every replay
CPU_SETS = 3
BURST_US = 30_000.0  # about how long the replays last that this process times by its own clock
COPIED_PER_US, COPIED_MOST, CONTROLS = 1 << 20, 1 << 28, 15  # of the judge's own copy: see disturbed()
SLOWER = {"cuda": 1.2, "cpu": 3.0}  # by so much they may be slower than the times that were reported


class RacedFile:
    """A worker's file as a backend of the bench, which asks it for timed(); it has one op."""

    whole = False

    def __init__(self, op, worker: Worker):
        self.op, self.worker = op, worker
        setattr(self, op.name, None)  # the bench asks which ops a backend has

    @staticmethod
    def laid_out(op, args, device: str, count: int) -> tuple:
        """(the arguments of each, the output of each) of `count` calls with the contents of `args`, in memory
        that is laid out as that of the file's calls. While the others had tensors of their own and fewer
        buffers, a copy of linear.cu was 0.2 to 0.4 us slower than linear.cu on an H100; so laid out, copies
        are the same (H200)."""
        values = values_of(op, args)
        return tuple(zip(*(call_values(Arena(values, device)) for _ in range(count))))

    def timed(self, point, dtype_name: str, rig, sets: int) -> RaceTimed:
        return RaceTimed(self.op, self.worker, point, dtype_name, rig, sets)


class RaceTimed:
    """One size of the op, sampled in the kernel's process as lab.harness.timing samples its own.

    finish() verifies the rest and returns a Refusal or None. After a refusal samples are NaN.
    """

    host = True  # each sample waits for its end

    def __init__(self, op, worker, point, dtype_name, rig, sets):
        """sets: how many buffer sets a replay uses, each once; on a GPU the other backends' have as many."""
        self.sets = sets if rig.device == "cuda" else CPU_SETS
        self.op, self.worker, self.point, self.dtype_name, self.rig = op, worker, point, dtype_name, rig
        self.device = rig.device
        self.timer = "graph" if self.device == "cuda" else "wall"
        self.errors, self.refused, self.samples = ErrorsByWidth(), None, []
        self.prepare()
        self.first_us = self.sample() if self.timer == "wall" else None

    def prepare(self) -> None:
        self.seeds = [secrets.randbits(63)]
        values = self.values(self.seeds[0], 0)
        arena = Arena(values, self.device)
        self.nbytes = arena.memory.numel()
        self.order = list(range(self.sets))
        secrets.SystemRandom().shuffle(self.order)
        del values, arena
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the other process needs it
        found = self.ask(
            "prepare",
            self.seeds[0],
            self.point,
            self.dtype_name,
            self.rig.multiprocessors,
            self.rig.l2_bytes,
            self.order,
        )
        if self.refused:
            return
        call, replay = Counter(found["call"]), Counter(found["replay"])
        expected = Counter({name: n * len(self.order) for name, n in call.items()})
        if not call:
            self.refused = Refusal("no kernel", "a call launched none")
        elif not found["own"]:
            self.refused = only_of_torch(call)
        elif not replay:
            self.refused = Refusal("empty graph", f"a graph of {len(self.order)} calls launches no kernel")
        elif replay != expected:
            self.refused = Refusal(
                "other kernels",
                f"{len(self.order)} captured calls launched {sum(replay.values())} kernels "
                f"({named(replay)}), not {sum(expected.values())} ({named(expected)}) as single calls do",
            )

    def values(self, seed: int, number: int) -> dict:
        return values_at(
            self.op, self.point, self.dtype_name, self.device, self.rig.multiprocessors, seed, number
        )

    def ask(self, what: str, *arguments):
        """What the kernel's process answers; None after a refusal or if it fails now."""
        if self.refused:
            return None
        try:
            if self.worker.process is None:
                self.worker.start()
            found = self.worker.ask({"run": what, "arguments": (self.op.name, *arguments)})["result"]
            if found is not None and found["patched"]:
                names = ", ".join(map(str, found["patched"][:4]))
                self.refused = Refusal("patched functions", f"the file replaced {names}")
            return found
        except Died as died:
            self.refused = Refusal(died.kind, f"in the race ({what}) the kernel's process {died}")
        except LabError as error:
            self.worker.kill()  # its CUDA context may be lost
            unjoined = "unjoined" in str(error).lower()  # a captured stream that the call's does not wait for
            kind = "late work" if unjoined else "error"
            self.refused = Refusal(kind, f"in the race ({what}): {error}")
        except (KeyError, TypeError):
            self.worker.kill()
            self.refused = Refusal(
                "forged reply", f"in the race ({what}) the kernel's process answered nonsense"
            )
        return None

    def sample(self) -> float:
        """Microseconds a call of one replay with new contents; verifies one of its calls, chosen
        afterwards."""
        if self.refused:
            return math.nan
        if self.device == "cuda":
            torch.cuda.synchronize()  # the two processes share the device
        self.seeds.append(secrets.randbits(63))
        found = self.ask("replay", self.seeds[-1])
        us = float(found["us"]) if found else math.nan
        if found and (len(self.samples) == 0 or secrets.randbelow(self.nbytes) < VERIFIED_BYTES):
            self.verify(self.seeds[-1], secrets.choice(self.order))
        self.samples.append(us)
        for _ in range(FLUSHES if self.rig.flush else 0):
            self.rig.flush()  # the next graph of this process must not find the device idle
        return us

    def read(self, sample: float) -> float:
        return sample

    def verify(self, seed: int, number: int) -> dict | None:
        """Compares what a replay wrote into one buffer set; returns the outputs by name."""
        arena, outputs = Arena(self.values(seed, number), self.device), Outputs(self.errors)
        outcome = check_call(self.op, Fetched(self, number), arena, {"out", *self.op.state}, outputs)
        if self.refused:
            return None
        if outcome.error:
            self.refused = self.named_refusal(outcome, arena, outputs, number)
        return written(self.op, arena)

    def named_refusal(self, outcome, arena, outputs, number) -> Refusal:
        kinds = {"overrun": "out of bounds", "changed": "changed input"}
        if outcome.kind in kinds:
            return Refusal(kinds[outcome.kind], f"in the race: {outcome.error}")
        for seed in (self.seeds[0], self.seeds[-2]):  # that of the first calls, and of the replay before
            values = self.values(seed, number)
            values.pop("out", None)
            found = wrong(self.op, outcome, arena, outputs, list(self.op.reference(**values)))
            if found.kind == "remembered result":
                break
        return Refusal(found.kind, f"in the race: {found.seen}")

    def finish(self) -> Refusal | None:
        if not self.refused and self.samples:
            self.repeat()
        if not self.refused and self.samples:
            self.clock()
        if not self.refused:
            self.refused = self.errors.refusal()
        return self.refused

    def repeat(self) -> None:
        """The last replay once more: the same bits?"""
        seed, number = self.seeds[-1], secrets.choice(self.order)
        outputs = []
        for _ in range(2):
            if self.ask("replay", seed) is None or (found := self.verify(seed, number)) is None:
                return
            outputs.append({name: t.clone() for name, t in found.items()})
        if not self.refused and (differs := first_difference(*outputs)):
            self.refused = Refusal(
                "not repeatable", f"two replays on the same inputs give different bits in {differs}"
            )

    def clock(self) -> None:
        """Compares the reported times with this process's clock, by the difference of two bursts of
        replays."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        reported = statistics.median(self.samples) * len(self.order)
        once = max(self.burst_us(1), 1.0)
        count = max(2, math.ceil(BURST_US / max(reported, once)))
        seen = self.burst_us(count, tries=3) if reported > 0 else math.inf
        if not self.refused and seen > SLOWER[self.device] * reported + 2.0:
            said = f"its process reports {reported:.1f} us for what takes {seen:.1f} us by the judge's clock"
            if reported > 0 and disturbed(self.device, seen, count):
                self.refused = Refusal(
                    "disturbed",
                    f"{said}, and a copy in the judge's own process is as contradictory: another program "
                    "uses the device; run this again when it is idle",
                )
            else:
                self.refused = Refusal("forged times", said)

    def burst_us(self, count: int, tries: int = 1) -> float:
        """Microseconds a replay. The host's other work makes bursts longer, never shorter, so of each length
        the shortest counts: the shortest difference would be that of a short burst that was held up."""
        shortest = []
        for n in (1, 1 + count):
            times = []
            for _ in range(tries):
                start = time.perf_counter()
                self.ask("burst", n)
                times.append(time.perf_counter() - start)
            shortest.append(min(times))
        return (shortest[1] - shortest[0]) * 1e6 / count

    def close(self) -> None:
        self.ask("release")


def disturbed(device: str, us: float, count: int) -> bool:
    """Whether this process's clock contradicts the device's own time stamps, too: of a copy of about `us`
    microseconds, alone and `count` times in a row. So it is where another program uses the GPU, because a
    short replay ends before its turn comes."""
    if device != "cuda":
        return False
    source = torch.zeros(min(int(us * COPIED_PER_US), COPIED_MOST), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    replay = timing.GraphTimed([lambda: target.copy_(source)])
    reported = []
    for _ in range(CONTROLS):
        sample = replay.sample()
        torch.cuda.synchronize()
        reported.append(replay.read(sample))
    seen = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            replay.graph.replay()
        torch.cuda.synchronize()
        seen.append((time.perf_counter() - start) * 1e6 / count)
    replay.close()
    return min(seen) > SLOWER[device] * statistics.median(reported) + 2.0


class Fetched:
    """A call of a timed replay, as lab.check.check_call takes a function: it has been made already."""

    def __init__(self, race: RaceTimed, number: int):
        self.race, self.number, self.file = race, number, race.worker.file

    def run(self, arena: Arena) -> str | None:
        race, nbytes = self.race, arena.memory.numel()
        shared = allocate(nbytes, torch.device("cpu"), race.worker.file)
        race.ask("fetch", self.number, race.worker.file_name, nbytes)
        arena.memory.copy_(shared)
        return str(race.refused) if race.refused else None
