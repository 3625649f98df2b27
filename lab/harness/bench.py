"""`lab bench ops|model|serving|accuracy|ledger|all|crossover`: measurements into DIR/records.jsonl.

The full set (`all`) is made to take under 12 minutes of GPU time, `--quick` under 2; what matters most comes
first, `--budget-minutes` stops cleanly, and the same command again goes on where it stopped. On a CPU only
emulated latencies are recorded.
"""

import dataclasses
import functools
import sys
from typing import Callable, NamedTuple

import torch

from lab import rungs
from lab.arguments import names, numbers
from lab.errors import LabError
from lab.harness import (
    accuracy,
    ceiling,
    crossover,
    exchange_bench,
    inside,
    ladder_bench,
    ledger,
    model_bench,
    ops_bench,
    parallel_bench,
    printed,
    serving_bench,
    timing,
)
from lab.harness.request import Request, op_points, require_work, settings_of
from lab.records import card, compare
from lab.records.session import Progress, Session

# About how many seconds a step takes on an H100 beside its sampling: buffers, graphs, warming up. Only the
# estimate of the time left comes from these.
PER_MODE, PER_DECODER, PER_COMPILATION, PER_LEDGER, PER_LADDER = 0.3, 0.6, 15.0, 1.5, 2.0
PER_FEW_RUNGS = 0.3
PER_FORMAT = 0.2  # rounding an op's weights to a format, and its result by the reference
PER_ACCURACY = 10.0
PER_SEQUENCE = 0.05  # of the queue: its prefill and its tokens
PER_CEILING = 0.35  # all of one direction and size
STAGES = (  # of a run, what matters most first
    "accuracy",
    "first ops",  # at the first dtype and batch
    "first sizes of models",
    "serving",
    "ledgers",
    "ladders",
    "ops in weight formats",  # of `all`
    "other sizes of models",
    "other ops",
    "compiled",  # compiling is slow
    "other dtypes",
)


class Step(NamedTuple):
    """One measurement of a run, about `seconds` long."""

    label: str
    seconds: float
    run: Callable


def request_of(args):
    """What the options of `lab bench` ask for."""
    models = tuple(names(args.model)) if args.model else ()
    if args.what != "ops":
        models = models or tuple(args.names)
    return Request(
        what=args.what,
        out=args.out,
        ops=tuple(args.names) if args.what == "ops" else (),
        models=models or None,
        device=args.device,
        backends=tuple(names(args.backend)) if args.backend else None,
        dtypes=tuple(names(args.dtype)) if args.dtype else None,
        batches=tuple(numbers(args.batch)) if args.batch else None,
        contexts=tuple(numbers(args.context)) if args.context else None,
        plans=tuple(names(args.plan)) if args.plan else None,
        weights=args.weights,
        weights_as=args.weights_as,
        quantise=args.quantise,
        quantise_head=args.quantise_head,
        weight_formats=tuple(names(args.weight_format)) if args.weight_format else None,
        kv_dtype=args.kv_dtype,
        seconds=args.seconds,
        quick=args.quick,
        ladder=args.ladder,
        swap=args.swap,
        vendor=not args.no_vendor,
        compile=not args.no_compile,
        fresh=args.fresh,
        budget_minutes=args.budget_minutes,
    )


def main(args):
    if args.what == "crossover":
        return crossover.main(args)
    if args.export:
        raise LabError("--export is of `lab bench crossover`")
    if args.tensor_parallel is not None and args.what not in ("exchange", "model"):
        raise LabError("--tensor-parallel is of `lab bench model` and `lab bench exchange`")
    counts = set(numbers(args.tensor_parallel)) if args.tensor_parallel else set()
    if args.what == "exchange":
        return exchange_bench.main(args, max(counts, default=2))
    if several := sorted(counts - {1}):
        parallel_bench.main(args, request_of(args), several)
        if 1 not in counts:
            return 0
    status = measure(request_of(args))
    show(args.out, args.what)
    return status


def show(out, what):
    """Prints the tables of the newest run in a folder."""
    if tables := printed.text_of(compare.open_run(out).rows, out, what):
        print(tables)


