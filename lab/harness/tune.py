"""`lab tune OP ...`: tries Triton launch settings on this GPU, shape by shape, and keeps the fastest that is right.

For each shape of the presets a bounded list of candidates is compiled in parallel without the GPU; those that spill are
dropped. The rest race over rotating cold weights inside CUDA graphs, the four fastest again with more samples, and the
fastest whose output is right joins triton_kernels/tuned/sm_NN.json, with GPU and Triton version. Launchers read that
table before their own. A run that the budget stops keeps what it found; the same command again goes on after it.
"""
import concurrent.futures
import concurrent.futures.process
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import torch

from lab.dispatch import DTYPES, known
from lab.errors import LabError
from lab.files import write_whole
from lab.harness import shapes

FINALISTS = 4
RACE_S, FINAL_S = 0.02, 0.1         # seconds of samples of each candidate in the first race, and of each finalist
GAIN = 0.01                         # a candidate must beat the settings by hand by more than that
SHARED_BYTES = 200 << 10            # a program's tiles in flight must fit in a multiprocessor's shared memory
WORKERS = 16
BY_HAND = "by hand"


# Candidates: a list of settings for one shape. Registers are counted a thread, in 32-bit words.

def products(rows, itemsize, n, k, parts=1, whole_rows=True):
    """For the fused matrix products: the path with float32 arithmetic up to 8 rows, the one with dots from 4 on."""
    found = []
    if rows <= 8:
        found += sums(rows, itemsize, n, k, parts, whole_rows)
    if rows >= 4:
        found += dots(rows, itemsize, n, k, parts)
    return found


