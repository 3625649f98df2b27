"""`lab bench ops|model|ledger|all|crossover`: measurements into DIR/records.jsonl.

The full set (`all`) is made to take under 12 minutes of GPU time, `--quick` under 2; what matters most comes
first, `--budget-minutes` stops cleanly, and the same command again goes on where it stopped. On a CPU only
emulated latencies are recorded.
"""

import argparse
import functools
import sys
from typing import Callable, NamedTuple

import torch

from lab import options, rungs
from lab.arguments import names, numbers
from lab.contract import BACKENDS, DTYPES
from lab.errors import LabError, one_line
from lab.harness import ceiling, crossover, ladder_bench, ledger, model_bench, ops_bench, shapes, timing
from lab.model.plans import PLANS, find_plan, refusal
from lab.names import known
from lab.ops import find
from lab.records.session import Progress, Session

DEFAULTS = {  # (device, quick): models, op batches, op contexts, model batches, model contexts, dtypes
    ("cuda", False): (
        shapes.MODELS,
        (1, 4, 16, 64),
        (1024, 8192, 32768),
        (1, 4, 16, 64),
        (1024, 8192),
        ("bf16", "fp16", "fp32"),
    ),
    ("cuda", True): (("smollm2-135m", "llama-3.2-1b"), (1, 16), (1024,), (1, 16), (1024,), ("bf16",)),
    ("cpu", False): (("smollm2-135m",), (1, 4), (64, 256), (1,), (32,), ("fp32",)),
    ("cpu", True): (("smollm2-135m",), (1,), (64,), (1,), (16,), ("fp32",)),
}
LEDGER_MODELS = (
    "llama-3.2-1b",
    "llama-3.1-8b",
)  # where a token goes: one that launches bound, one that bytes bound
QUICK_LEDGER = ("llama-3.2-1b",)
# About how many seconds a step takes on an H100 beside its sampling: buffers, graphs, warming up. Only the
# estimate of the time left comes from these.
PER_MODE, PER_DECODER, PER_COMPILATION, PER_LEDGER, PER_LADDER = 0.3, 0.6, 15.0, 1.5, 2.0
PER_CEILING = 0.35  # all of one direction and size


class Step(NamedTuple):
    """One measurement of a run, about `seconds` long."""

    label: str
    seconds: float
    run: Callable


def parse(words):
    """The arguments of `lab bench` from its words, for the verbs that are a bench underneath."""
    parser = argparse.ArgumentParser(prog="lab bench")
    options.bench(parser)
    return parser.parse_args(words)