def measure(request, own=None):
    """Measures what a Request asks for and records it; returns the exit status. Raises LabError for a request
    that cannot be met.

    own: more backends, {name: an object with a function for each op that it has}, or lab.judge.race.RacedFile
    (`lab try`).
    """
    settings = settings_of(request)
    device = settings.device
    backends, notes = ops_bench.load_backends(settings.backends, device, asked=request.backends is not None)
    backends |= own or {}
    settings = dataclasses.replace(settings, backends=tuple(backends))
    require_work(settings)
    if device == "cpu":
        of_device = ["emulated: times are the host's and say nothing about a GPU"]
    else:
        of_device = settle_clocks()
    session = Session(
        request.out, device, settings.recorded(), request.budget_minutes, request.fresh, notes + of_device
    )
    if device == "cuda" and settings.vendor:
        notes = notes + left_out(session)
    for line in [*session.notices, *notes]:
        print(f"lab bench: {line}", file=sys.stderr)
    if session.resumed:
        print(
            f"lab bench: run {session.run} was stopped; going on after its {len(session.rows)} lines",
            file=sys.stderr,
        )
    status = 0
    try:
        complete = run_all(session, settings, backends)
    except KeyboardInterrupt:
        complete, status = False, 130
    session.finish(complete)
    return max(status, say(session, complete))


def left_out(session):
    """Which peers cannot be measured here: their packages are not installed."""
    found = session.of_kind("env")[0].peers
    missing = [card.PEERS[name] for name, version in found.items() if version == "not installed"]
    return (
        [f"peers left out: {', '.join(missing)} (pip install them to measure them, too)"] if missing else []
    )


def say(session, complete):
    """How the run ended, on the terminal; 1 if rows failed and none has a time, else 0."""
    errors = [r for r in session.rows if getattr(r, "error", None)]
    measured = any(
        r.kind in ("op", "model", "serving", "ledger", "inside")
        and r.us is not None
        or r.kind == "accuracy"
        and r.kl is not None
        for r in session.rows
    )
    failed = f", {len(errors)} failed" if errors else ""
    print(f"run {session.run}: {session.new} new lines in {session.path}{failed}")
    for r in errors[:5]:
        print("  " + printed.failed(r))
    if not complete:
        print("stopped before the end: the same command goes on from here")
    if errors and not measured:
        print("lab bench: error: nothing could be measured: every row failed", file=sys.stderr)
        return 1
    return 0


def run_all(session, settings, backends):
    """Measures everything that the settings ask for; True when nothing is missing."""
    device, quick = settings.device, settings.quick
    sizes = ceiling.QUICK_SIZES if quick else ceiling.SIZES
    rig = ops_bench.make_rig(backends, device, ceiling.Ceilings(), quick, settings.seconds)
    rig.vendor, rig.plans = rig.vendor and settings.vendor, settings.plans
    rig.kv_dtype = settings.kv_dtype
    if rig.file:
        rig.modes = ops_bench.EMULATED if device == "cpu" else ops_bench.RACE_MODES
    rig.lean = quick and settings.what == "all" or settings.what == "accuracy"
    steps = steps_of(session, rig, settings)
    total = sum(step.seconds for step in steps)
    with_ceilings = device == "cuda" and settings.what != "serving"  # whose rows are no share of them
    if with_ceilings:
        total += PER_CEILING * len(sizes) * len(ceiling.DIRECTIONS)
        print(
            f"lab bench: {len(steps)} steps, about {total / 60:.1f} minutes if no kernel must be compiled "
            "and nothing is recorded yet",
            file=sys.stderr,
        )
    with Progress(total) as progress:
        if with_ceilings:
            rig.ceilings = measure_ceilings(session, settings, progress)
        for step in steps:
            if session.over():
                return False
            progress.step(step.label, step.seconds)
            step.run()
    return True


