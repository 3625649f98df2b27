"""`lab bench exchange`: what ranks pass to each other, checked and measured: the link between two GPUs, and
the ops all_reduce_add (in one shot and in two) and all_reduce_add_rmsnorm beside NCCL and torch's symmetric
memory.

Every rank runs the same calls in the same order, and each call waits for the other ranks: so all counts are
fixed, and none follows from a time. On a CPU the times are the host's, and say nothing about a GPU.
"""

import sys
import time
from dataclasses import dataclass, field

import torch

from lab.dispatch import select
from lab.errors import LabError, error_text
from lab.harness import ceiling, timing
from lab.model import ranks
from lab.ops import all_reduce_add_rmsnorm
from lab.ops.all_reduce_add import op
from lab.records.schema import Ceiling, OpRow
from lab.records.session import Session

SIZES = {"cuda": (8 << 10, 64 << 10, 256 << 10, 1 << 20), "cpu": (1 << 10, 8 << 10)}  # bytes of `partial`
CHECKED = {"cuda": 10_000, "cpu": 40}  # calls whose every result is compared
CALLS, SAMPLES = {"cuda": 20, "cpu": 4}, {"cuda": 50, "cpu": 5}  # of a timing: calls in a graph, replays
LINK_SIZES = (64 << 10, 1 << 20, 16 << 20, 256 << 20)
WORD_ROUNDS = 10_000
DTYPE = torch.bfloat16
EPS = 1e-5
OP = op.name


def main(args, count: int) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if count < 2:
        raise LabError("lab bench exchange needs several ranks: --tensor-parallel 2")
    group = ranks.join(device)
    if group is None:
        ranks.check_devices(device, count)
        return ranks.start([sys.executable, "-m", "lab", *args.argv], count)
    backends = tuple((args.backend or "cuda,triton").split(","))
    group.agree("measurement", f"{backends} on {device}")
    group.connect()
    rows = measure(group, device, backends)
    if group.rank == 0:
        settings = {"exchange": {"ranks": count, "backends": list(backends)}}
        session = Session(args.out, device, settings, fresh=True)
        for row in rows:
            row.run = session.run
        session.add(*rows)
        session.finish(True)
        print(f"run {session.run}: {session.new} new lines in {session.path}")
    group.close()
    return 0