def settings_of(args):
    """What was asked for, with every default filled in, as JSON: two runs with equal settings measure the
    same rows."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise LabError("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    models, batches, contexts, model_batches, model_contexts, dtypes = DEFAULTS[device, args.quick]
    if args.ladder and args.what != "ops":
        raise LabError("--ladder measures ops: lab bench ops --ladder")
    if args.what == "ops":
        for name in args.names:
            if find(name).whole_step:
                raise LabError(
                    f"{name} is a whole step, measured as a token: lab bench model --plan persistent"
                )
    chosen = (
        names(args.model) if args.model else args.names if args.what != "ops" and args.names else list(models)
    )
    for name in chosen:
        shapes.preset(name)
    backends = (
        [known(name, BACKENDS, "backend") for name in names(args.backend)] if args.backend else list(BACKENDS)
    )
    plans = names(args.plan) if args.plan else list(PLANS) if device == "cuda" else ["basic"]
    model_batches = numbers(args.batch) if args.batch else list(model_batches)
    dtypes = (
        [known(name, list(DTYPES), "dtype") for name in names(args.dtype)] if args.dtype else list(dtypes)
    )
    if args.plan:  # one that takes none of these batches is an error; by default it would be left out
        tried, dtype = model_batches[:1] if args.what == "ledger" else model_batches, DTYPES[dtypes[0]]
        for name in plans:
            find_plan(name, next((b for b in tried if not refusal(name, b, dtype)), tried[0]), dtype)
    picked = bool(args.model or args.names and args.what != "ops")
    return {
        "what": args.what,
        "device": device,
        "quick": args.quick or args.ladder,
        "ops": args.names if args.what == "ops" else [],
        "models": chosen,
        "backends": backends,
        "dtypes": dtypes,
        "ledger_models": chosen if picked else _ledger_models(device, args.quick),
        "batches": numbers(args.batch) if args.batch else list(batches),
        "contexts": numbers(args.context) if args.context else list(contexts),
        "model_batches": model_batches,
        "model_contexts": numbers(args.context) if args.context else list(model_contexts),
        "all_dtypes_everywhere": bool(args.dtype),
        "weights": args.weights,
        "seconds": args.seconds,
        "vendor": not args.no_vendor,
        "compile": not (args.no_compile or args.quick),
        "swap": args.swap or args.what == "all",
        "plans": plans,
        "ladder": args.ladder,
    }


def _ledger_models(device, quick):
    if device == "cpu":
        return ["smollm2-135m"]
    return list(QUICK_LEDGER if quick else LEDGER_MODELS)


def op_points(settings):
    """[(dtype, Point)]: the first dtype at every size, the others at the first batch and context, unless
    asked for."""
    found = []
    for i, dtype in enumerate(settings["dtypes"]):
        few = i and not settings["all_dtypes_everywhere"]
        batches, contexts = (settings[k][:1] if few else settings[k] for k in ("batches", "contexts"))
        found += [
            (dtype, p) for p in shapes.points(settings["models"], batches, contexts, settings["ops"] or None)
        ]
    return found


def require_work(settings):
    """Raises LabError for settings that measure nothing: a context that no model takes, an op without a
    ladder."""
    longest = max(shapes.preset(name).max_positions for name in settings["models"])
    if settings["what"] == "ledger" and settings["device"] == "cpu":
        raise LabError(
            "a ledger needs a GPU: its rows are device time stamps (lab bench ops|model run on a CPU)"
        )
    if settings["ladder"]:
        ladder_bench.points(settings["device"], settings["ops"])
        if not set(settings["backends"]) & set(rungs.BACKENDS):
            raise LabError(f"nothing to measure: ladders exist in {' and '.join(rungs.BACKENDS)}")
    if settings["what"] == "model" and min(settings["model_contexts"]) >= longest:
        raise LabError(f"nothing to measure: the models take contexts below {longest} tokens")
    if settings["what"] == "ops" and not op_points(settings):
        raise LabError("nothing to measure: no op takes these batches and contexts in these models")


def main(args, own=None):
    """own: more backends, {name: what has a function for each op that is measured} (`lab try`)."""
    if args.what == "crossover":
        return crossover.main(args)
    settings = settings_of(args)
    device = settings["device"]
    backends, notes = ops_bench.load_backends(settings["backends"], device, asked=bool(args.backend))
    backends |= own or {}
    settings["backends"] = list(backends)
    require_work(settings)
    of_device = (
        ["emulated: times are the host's and say nothing about a GPU"] if device == "cpu" else settle_clocks()
    )
    session = Session(args.out, device, settings, args.budget_minutes, args.fresh, notes + of_device)
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


def say(session, complete):
    """How the run ended, on the terminal; 1 if rows failed and none has a time, else 0."""
    errors = [r for r in session.rows if getattr(r, "error", None)]
    measured = any(r.kind in ("op", "model", "ledger") and r.us is not None for r in session.rows)
    failed = f", {len(errors)} failed" if errors else ""
    print(f"run {session.run}: {session.new} new lines in {session.path}{failed}")
    for r in errors[:5]:
        name = getattr(r, "op", None) or getattr(r, "model", "")
        print("  " + one_line(f"failed: {r.kind} {name} {r.backend}: {r.error}"))
    if not complete:
        print("stopped before the end: the same command goes on from here")
    if errors and not measured:
        print("lab bench: error: nothing could be measured: every row failed", file=sys.stderr)
        return 1
    return 0


def run_all(session, settings, backends):
    """Measures everything that the settings ask for; True when nothing is missing."""
    device, quick = settings["device"], settings["quick"]
    sizes = ceiling.QUICK_SIZES if quick else ceiling.SIZES
    rig = ops_bench.make_rig(backends, device, ceiling.Ceilings(), quick, settings["seconds"])
    rig.vendor, rig.plans = rig.vendor and settings["vendor"], tuple(settings["plans"])
    rig.lean = quick and settings["what"] == "all"
    steps = steps_of(session, rig, settings)
    total = sum(step.seconds for step in steps)
    if device == "cuda":
        total += PER_CEILING * len(sizes) * len(ceiling.DIRECTIONS)
        print(
            f"lab bench: {len(steps)} steps, about {total / 60:.1f} minutes if no kernel must be compiled "
            "and nothing is recorded yet",
            file=sys.stderr,
        )
    with Progress(total) as progress:
        if device == "cuda":
            rig.ceilings = measure_ceilings(session, settings, progress)
        for step in steps:
            if session.over():
                return False
            progress.step(step.label, step.seconds)
            step.run()
    return True


def steps_of(session, rig, settings):
    """The measurements in order of importance, so that a run that is cut has the headline.

    First the ops at the first dtype and batch, each model at its first size and its ledgers, and the ladders;
    then the models' other sizes, the ops' other batches, the compiled peers (compiling is slow), and the
    other dtypes.
    """
    what, (first, *_), device = settings["what"], settings["dtypes"], settings["device"]
    weights = model_bench.Weights(settings["weights"], first, device)
    sizes = [(b, c) for c in settings["model_contexts"] for b in sorted(settings["model_batches"])]
    models = [
        (name, b, c) for name in settings["models"] for b, c in sizes if c < shapes.preset(name).max_positions
    ]
    early_ops, late_ops, other_dtypes, early_models, late_models, compiled = [], [], [], [], [], []
    if what in ("ops", "all") and not settings["ladder"]:
        for dtype, point in sorted(
            op_points(settings), key=lambda found: found[1].batch
        ):  # a cut leaves whole ones
            modes = modes_of(rig, settings, dtype, point)
            run = functools.partial(measure_op, session, rig, weights, point, dtype, modes)
            label = f"{point.op} {point.role or ''} b{point.batch} {point.context or ''} {dtype}"
            stage = (
                other_dtypes
                if dtype != first
                else early_ops
                if point.batch == settings["batches"][0]
                else late_ops
            )
            stage.append(Step(label, len(modes) * (rig.seconds + PER_MODE), run))
    if what in ("model", "all"):
        for name, b, c in models:
            sides = rig.sides(b, first)
            if not sides:
                continue
            decoders = len(sides) * PER_DECODER + 8 * rig.seconds
            run = functools.partial(model_bench.measure_model, session, rig, weights, name, first, b, c)
            (early_models if (b, c) == sizes[0] else late_models).append(
                Step(f"{name} b{b} {c}", decoders, run)
            )
            if settings["compile"] and device == "cuda" and (b, c) == sizes[0]:
                run = functools.partial(
                    model_bench.measure_compiled, session, rig, weights, name, first, b, c
                )
                compiled.append(Step(f"{name} compiled", decoders + PER_COMPILATION, run))
    ledgers = []
    if what in ("ledger", "all") and device == "cuda":  # device time stamps are what a ledger is made of
        size = settings["model_batches"][0], settings["model_contexts"][0]
        for name in settings["ledger_models"]:
            given = session, rig, weights, name, first, *size
            ledgers += [
                Step(
                    f"ledger {name} {backend} {plan}",
                    PER_LEDGER + 12 * rig.seconds,
                    functools.partial(ledger.measure, *given, backend, plan),
                )
                for backend, plan in rig.sides(size[0], first)
            ]
            ledgers += [
                Step(
                    f"swaps {name} {plan}",
                    ledger.SWAP_SECONDS + 10 * PER_DECODER,
                    functools.partial(ledger.measure_swap, *given, plan),
                )
                for plan in rig.plans
                if settings["swap"] and plan != "persistent"
            ]  # it has one op to swap
    rungs = (
        ladder_bench.points(device, settings["ops"])
        if settings["ladder"] or (what == "all" and device == "cuda" and not settings["quick"])
        else []
    )
    ladders = [
        Step(
            f"ladder of {point.op}",
            ladder_bench.SECONDS + PER_LADDER,
            functools.partial(ladder_bench.measure, session, rig, point, first),
        )
        for point in rungs
    ]
    return [*early_ops, *early_models, *ledgers, *ladders, *late_models, *late_ops, *compiled, *other_dtypes]


def modes_of(rig, settings, dtype, point):
    """The modes a point is measured in. `all` has cold device times everywhere, and what hardly depends on
    the size (warm caches and activations, the host's time) at the first dtype and batch alone."""
    other_dtype = dtype != settings["dtypes"][0] and not settings["all_dtypes_everywhere"]
    if (
        rig.device == "cuda"
        and settings["what"] == "all"
        and (other_dtype or point.batch != settings["batches"][0])
    ):
        return rig.modes[:1]
    return ops_bench.QUICK_MODES if rig.device == "cuda" and other_dtype else rig.modes


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
    known_ones = {(r.direction, r.bytes) for r in session.of_kind("ceiling")}
    torch.cuda.empty_cache()
    for rows in ceiling.measure(
        session.run,
        settings["quick"],
        progress=lambda text: progress.step(text, PER_CEILING),
        known=known_ones,
    ):
        session.add(*rows)
        if session.over():
            break
    torch.cuda.empty_cache()
    return ceiling.Ceilings.of(session.rows)