def steps_of(session, rig, settings):
    """The measurements in order of importance (STAGES), so that a run that is cut has the headline."""
    given = settings.weights, settings.dtypes[0], settings.device
    weights, *_ = every = model_bench.Weights.of_storages(*given, settings.storages)
    found = []
    if settings.what in ("ops", "all") and not settings.ladder:
        found += op_steps(session, rig, settings, weights)
    if settings.what == "accuracy":
        found += accuracy_steps(session, settings, every)
    # Emulated times say nothing about what a format saves.
    if settings.what in ("model", "all") or settings.what == "accuracy" and settings.device == "cuda":
        for one in every:
            found += model_steps(session, rig, settings, one)
    if settings.what == "serving":
        for one in every:
            found += serving_steps(session, rig, settings, one)
    if settings.inside:
        found += inside_steps(session, rig, settings, weights)
    elif settings.what in ("ledger", "all") and settings.device == "cuda":  # it is made of device time stamps
        found += ledger_steps(session, rig, settings, weights)
    whole_set = settings.what == "all" and settings.device == "cuda" and not settings.quick
    if settings.ladder or whole_set:
        found += ladder_steps(session, rig, settings)
    return [step for stage in STAGES for where, step in found if where == stage]


def op_steps(session, rig, settings, weights):
    """[(stage, Step)] of the ops, batch by batch, so that a run that is cut has whole batches."""
    found = []
    for dtype, point in sorted(op_points(settings), key=lambda pair: pair[1].batch):
        if point.format is not None and settings.what == "all":
            stage = "ops in weight formats"
        elif dtype != settings.dtypes[0]:
            stage = "other dtypes"
        elif point.batch == settings.batches[0]:
            stage = "first ops"
        else:
            stage = "other ops"
        modes = modes_of(rig, settings, dtype, point)
        run = functools.partial(measure_op, session, rig, weights, point, dtype, modes)
        size = f"b{point.batch} {point.context or ''} {point.format or ''}"
        label = f"{point.op} {point.role or ''} {size} {dtype}"
        seconds = len(modes) * (rig.seconds + PER_MODE) + (PER_FORMAT if point.format else 0)
        found.append((stage, Step(label, seconds, run)))
    return found


def model_steps(session, rig, settings, weights):
    """[(stage, Step)] of the models; the torch.compile peer is measured at each one's first size alone."""
    found, dtype = [], settings.dtypes[0]
    sizes = [(b, c) for c in settings.model_contexts for b in sorted(settings.model_batches)]
    for name in settings.models:
        for size in sizes:
            batch, context = size
            sides = rig.sides(batch, dtype)
            if context >= weights.config_of(name).max_positions or not sides:
                continue
            first, seconds = size == sizes[0], len(sides) * PER_DECODER + 8 * rig.seconds
            given = session, rig, weights, name, dtype, batch, context
            run = functools.partial(model_bench.measure_model, *given)
            step = Step(f"{name} b{batch} {context}", seconds, run)
            found.append(("first sizes of models" if first else "other sizes of models", step))
            if first and settings.compile and settings.device == "cuda":
                run = functools.partial(model_bench.measure_compiled, *given)
                found.append(("compiled", Step(f"{name} compiled", seconds + PER_COMPILATION, run)))
    return found


def serving_steps(session, rig, settings, weights):
    """[(stage, Step)] of many sequences in the queue, by the batch's size."""
    found, dtype = [], settings.dtypes[0]
    for name in settings.models:
        for batch in settings.model_batches:
            sides = len(rig.sides(batch, dtype))
            given = session, rig, weights, name, dtype, batch, settings.quick
            run = functools.partial(serving_bench.measure, *given)
            seconds = sides * (PER_DECODER + (4 * batch + 8) * PER_SEQUENCE)
            found.append(("serving", Step(f"{name} queue b{batch}", seconds, run)))
    return found


def accuracy_steps(session, settings, every):
    """[(stage, Step)] of the models' accuracy, format by format. every: the plain weights first."""
    found, (plain, *quantised) = [], every
    for name in settings.models:
        for weights in quantised:
            given = session, plain, weights, name, settings.dtypes[0]
            run = functools.partial(accuracy.measure, *given)
            label = f"accuracy of {name} in {weights.storage.quantise}"
            found.append(("accuracy", Step(label, PER_ACCURACY, run)))
    return found