def sums(rows, itemsize, n, k, parts, whole_rows):
    found = []
    block_b = power_of_two(rows)
    for warps, block_n in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        vector = 16 // itemsize * 32 * warps                    # columns that the threads load at once
        widths = [power_of_two(k)] if whole_rows else sorted({min(vector * i, power_of_two(k)) for i in (1, 2, 4, 8)})
        for block_k in widths:
            lane = block_k * itemsize / (4 * 32 * warps)
            weights, x = block_n * parts * lane, block_b * lane
            if not (4 <= weights <= 64 and x <= 64 and weights + 2 * x <= 128):
                continue
            base = dict(path="sum", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps)
            tiles = -(-n // block_n)
            if whole_rows:
                resident = {0} | {p for p in (16 // warps, 32 // warps) if p and tiles > 108 * p}
                found += [dict(base, per_multiprocessor=p) for p in sorted(resident)]
            else:
                found += [dict(base, UNROLL=u) for u in ((1,) if block_k >= k else (2, 4))]
    return found


def dots(rows, itemsize, n, k, parts):
    found = []
    block_b = max(power_of_two(rows), 16)
    narrow = itemsize == 2
    for block_n, block_k, warps, stages in itertools.product(
            (16, 32, 64, 128), (64, 128, 256) if narrow else (16, 32, 64), (2, 4, 8), (3, 4, 6)):
        rows_of_w = block_n * parts
        tile = (rows_of_w + block_b) * block_k * itemsize
        if not 16 << 10 <= tile * (stages - 1) <= SHARED_BYTES or rows_of_w > 128 or block_k > power_of_two(k):
            continue
        held = (2 * tile / 4 + rows_of_w * block_b) / (32 * warps)          # the first tile, x on its way, the sums
        if held > 160 or rows_of_w * block_k < 512 * warps:
            continue
        base = dict(path="dot", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, STAGES=stages)
        found += [base] + [dict(base, per_multiprocessor=p) for p in (2,) if -(-n // block_n) > 2 * 108 * p]
    return found


def basic_linear(rows, itemsize, n, k):
    found = []
    block_b = power_of_two(rows)
    if rows <= 8:
        for warps, block_n, wide, unroll in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)):
            block_k = 512 // itemsize * warps * wide
            lane = block_k * itemsize / (4 * 32 * warps)
            if block_k <= power_of_two(k) and 4 <= block_n * lane <= 32 and block_b * block_n * lane <= 128:
                found.append(dict(path="sum", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, STAGES=1,
                                  UNROLL=unroll))
    if rows >= 4:
        found += [dict({key: v for key, v in c.items() if key != "per_multiprocessor"}, UNROLL=1)
                  for c in dots(rows, itemsize, n, k, 1) if "per_multiprocessor" not in c]
    return found


def attention(rows, itemsize, head_dim):
    return [dict(tile=tile, min_rows=16, num_warps=warps, num_stages=stages)
            for tile, warps, stages in itertools.product((32, 64, 128), (1, 2, 4, 8), (3, 4, 5, 6))
            if 2 * tile * power_of_two(head_dim) * itemsize * (stages - 2) <= SHARED_BYTES
            and tile * power_of_two(head_dim) >= 1024 * warps]


SPACES = {
    "linear": lambda rows, itemsize, s: basic_linear(rows, itemsize, s["n"], s["k"]),
    "norm_linear": lambda rows, itemsize, s: products(rows, itemsize, s["n"], s["k"]),
    "norm_linear_silu_mul": lambda rows, itemsize, s: products(rows, itemsize, s["n"], s["k"], parts=2),
    "linear_add": lambda rows, itemsize, s: products(rows, itemsize, s["n"], s["k"], whole_rows=False),
    "norm_linear_argmax": lambda rows, itemsize, s: products(rows, itemsize, s["n"], s["k"]),
    "decode_attention": lambda rows, itemsize, s: attention(rows, itemsize, s["head_dim"]),
    "rope_append_attention": lambda rows, itemsize, s: attention(rows, itemsize, s["head_dim"]),
}


def power_of_two(n):
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def candidates(op, rows, itemsize, shape, tries):
    """At most `tries` settings of an op's space: all, or the same random choice every time."""
    space = SPACES[op](rows, itemsize, shape)
    return space if len(space) <= tries else random.Random(0).sample(space, tries)


def key_shape(point):
    """What a point's settings are looked up by, beside the number of rows."""
    names = ("n", "k") if "n" in point.shape else ("q_heads", "kv_heads", "head_dim", "page_size")
    return {name: point.shape[name] for name in names}


# Compiling: in processes of their own, without the GPU; Triton's cache on disk hands the result to this process.

def compile_candidate(point, dtype_name, arch, multiprocessors, settings):
    """dict(regs, stack, local, shared) of the kernel that `settings` give, or {"error": what the compiler said}."""
    from lab.inspect.call import Blank
    from lab.ops import find
    from triton_kernels import common, offline
    from triton_kernels.settings import forced
    try:
        op = find(point.op)
        args, _ = shapes.arguments(op, point, Blank(DTYPES[dtype_name]), multiprocessors)
        with forced(op.name, settings), common.recording(arch) as launches:
            op.triton(*args, out=op.outputs(*args))
        return offline.usage(offline.compile(launches[-1], arch))
    except Exception as error:          # whatever a compiler raises: this candidate cannot be launched
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


@contextlib.contextmanager
def compilers():
    """An executor of processes that know nothing of this one's CUDA context."""
    pool = concurrent.futures.ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1),
                                                  multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Timing, on the GPU.

class Race:
    """Times settings of one point against each other, and checks what they compute."""

    def __init__(self, rig, point, dtype_name):
        from lab.harness import ops_bench, timing
        from lab.ops import find
        self.op, self.rig = find(point.op), rig
        self.bound = ops_bench._Bound(self.op, point, DTYPES[dtype_name], rig)
        self.fresh = timing.clone_args(self.bound.sets[0])      # a residual that a race has added to thousands of times
        self.want = None                                        # would hide what the last addition did

    def times(self, entrants, seconds):
        """{label: microseconds} of each entry of {label: settings or None}, None standing for those by hand.
        What cannot be launched is left out."""
        from triton.runtime.errors import OutOfResources
        from lab.harness import ops_bench, timing
        from triton_kernels.settings import forced
        timed = {}
        for label, settings in entrants.items():
            with forced(self.op.name, settings or {}), contextlib.suppress(RuntimeError, OutOfResources):
                timed[label] = self.bound.timed("triton", "in_model", "graph", None)
        ops_bench.alive(self.op.name)               # one that broke the CUDA context must not pass as one that lost
        stats = timing.measure(timed, seconds * len(timed), 5, 100) if timed else {}
        for one in timed.values():
            one.close()
        return {label: s.us for label, s in stats.items()}

    def error(self, settings):
        """What is wrong with the output under `settings`, or None."""
        from lab.check import POISON, compare
        from lab.harness import timing
        from triton_kernels.settings import forced
        op, before, args = self.op, self.fresh, timing.clone_args(self.fresh)
        if self.want is None:
            self.want = op.reference(*before), op.tolerance(*before)
        want, limits = self.want
        out = op.outputs(*args)
        if out is not None:
            out.fill_(torch.nan if out.is_floating_point() else POISON)
        with forced(op.name, settings or {}):
            op.triton(*args, out=out)
        got = ([] if out is None else [out]) + [args[i] for i in op.mutates if i < len(args)]
        if op.verify is not None:
            wrong = op.verify(out, *before)
            if wrong:
                return wrong
            got, want = got[1:], want[1:]
        return next((o.error for o in (compare(g, w, *limits) for g, w in zip(got, want)) if o.error), None)


def tune_point(race, settings, usages):
    """(winner, times, dropped): the fastest right settings (None: those by hand), {label: us}, and why others fell out.

    settings: the candidates. usages: the compiler's report of each, in the same order. race: `times` and `error`.
    """
    dropped, entrants = [], {BY_HAND: None}
    for i, (candidate, usage) in enumerate(zip(settings, usages, strict=True)):
        if "error" in usage:
            dropped.append((candidate, usage["error"]))
        elif usage["local"] or usage["stack"]:
            dropped.append((candidate, f"spills {usage['local'] + usage['stack']} bytes a thread"))
        else:
            entrants[i] = candidate
    first = race.times(entrants, RACE_S)
    dropped += [(entrants[label], "cannot be launched") for label in entrants if label not in [*first, BY_HAND]]
    best = sorted((label for label in first if label != BY_HAND), key=first.get)[:FINALISTS]
    final = race.times({label: entrants[label] for label in [BY_HAND, *best] if label in first}, FINAL_S)
    times = {**first, **final}
    for label in sorted((label for label in final if label != BY_HAND), key=final.get):
        if BY_HAND in final and final[label] > (1 - GAIN) * final[BY_HAND]:
            break
        wrong = race.error(entrants[label])
        if wrong is None:
            return entrants[label], times, dropped
        dropped.append((entrants[label], f"wrong: {wrong}"))
    return None, times, dropped


# The table.

def entry_of(point, itemsize, settings, times, tried, gpu, triton_version):
    """What the table says of a tuned point; settings None: those by hand were the fastest, and {} records it."""
    us = min(times.values()) if settings is not None else times.get(BY_HAND)
    return {"op": point.op, "itemsize": itemsize, "rows": point.batch, "shape": key_shape(point),
            "settings": settings or {}, "us": round(us, 3) if us else None,
            "us_by_hand": round(times[BY_HAND], 3) if BY_HAND in times else None, "tried": tried,
            "context": point.context, "gpu": gpu, "triton": triton_version}


def identity(entry):
    return entry["op"], entry["itemsize"], entry["rows"], tuple(entry["shape"].items())


def write(path, entries):
    """One entry a line, so that a difference can be read; beside and renamed."""
    ordered = sorted(entries, key=lambda e: (e["op"], tuple(e["shape"].values()), e["itemsize"], e["rows"]))
    text = '{"entries": [\n' + ",\n".join(json.dumps(e) for e in ordered) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def add_arguments(parser):
    parser.add_argument("op", nargs="+", help=f"{', '.join(SPACES)}, or all")
    parser.add_argument("--model", default=",".join(shapes.MODELS), metavar="A,B", help="presets whose shapes to tune")
    parser.add_argument("--batch", default="1,4,16,64", metavar="N,N", help="batch sizes (default 1,4,16,64)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="of the attention ops (default 8192)")
    parser.add_argument("--dtype", default="bf16", help="bf16 (default; fp16 shares its settings) or fp32")
    parser.add_argument("--tries", type=int, default=40, metavar="N", help="most candidates of a shape (default 40)")
    parser.add_argument("--budget-seconds", type=float, default=600.0, metavar="S",
                        help="stop cleanly after S seconds; run again to go on (default 600)")
    parser.add_argument("--again", action="store_true",
                        help="also the shapes that the table has from this GPU and Triton")
    parser.add_argument("--out", metavar="FILE", help="the table (default triton_kernels/tuned/sm_NN.json)")


def main(args) -> int:
    started = time.monotonic()
    from lab.harness.bench import names, numbers
    if not torch.cuda.is_available():
        raise LabError("lab tune needs a GPU: settings are chosen by time")
    import triton
    from lab.harness import ops_bench
    from triton_kernels import settings
    ops = list(SPACES) if args.op == ["all"] else [known(name, list(SPACES), "op to tune") for name in args.op]
    known(args.dtype, list(DTYPES), "dtype")
    if args.tries < 1 or args.budget_seconds <= 0 or args.context < 1:
        raise LabError("--tries, --context and --budget-seconds must be positive")
    itemsize = DTYPES[args.dtype].itemsize
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = f"sm_{gpu.major}{gpu.minor}"
    path = Path(args.out) if args.out else settings.TUNED / f"{arch}.json"
    table = {identity(e): e for e in settings.read_tuned(path)["entries"]}
    points = [p for p in shapes.points(names(args.model), numbers(args.batch), (args.context,), ops) if p.case is None]
    rig = ops_bench.make_rig(ops_bench.load_backends(["triton"], "cuda", True)[0], "cuda", None)
    rig.vendor = False

    def known_already(point):
        e = table.get((point.op, itemsize, point.batch, tuple(key_shape(point).items())))
        return e is not None and e["gpu"] == gpu.name and e["triton"] == triton.__version__

    todo = [p for p in points if args.again or not known_already(p)]

    def keep(point, winner, times, dropped):
        e = entry_of(point, itemsize, winner, times, len(times) - (BY_HAND in times), gpu.name, triton.__version__)
        table[identity(e)] = e
        write(path, table.values())
        print(report(point, e, dropped), flush=True)

    with compilers() as pool:
        jobs = []
        for point in todo:
            chosen = candidates(point.op, point.batch, itemsize, key_shape(point), args.tries)
            jobs.append((point, chosen, [pool.submit(compile_candidate, point, args.dtype, arch,
                                                     gpu.multi_processor_count, c) for c in chosen]))
        done = tune(jobs, lambda point: Race(rig, point, args.dtype), keep, started + args.budget_seconds)
    settings.forget()
    if done < len(todo):
        print(f"stopped by the budget of {args.budget_seconds:.0f} s after {done} of {len(todo)} shapes; the same "
              "command goes on from here")
    print(f"{done} shapes tuned in {time.monotonic() - started:.0f} s; {path} has {len(table)}")
    return 0


def tune(jobs, race_of, keep, deadline):
    """Tunes the points in order until the clock passes the deadline; returns how many.

    jobs: (point, candidates, the future of each one's usage). race_of(point) makes a race, keep(point, winner, times,
    dropped) records what came of it.
    """
    for done, (point, chosen, futures) in enumerate(jobs):
        usages = []
        for future in futures:
            left = deadline - time.monotonic()
            try:
                usages.append(future.result(max(left, 0.0)))
            except concurrent.futures.TimeoutError:
                return done
            except concurrent.futures.process.BrokenProcessPool:
                raise LabError(f"a compiler process died over {point.op} {point.shape}, batch {point.batch}; what was "
                               "found is kept: tune the other shapes, or this one with fewer --tries") from None
        if time.monotonic() > deadline:
            return done
        keep(point, *tune_point(race_of(point), chosen, usages))
    return len(jobs)


def report(point, entry, dropped):
    """One line on a tuned point."""
    shape = " ".join(f"{k}={v}" for k, v in point.shape.items())
    won = " ".join(f"{k}={v}" for k, v in entry["settings"].items()) or "the settings by hand"
    wrong = [why for _, why in dropped if why.startswith("wrong")]
    line = f"{point.op} {point.role or ''} batch {point.batch} {shape}: {entry['us']} us "
    line += f"(by hand {entry['us_by_hand']}): "
    line += f"{won}; {entry['tried']} raced, {len(dropped)} dropped"
    return line + (f", {len(wrong)} of them {wrong[0]}" if wrong else "")
