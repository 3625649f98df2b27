"""`lab bench exchange`: what ranks pass to each other, checked and measured: the link between two GPUs, and
the op all_reduce_add beside NCCL and torch's symmetric memory.

Every rank runs the same calls in the same order, and each call waits for the other ranks: so all counts are
fixed, and none follows from a time. On a CPU the times are the host's, and say nothing about a GPU.
"""

import sys
import time

import torch

from lab.dispatch import select
from lab.errors import LabError, error_text
from lab.harness import ceiling, timing
from lab.model import ranks
from lab.ops.all_reduce_add import op
from lab.records.schema import Ceiling, OpRow
from lab.records.session import Session

SIZES = {"cuda": (8 << 10, 64 << 10, 256 << 10, 1 << 20), "cpu": (1 << 10, 8 << 10)}  # bytes of `partial`
CHECKED = {"cuda": 10_000, "cpu": 40}  # calls whose every result is compared
CALLS, SAMPLES = {"cuda": 20, "cpu": 4}, {"cuda": 50, "cpu": 5}  # of a timing: calls in a graph, replays
LINK_SIZES = (64 << 10, 1 << 20, 16 << 20, 256 << 20)
WORD_ROUNDS = 10_000
DTYPE = torch.bfloat16
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
            wrong = check(group, device, name, nbytes)
            if wrong:
                raise LabError(
                    f"all_reduce_add in {name}, {nbytes} bytes: {wrong} of the elements in {CHECKED[device]} "
                    "calls are wrong"
                )
            say(f"all_reduce_add {nbytes:>8} bytes  {name}: right in {CHECKED[device]} calls")
        for name, make in ways(group, device, backends).items():
            row = OpRow("", OP, name, "bf16", 1, {"n": nbytes // 2, "ranks": group.ranks}, cache="warm")
            row.emulated = device == "cpu"
            try:
                row.timer, stats = timed(device, make(nbytes // 2))
                for field, value in stats.fields().items():
                    setattr(row, field, value)
                say(f"all_reduce_add {nbytes:>8} bytes  {name:15} {row.us:9.2f} us")
            except (RuntimeError, AttributeError) as error:  # a peer that this machine's torch lacks
                if name in backends:
                    raise
                row.error = error_text(error)
                say(f"all_reduce_add {nbytes:>8} bytes  {name:15} {row.error}")
            rows.append(row)
    return rows


def exchanged(group, device: str, n: int):
    return group.exchange(n * DTYPE.itemsize // 4), *(
        torch.zeros(1, n, dtype=DTYPE, device=device) for _ in range(2)
    )


def check(group, device: str, name: str, nbytes: int) -> int:
    """How many elements are wrong, over all calls and ranks. On a GPU the calls are replays of a graph. All
    numbers are small integers, whose sums are exact; they differ from call to call."""
    n = nbytes // DTYPE.itemsize
    exchange, partial, residual = exchanged(group, device, n)
    add = getattr(select(name, device, {OP: name}), OP)
    step = torch.zeros((), dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    index = torch.arange(n, device=device)

    def of_rank(rank):
        return (index * (2 * rank + 3) + step) % 16

    def call():
        step.add_(1)
        partial.copy_(of_rank(group.rank)[None])
        residual.copy_((step % 8).expand(1, n))
        add(partial, residual, exchange)
        want = sum(of_rank(rank) for rank in range(group.ranks)) + step % 8
        wrong.add_((residual[0] != want).sum())

    if device == "cuda":
        graph = timing.capture([call])
        for _ in range(CHECKED[device]):
            graph.replay()
        torch.cuda.synchronize()
    else:
        for _ in range(CHECKED[device]):
            call()
    return int(group.sum(wrong))


def ways(group, device: str, backends) -> dict:
    """name -> (n) -> a call, for the op's backends and their peers."""
    world = torch.distributed.group.WORLD

    def own(name):
        def make(n):
            exchange, partial, residual = exchanged(group, device, n)
            add = getattr(select(name, device, {OP: name}), OP)
            return lambda: add(partial, residual, exchange)

        return make

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

    found = {name: own(name) for name in backends}
    if device == "cpu":
        return found | {"gloo": library}
    return found | {
        "nccl": library,
        "torch_one_shot": symmetric("one_shot_all_reduce"),
        "torch_two_shot": symmetric("two_shot_all_reduce_"),
    }


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
                for field, value in stats.fields().items():
                    setattr(row, field, value)
                row.gbps = size / stats.us / 1e3
                yield row
            torch.distributed.barrier()


def word_call(extension, exchange, rounds: int = WORD_ROUNDS) -> None:
    """A word goes back and forth between ranks 0 and 1."""
    stream = torch.cuda.current_stream().cuda_stream if exchange.table.is_cuda else 0
    extension.link_latency(peers=exchange.pointers, rounds=rounds, stream=stream)