def ledger_steps(session, rig, settings, weights):
    """[(stage, Step)] of the models' ledgers at the first batch and context, and of their swaps."""
    found, dtype = [], settings.dtypes[0]
    batch, context = settings.model_batches[0], settings.model_contexts[0]
    for name in settings.ledger_models:
        given = session, rig, weights, name, dtype, batch, context
        for backend, plan in rig.sides(batch, dtype):
            run = functools.partial(ledger.measure, *given, backend, plan)
            found.append(
                ("ledgers", Step(f"ledger {name} {backend} {plan}", PER_LEDGER + 12 * rig.seconds, run))
            )
        for plan in rig.plans:
            if settings.swap and plan != "persistent":  # which has one op to swap
                run = functools.partial(ledger.measure_swap, *given, plan)
                seconds = ledger.SWAP_SECONDS + 10 * PER_DECODER
                found.append(("ledgers", Step(f"swaps {name} {plan}", seconds, run)))
    return found


def inside_steps(session, rig, settings, weights):
    """[(stage, Step)] of the inside of the models' persistent step, in each language."""
    found, dtype = [], settings.dtypes[0]
    context = settings.model_contexts[0]
    for name in settings.ledger_models:
        for backend, _ in rig.sides(1, dtype):
            run = functools.partial(inside.measure, session, rig, weights, name, dtype, context, backend)
            found.append(("ledgers", Step(f"inside {name} {backend}", PER_LEDGER + 6 * rig.seconds, run)))
    return found


def ladder_steps(session, rig, settings):
    """[(stage, Step)] of the ladders, in `all` at one size each."""
    found = []
    for climb in ladder_bench.points(settings.device, settings.ops, settings.ladder):
        point = climb.point
        name = rungs.name_of(point.op, point.format)
        run = functools.partial(ladder_bench.measure, session, rig, climb, settings.dtypes[0])
        label = f"ladder of {name}" + (f" b{point.batch}" if point.batch > 1 else "")
        label += f", rungs {climb.judged}" if climb.judged else ""
        seconds = ladder_bench.seconds_of(climb) + (PER_FEW_RUNGS if climb.judged else PER_LADDER)
        found.append(("ladders", Step(label, seconds, run)))
    return found


def modes_of(rig, settings, dtype, point):
    """The modes a point is measured in. `all` has cold device times everywhere, and what hardly depends on
    the size (warm caches and activations, the host's time) at the first dtype and batch alone."""
    if rig.device != "cuda":
        return rig.modes
    other_dtype = dtype != settings.dtypes[0] and not settings.all_dtypes_everywhere
    if rig.modes == ops_bench.RACE_MODES:
        return rig.modes
    elsewhere = other_dtype or point.batch != settings.batches[0] or point.format is not None
    if settings.what == "all" and elsewhere:
        return rig.modes[:1]
    return ops_bench.QUICK_MODES if other_dtype else rig.modes


def measure_op(session, rig, weights, point, dtype, modes):
    weights.drop()  # the op's buffers take their place
    ops_bench.measure_point(session, rig, point, dtype, modes)


def settle_clocks():
    """Loads the card until its clocks have settled, so that the env row and the rest see them; notes, if
    any."""
    load = torch.randn(1 << 28, device="cuda")  # 1 GiB, read over and over
    settled = timing.settle(timing.GraphTimed([load.sum] * 4))
    return [] if settled["settled"] else [f"the clocks had not settled after {settled['seconds']} s of load"]


def measure_ceilings(session, settings, progress):
    """The run's ceilings; what its records already hold is not measured again."""
    recorded = {(r.direction, r.bytes) for r in session.of_kind("ceiling")}
    torch.cuda.empty_cache()
    for rows in ceiling.measure(
        session.run, settings.quick, progress=lambda text: progress.step(text, PER_CEILING), known=recorded
    ):
        session.add(*rows)
        if session.over():
            break
    torch.cuda.empty_cache()
    return ceiling.Ceilings.of(session.rows)
