"""`lab tune OP ...`: tries launch settings of the CUDA and the Triton kernel on this GPU, shape by shape, and
keeps the fastest that is right.

For each shape of the presets a bounded list of candidates (its contract's `spaces`) races over rotating cold
weights inside CUDA graphs, the four fastest again with more samples, and the fastest whose output is right
joins the backend's tuned/sm_NN.json, with GPU and compiler version. Triton's are first compiled, in parallel
and without the GPU, and those that spill are dropped. Launchers read that table before their own rules. A run
that the budget stops keeps what it found; the same command again goes on after it.

The table does not know the context, and at others than those that raced a kernel may spill. With several
(--context), the settings of attention race at each of them, and what is slower than the settings by hand at
one, by more than 2 %, does not win.

With --by-token the time of a whole decode step of a model under the fused plan decides: a kernel that is
fastest alone may leave the next one no resources to start beside it. A step with the candidate in the table
races a step with the table as it is; what wins stays while the other ops are tried.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from lab import spaces
from lab.contract import DTYPES
from lab.errors import LabError
from lab.files import write_whole
from lab.harness import shapes
from lab.harness.shapes import key_shape
from lab.names import known
from lab.tune import tuned

FINALISTS = 4
RACE_S, FINAL_S = 0.02, 0.1  # seconds of samples of each candidate in the first race, and of each finalist
GAIN = 0.01  # a candidate must beat the settings by hand by more than that
LOSS = 0.02  # and, where several contexts race, be slower at none of them by more than that
TOKEN_RACE_S, TOKEN_GAIN = 0.08, 0.001  # the same where whole tokens judge: seconds of each pair
WORKERS = 16
BY_HAND = "by hand"
LANGUAGES = ["cuda", "triton"]  # those with tables of settings: see lab/tune/tuned.py


def tunable():
    """Names of the ops that have launch settings to choose from."""
    from lab.ops import OPS

    return [op.name for op in OPS if op.spaces]


def candidates(backend, op, rows, itemsize, shape, tries, format=None):
    """At most `tries` settings of an op's space: all, or the same random choice every time; [] where there is
    no choice. format: of packed weights."""
    from lab.ops import find

    space = spaces.of(find(op), backend, rows, itemsize, shape, format)
    return space if len(space) <= tries else random.Random(0).sample(space, tries)


# Compiling: in processes of their own, without the GPU; Triton's cache on disk hands the result to this
# process.


def compile_at_all(points, *arguments):
    """compile_candidate() at each point: the first error, or the most of each resource."""
    usages = [compile_candidate(point, *arguments) for point in points]
    wrong = next((usage for usage in usages if "error" in usage), None)
    return wrong or {name: max(usage[name] for usage in usages) for name in usages[0]}


def compile_candidate(point, dtype_name, arch, multiprocessors, settings):
    """dict(regs, stack, local, shared) of the kernel that `settings` give, or {"error": what the compiler
    said}."""
    from lab.inspect.call import Blank, packed
    from lab.ops import find
    from triton_kernels import common, offline
    from triton_kernels.core.packed_splits import sum_splits_kernel
    from triton_kernels.settings import forced

    try:
        op = find(point.op)
        dtype, plain = DTYPES[dtype_name], replace(point, format=None)
        args, _ = shapes.arguments(op, plain, Blank(dtype), multiprocessors)
        if point.format is not None:
            args = packed(op, args, point.format, dtype)
        with forced(op.name, settings), common.recording(arch) as launches:
            op.launchers["triton"](*args, out=op.outputs(*args))
        if launches[-1].kernel is sum_splits_kernel:  # needed too, but settings are those of the product
            offline.compile(launches.pop(), arch)
        return offline.usage(offline.compile(launches[-1], arch))
    except Exception as error:  # whatever a compiler raises: this candidate cannot be launched
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


@contextlib.contextmanager
def compilers():
    """An executor of processes that know nothing of this one's CUDA context."""
    pool = concurrent.futures.ProcessPoolExecutor(
        min(WORKERS, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Timing, on the GPU.


class Race:
    """Times settings of one point on one backend against each other, and checks what they compute."""

    def __init__(self, rig, backend, point, dtype_name):
        from lab.backends import load
        from lab.harness import ops_bench, timing
        from lab.ops import find

        self.op, self.backend, self.run = (
            find(point.op),
            load(backend, torch.device(rig.device)),
            rig.backends[backend],
        )
        self.device = rig.device
        self.bound = ops_bench.BoundPoint(self.op, point, DTYPES[dtype_name], rig)
        # Checked on fresh arguments: a race adds to a residual thousands of times, and in so large a sum the
        # last addition, right or wrong, would not show.
        self.fresh = timing.clone_args(self.bound.sets[0])

    def times(self, entrants, seconds):
        """{label: microseconds} of each entry of {label: settings or None}, None standing for those by hand.
        What cannot be launched is left out."""
        from triton.runtime.errors import OutOfResources

        from lab.harness import ops_bench, timing

        timed = {}
        for label, settings in entrants.items():
            with (
                self.backend.forced(self.op.name, settings or {}),
                contextlib.suppress(RuntimeError, OutOfResources),
            ):
                timed[label] = self.bound.timed(self.backend.name, "in_model", "graph", None)
        ops_bench.alive(self.op.name)  # one that broke the CUDA context must not pass as one that lost
        stats = timing.measure(timed, seconds * len(timed), 5, 100) if timed else {}
        for one in timed.values():
            one.close()
        return {label: s.us for label, s in stats.items()}

    def error(self, settings):
        """What is wrong with two calls under `settings`, on one workspace and between guard zones, or
        None."""
        from lab.arena import Arena
        from lab.check import check_call, values_of
        from lab.harness import timing

        op, arena = self.op, None
        for _ in range(2):
            values = values_of(op, timing.clone_args(self.fresh))
            if arena is None:
                arena = Arena(values, self.device)
            else:
                arena.fill(values, keep=op.state)
            with self.backend.forced(op.name, settings or {}):
                outcome = check_call(op, getattr(self.run, op.name), arena, {"out", *op.state})
            if outcome.error:
                return outcome.error
        return None


class Races:
    """Races of one shape at several contexts. A time is the geometric mean over them, and infinite for
    settings that lose at one of them (LOSS)."""

    def __init__(self, races):
        self.races, self.by_hand = races, [None] * len(races)

    def times(self, entrants, seconds):
        each = [race.times(entrants, seconds) for race in self.races]
        # Where they cannot be launched at one context they are not in the final, but still a limit at others.
        self.by_hand = [times.get(BY_HAND, last) for times, last in zip(each, self.by_hand, strict=True)]
        return {
            label: combined([times[label] for times in each], self.by_hand)
            for label in entrants
            if all(label in times for times in each)
        }

    def error(self, settings):
        return next(filter(None, (race.error(settings) for race in self.races)), None)


def combined(us, by_hand):
    """The geometric mean of one entrant's times at several contexts; infinite if it is slower than the
    settings by hand (None: they could not be launched there) at one of them."""
    slower = any(b is not None and t > (1 + LOSS) * b for t, b in zip(us, by_hand, strict=True))
    return math.inf if slower else statistics.geometric_mean(us)


class TokenRace:
    """Times settings of one point by whole decode steps. "By hand" here means the table as it is."""

    def __init__(self, rig, backend, point, dtype_name, weights, table, context):
        from lab.backends import load

        self.backend, self.run = load(backend, torch.device(rig.device)), rig.backends[backend]
        self.point, self.weights, self.table, self.context = (
            point,
            weights.of(point.models[0]),
            table,
            context,
        )
        self.itemsize = DTYPES[dtype_name].itemsize
        self.alone = rig, backend, point, dtype_name

    def error(self, settings):
        """What is wrong with the op's output under `settings`, or None."""
        return Race(*self.alone).error(settings)

    def step(self, settings):
        """One step as a CUDA graph, with `settings` in the place of the point's entry (None: as the table
        is)."""
        from lab.harness import model_bench
        from lab.model.decoder import Decoder

        self.backend.use(self.table.with_entry(self.point, self.itemsize, settings))
        try:
            decoder = Decoder(self.weights, self.run, self.point.batch, self.context + 1, plan="fused")
            model_bench.fill(decoder, self.point.batch, self.context)
            return model_bench.timed_step(decoder, "graph")
        finally:
            self.backend.forget()

    def times(self, entrants, seconds):
        """{label: microseconds a token}: each entrant against the table as it is, at the same time; what
        cannot be launched is left out. `seconds` is what a kernel alone would get."""
        from triton.runtime.errors import OutOfResources

        from lab.harness import model_bench, ops_bench, timing

        base, found = self.step(None), {}
        for label, settings in entrants.items():
            if settings is None:
                continue
            one = None
            try:
                one = self.step(settings)
                pair = timing.measure({BY_HAND: base, label: one}, seconds / RACE_S * TOKEN_RACE_S, 12, 100)
                found.setdefault(BY_HAND, pair[BY_HAND].us)
                found[label] = pair[label].us / pair[BY_HAND].us * found[BY_HAND]
            except torch.OutOfMemoryError:
                raise LabError(
                    f"two decoders of {self.point.models[0]}, batch {self.point.batch}, context "
                    f"{self.context} "
                    "do not fit in this GPU's memory: tune with a smaller --batch or --context"
                ) from None
            except (RuntimeError, OutOfResources):
                pass  # it cannot be launched
            ops_bench.alive(self.point.op)
            one = None  # a decoder's memory, before the next one's
            model_bench.release("cuda")
        base = None
        model_bench.release("cuda")
        return found


def tune_point(race, settings, usages, gain=GAIN):
    """(winner, times, dropped): the fastest right settings (None: those by hand), {label: us}, and why others
    fell out.

    settings: the candidates. usages: the compiler's report of each, in the same order. race: `times` and
    `error`.
    gain: the share of its time by which a winner must be faster than the settings by hand.
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
    dropped += [
        (entrants[label], "cannot be launched") for label in entrants if label not in [*first, BY_HAND]
    ]
    best = sorted((label for label in first if label != BY_HAND), key=first.get)[:FINALISTS]
    final = race.times({label: entrants[label] for label in [BY_HAND, *best] if label in first}, FINAL_S)
    times = {**first, **final}
    for label in sorted((label for label in final if label != BY_HAND), key=final.get):
        if BY_HAND in final and final[label] > (1 - gain) * final[BY_HAND]:
            break
        wrong = race.error(entrants[label])
        if wrong is None:
            return entrants[label], times, dropped
        dropped.append((entrants[label], f"wrong: {wrong}"))
    return None, times, dropped


# The table.


def context_of(point, contexts):
    """What an entry says of the context: one number, a list where several raced, None where there is none."""
    return list(contexts) if len(contexts) > 1 else point.context


class Table:
    """A table in a file, to which what this GPU and this compiler gave is added; written whole at each
    addition."""

    def __init__(self, path, gpu, compiler, start=None):
        """start: the table to begin with where `path` has none."""
        self.path, self.gpu, self.compiler = Path(path), gpu, compiler
        entries = tuned.read(path if start is None or self.path.exists() else start)
        self.entries = {self._key(e): e for e in entries}

    @staticmethod
    def _key(entry):
        e = entry
        return e["op"], e["itemsize"], e["rows"], tuple(e["shape"].items()), e.get("format")

    @staticmethod
    def _entry(point, itemsize, **more):
        """An entry for a point."""
        found = {"op": point.op, "itemsize": itemsize, "rows": point.batch, "shape": key_shape(point)}
        return found | ({} if point.format is None else {"format": point.format}) | more

    def has(self, point, itemsize, judge=None, contexts=()):
        """judge: the whole tokens that must have chosen the entry; None: whatever did. contexts: those that
        must have raced, where whole tokens did not choose."""
        e = self.entries.get(self._key(self._entry(point, itemsize)))
        if e is None or (e.get("gpu"), e.get("compiler")) != (self.gpu, self.compiler):
            return False
        if judge is not None:
            return e.get("by", "").startswith(judge + ":")
        return "by" in e or e.get("context") == context_of(point, contexts)

    def applied(self, point, itemsize):
        """The settings that a launch takes from the table; {}: none."""
        e = self._entry(point, itemsize)
        given = e["op"], itemsize, e["rows"], e["shape"], point.format
        return tuned.lookup(self.entries.values(), *given) or {}

    def with_entry(self, point, itemsize, settings):
        """All entries, the point's with other settings; None: as they are."""
        if settings is None:
            return list(self.entries.values())
        mine = self._entry(point, itemsize, settings=settings)
        return list({**self.entries, self._key(mine): mine}.values())

    def add(self, point, itemsize, winner, times, judge=None, contexts=()):
        """Returns the entry. winner None: what a launch takes without it stays, and the entry records it: the
        settings by hand, {}, or where whole tokens judged (`judge` says which) what the table gave. contexts:
        those that raced, where they were several."""
        before = times.get(BY_HAND)
        after = min(times.values()) if winner is not None else before
        if winner is None:
            winner = self.applied(point, itemsize) if judge else {}
        entry = self._entry(
            point,
            itemsize,
            settings=winner,
            us=round(after, 3) if after and not judge else None,
            us_by_hand=round(before, 3) if before and not judge else None,
            tried=len(times) - (BY_HAND in times),
            context=None if judge else context_of(point, contexts),
            gpu=self.gpu,
            compiler=self.compiler,
        )
        if judge:
            entry["by"] = judge + (
                f": {before:.1f} to {after:.1f} us" if before else ": none could be launched"
            )
        self.entries[self._key(entry)] = entry
        self._write()
        return entry

    def _write(self):
        """One entry a line, so that a difference can be read."""
        ordered = sorted(
            self.entries.values(),
            key=lambda e: (e["op"], *e["shape"].values(), e["itemsize"], e.get("format", ""), e["rows"]),
        )
        text = '{"entries": [\n' + ",\n".join(json.dumps(e) for e in ordered) + "\n]}\n"
        write_whole(self.path, text)


def main(args) -> int:
    started = time.monotonic()
    from lab.arguments import names, numbers

    if not torch.cuda.is_available():
        raise LabError("lab tune needs a GPU: settings are chosen by time")
    from lab.backends import load
    from lab.harness import ops_bench
    from lab.harness.model_bench import Weights

    every = tunable()
    ops = every if args.op == ["all"] else [known(name, every, "op to tune") for name in args.op]
    backends = [known(name, LANGUAGES, "backend to tune") for name in names(args.backend)]
    known(args.dtype, list(DTYPES), "dtype")
    if args.tries < 1 or args.budget_seconds <= 0:
        raise LabError("--tries and --budget-seconds must be positive")
    contexts = numbers(args.context)
    if args.by_token and len(contexts) > 1:
        raise LabError("--by-token compares tokens at one context: give --context one number")
    formats = formats_of(args, ops, backends)
    rig = ops_bench.make_rig(ops_bench.load_backends(backends, "cuda", True)[0], "cuda", None)
    rig.vendor = False
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = f"sm_{gpu.major}{gpu.minor}"
    tables = {
        b: Table(
            Path(args.out, b, f"{arch}.json") if args.out else tuned.path_of(b, arch),
            gpu.name,
            load(b, torch.device("cuda")).compiler,
            tuned.path_of(b, arch) if args.by_token else None,
        )
        for b in backends
    }
    itemsize, batches = DTYPES[args.dtype].itemsize, numbers(args.batch)
    models = names(args.model) if args.model else shapes.MODELS
    if args.by_token:
        groups = [[p] for p in token_points(models, batches, contexts[0], ops)]
    else:
        points = [p for p in shapes.points(models, batches, contexts, ops) if p.case is None]
        if formats:
            points = shapes.in_formats(points, formats)
        groups = by_context(points)

    def contexts_of(group):
        return [p.context for p in group]

    def judge(point):
        return (
            f"whole tokens of {point.models[0]}, batch {point.batch}, context {contexts[0]}"
            if args.by_token
            else None
        )

    todo = [
        (backend, group)
        for group in groups
        for backend in backends
        if args.again or not tables[backend].has(group[0], itemsize, judge(group[0]), contexts_of(group))
    ]

    def keep(backend, group, winner, times, dropped):
        point, contexts = group[0], contexts_of(group)
        entry = tables[backend].add(point, itemsize, winner, times, judge(point), contexts)
        print(report(backend, point, entry, dropped), flush=True)

    weights = Weights("random", args.dtype, "cuda")  # of the models whose tokens judge

    def race_of(backend, group):
        if args.by_token:
            return TokenRace(rig, backend, group[0], args.dtype, weights, tables[backend], contexts[0])
        races = [Race(rig, backend, point, args.dtype) for point in group]
        return races[0] if len(races) == 1 else Races(races)

    with compilers() as pool:
        jobs = []
        for backend, group in todo:
            point = group[0]
            size = point.batch, itemsize, key_shape(point)
            chosen = candidates(backend, point.op, *size, args.tries, point.format)
            if chosen and args.by_token and tables[backend].applied(point, itemsize):
                chosen = [{}, *chosen]  # what the table has may be worse in a token than the rule
            if backend == "triton":
                at = served(group, batches)
                usages = [
                    pool.submit(compile_at_all, at, args.dtype, arch, gpu.multi_processor_count, c)
                    for c in chosen
                ]
            else:
                usages = [compiled() for _ in chosen]
            if chosen:
                jobs.append((backend, group, chosen, usages))
        done = tune(jobs, race_of, keep, started + args.budget_seconds, TOKEN_GAIN if args.by_token else GAIN)
    for backend in backends:
        load(backend, torch.device("cuda")).forget()
    if done < len(jobs):
        print(
            f"stopped by the budget of {args.budget_seconds:.0f} s after {done} of {len(jobs)} shapes; the "
            "same command goes on from here"
        )
    print(
        f"{done} shapes tuned in {time.monotonic() - started:.0f} s; "
        + ", ".join(f"{t.path} has {len(t.entries)}" for t in tables.values())
    )
    return 0


def by_context(points):
    """The points in groups of those that differ in the context alone."""
    groups = {}
    for p in points:
        groups.setdefault(replace(p, context=None).identity, []).append(p)
    return list(groups.values())


def served(group, batches):
    """The points at which a candidate for a group must compile without spilling: the group's and, for
    attention, those with the fewest rows that take its entry, when all of `batches` have one.

    Attention's kernel is compiled for its splits, which follow from the rows: settings that won with 16
    sequences spilled with 8 and fewer, and took up to 11 % more there than those by hand on an H100.
    """
    smaller = [batch for batch in batches if batch < group[0].batch]
    fewest = max([tuned.fewest_rows(group[0].batch), *(batch + 1 for batch in smaller)])
    return list(dict.fromkeys([*group, *(replace(p, batch=fewest) for p in group if p.context is not None)]))


def formats_of(args, ops, backends):
    """The weight formats to tune for; [] for plain weights. Raises LabError for what cannot be tuned."""
    from lab.arguments import names
    from lab.formats import FORMATS
    from lab.ops import find, require_formats

    if not args.weight_format:
        return []
    if args.by_token:
        raise LabError("--by-token tunes for plain weights: leave --weight-format or --by-token out")
    if args.op != ["all"]:
        for op in ops:
            require_formats(find(op))
    if "triton" not in backends:
        raise LabError("packed weights have settings to choose from in Triton alone: --backend triton")
    return [known(name, list(FORMATS), "weight format") for name in names(args.weight_format)]


def token_points(models, batches, context, ops):
    """Every distinct op and shape of the fused plan's step, model by model; raises LabError if `ops` has
    none."""
    from lab.ops import find

    found = {}
    for name in models:
        for batch in batches:
            if context >= shapes.preset(name).max_positions or batch * context > shapes.MOST_TOKENS:
                continue
            for op, role, shape in shapes.uses(shapes.preset(name), "fused"):
                if op in ops and find(op).spaces:
                    at = context if find(op).has_context else None
                    point = shapes.Point(op, role, batch, at, shape, (name,))
                    found.setdefault((name, point.identity), point)
    if not found:
        raise LabError(
            f"--by-token tunes what the fused plan launches: not {', '.join(ops)} at context {context}"
        )
    return list(found.values())


def compiled():
    """The usage, at hand already, of a kernel that was compiled with the extension."""
    future = concurrent.futures.Future()
    future.set_result({"stack": 0, "local": 0})
    return future


def tune(jobs, race_of, keep, deadline, gain=GAIN):
    """Tunes the groups in order until the clock passes the deadline; returns how many.

    jobs: (backend, group, candidates, the future of each one's usage). A group is a list of points that take
    one entry of the table: one op and shape at several contexts. race_of(backend, group) makes a race,
    keep(backend, group, winner, times, dropped) records what came of it. gain: see tune_point.
    """
    for done, (backend, group, chosen, futures) in enumerate(jobs):
        usages = []
        for future in futures:
            left = deadline - time.monotonic()
            try:
                usages.append(future.result(max(left, 0.0)))
            except concurrent.futures.TimeoutError:
                return done
            except concurrent.futures.process.BrokenProcessPool:
                point = group[0]
                raise LabError(
                    f"a compiler process died over {point.op} {point.shape}, batch {point.batch}; what was "
                    "found is kept: tune the other shapes, or this one with fewer --tries"
                ) from None
        if time.monotonic() > deadline:
            return done
        keep(backend, group, *tune_point(race_of(backend, group), chosen, usages, gain))
    return len(jobs)


def report(backend, point, entry, dropped):
    """One line on a tuned point."""
    shape = " ".join(f"{k}={v}" for k, v in point.shape.items())
    won = " ".join(f"{k}={v}" for k, v in entry["settings"].items()) or "the settings by hand"
    wrong = [why for _, why in dropped if why.startswith("wrong")]
    format = f" {point.format}" if point.format else ""
    line = f"{backend} {point.op} {point.role or ''} batch {point.batch} {shape}{format}: "
    line += f"{entry['by']}: " if "by" in entry else f"{entry['us']} us (by hand {entry['us_by_hand']}): "
    line += f"{won}; {entry['tried']} raced, {len(dropped)} dropped"
    return line + (f", {len(wrong)} of them {wrong[0]}" if wrong else "")