def measure(group, device: str, backends) -> list:
    """The rows of rank 0, with a line for each on its standard output. Raises LabError for a wrong result."""
    say = print if group.rank == 0 else (lambda *_: None)
    rows = []
    if device == "cuda":
        for row in link(group):
            say(
                f"{row.direction:10} {row.bytes:>10} bytes {row.us:9.2f} us  "
                + (f"{row.gbps:6.1f} GB/s" if row.gbps else "")
            )
            rows.append(row)
    for nbytes in SIZES[device]:
        for name in backends:
            for kind in kinds(nbytes):
                wrong = check(group, device, name, nbytes, kind)
                if wrong:
                    raise LabError(
                        f"{kind.op} in {name}{kind.label}, {nbytes} bytes: {wrong} of the elements in "
                        f"{CHECKED[device]} calls are wrong"
                    )
                say(f"{kind.op} {nbytes:>8} bytes  {name}{kind.label}: right in {CHECKED[device]} calls")
        for kind, name, make in ways(group, device, backends, nbytes):
            shape = {"n": nbytes // 2, "ranks": group.ranks, **kind.shape}
            row = OpRow("", kind.op, name, "bf16", 1, shape, cache="warm")
            row.emulated = device == "cpu"
            line = f"{kind.op} {nbytes:>8} bytes  {name + kind.label:15}"
            try:
                row.timer, stats = timed(device, make(nbytes // 2))
                for key, value in stats.fields().items():
                    setattr(row, key, value)
                say(f"{line} {row.us:9.2f} us")
            except (RuntimeError, AttributeError) as error:  # a peer that this machine's torch lacks
                if name in backends:
                    raise
                row.error = error_text(error)
                say(f"{line} {row.error}")
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Kind:
    """One way of this lab to sum over ranks. label: what a line says after the backend's name; shape: what
    tells its rows from those of the others; two_shot_bytes: see Exchange."""

    label: str = ""
    op: str = OP
    shape: dict = field(default_factory=dict)
    two_shot_bytes: int = 1 << 62


def kinds(nbytes: int) -> list[Kind]:
    found = [Kind(), Kind(" two-shot", shape={"shots": 2}, two_shot_bytes=0)]
    return found + [Kind(op=all_reduce_add_rmsnorm.op.name)] * all_reduce_add_rmsnorm.fits(1, nbytes)


def exchanged(group, device: str, name: str, n: int, kind: Kind):
    """(partial, residual, a function that sums, its result or None), for one row of n elements."""
    exchange = group.exchange(all_reduce_add_rmsnorm.slot_words(1, n * DTYPE.itemsize))
    exchange.two_shot_bytes = kind.two_shot_bytes
    partial, residual, w, y = (torch.ones(1, n, dtype=DTYPE, device=device) for _ in range(4))
    call = getattr(select(name, device, {kind.op: name}), kind.op)
    if kind.op == OP:
        return partial, residual, lambda: call(partial, residual, exchange), None
    return partial, residual, lambda: call(partial, residual, w[0], EPS, exchange, out=y), y


def check(group, device: str, name: str, nbytes: int, kind: Kind) -> int:
    """How many elements are wrong, over all calls and ranks. On a GPU the calls are replays of a graph. All
    numbers are small integers, whose sums are exact; they differ from call to call."""
    n = nbytes // DTYPE.itemsize
    partial, residual, add, y = exchanged(group, device, name, n, kind)
    step = torch.zeros((), dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    index = torch.arange(n, device=device)

    def of_rank(rank):
        return (index * (2 * rank + 3) + step) % 16

    def call():
        step.add_(1)
        partial.copy_(of_rank(group.rank)[None])
        residual.copy_((step % 8).expand(1, n))
        add()
        want = sum(of_rank(rank) for rank in range(group.ranks)) + step % 8
        wrong.add_((residual[0] != want).sum())
        if y is not None:  # rounded twice to 8 bits
            normed = want * torch.rsqrt(want.float().square().mean() + EPS)
            wrong.add_(((y[0] - normed).abs() > normed / 64).sum())

    if device == "cuda":
        graph = timing.capture([call])
        for _ in range(CHECKED[device]):
            graph.replay()
        torch.cuda.synchronize()
    else:
        for _ in range(CHECKED[device]):
            call()
    return int(group.sum(wrong))


def ways(group, device: str, backends, nbytes: int) -> list:
    """[(Kind, name, (n) -> a call)] of the ops and their peers."""
    world = torch.distributed.group.WORLD

    def own(name, kind):
        return lambda n: exchanged(group, device, name, n, kind)[2]

    def library(n):  # the sum alone, without the addition to the residual
        values = torch.zeros(n, dtype=DTYPE, device=device)
        return lambda: torch.distributed.all_reduce(values)

    def symmetric(function):
        def make(n):
            import torch.distributed._symmetric_memory as memory

            values = memory.empty((n,), dtype=DTYPE, device=torch.device(device, torch.cuda.current_device()))
            memory.rendezvous(values, world.group_name)
            values.zero_()
            return lambda: getattr(torch.ops.symm_mem, function)(values, "sum", world.group_name)

        return make

    found = [(kind, name, own(name, kind)) for name in backends for kind in kinds(nbytes)]
    if device == "cpu":
        return [*found, (Kind(), "gloo", library)]
    return [
        *found,
        (Kind(), "nccl", library),
        (Kind(), "torch_one_shot", symmetric("one_shot_all_reduce")),
        (Kind(), "torch_two_shot", symmetric("two_shot_all_reduce_")),
    ]


def timed(device: str, call):
    """(how it was timed, Stats in us of one call)."""
    if device == "cuda":
        graph = timing.GraphTimed([call] * CALLS[device])
        torch.distributed.barrier()
        samples = [graph.sample() for _ in range(SAMPLES[device] + 1)][1:]
        torch.cuda.synchronize()
        return "graph", timing.summarize([graph.read(sample) for sample in samples])
    call()
    found = []
    for _ in range(SAMPLES[device]):
        before = time.perf_counter()
        for _ in range(CALLS[device]):
            call()
        found.append((time.perf_counter() - before) / CALLS[device] * 1e6)
    return "wall", timing.summarize(found)


def link(group) -> list:
    """Ceiling rows of the link between ranks 0 and 1: how long a word takes one way, and the bandwidth at
    which rank 0 writes and reads rank 1's memory while rank 1 does nothing."""
    import torch.distributed._symmetric_memory as memory

    from lab.extension import load

    extension, world = load("_cuda"), torch.distributed.group.WORLD
    exchange = group.exchange(8)
    if group.ranks == 2:
        word = timing.GraphTimed([lambda: word_call(extension, exchange)])
        torch.distributed.barrier()
        samples = [word.sample() for _ in range(6)][1:]
        torch.cuda.synchronize()
        us = timing.summarize([word.read(sample) for sample in samples]).us / (2 * WORD_ROUNDS)
        yield Ceiling(
            "", "link word", "cuda", 8, us=us, n=len(samples), config={"rounds": WORD_ROUNDS}, best=True
        )
    own = memory.empty((max(LINK_SIZES),), dtype=torch.uint8, device=group.device)
    handle = memory.rendezvous(own, world.group_name)
    own.zero_()
    here = torch.zeros_like(own)
    torch.cuda.synchronize()
    multiprocessors = torch.cuda.get_device_properties(own.device).multi_processor_count
    for size in LINK_SIZES:
        there = handle.get_buffer(1, (size,), torch.uint8)
        for direction, src, dst in (("link write", here[:size], there), ("link read", there, here[:size])):
            torch.distributed.barrier()
            if group.rank == 0:
                blocks = max(1, min(4 * multiprocessors, size // (16 * 8 * 512)))
                call = ceiling.cuda_call(extension, ceiling.MODES["copy"], src, dst, blocks, 512)
                graph = timing.GraphTimed([call] * 4)
                samples = [graph.sample() for _ in range(20)][1:]
                torch.cuda.synchronize()
                stats = timing.summarize([graph.read(sample) for sample in samples])
                config = {"blocks": blocks, "threads": 512}
                row = Ceiling("", direction, "cuda", size, config=config, best=True)
                for key, value in stats.fields().items():
                    setattr(row, key, value)
                row.gbps = size / stats.us / 1e3
                yield row
            torch.distributed.barrier()


def word_call(extension, exchange, rounds: int = WORD_ROUNDS) -> None:
    """A word goes back and forth between ranks 0 and 1."""
    stream = torch.cuda.current_stream().cuda_stream if exchange.table.is_cuda else 0
    extension.link_latency(peers=exchange.pointers, rounds=rounds, stream=stream)
