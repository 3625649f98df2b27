"""What a bench is asked to measure: `Request`, made by the command line or by another verb, and `Settings`,
the same with every default filled in.

A run records its settings in the env row, and a stopped run goes on where its settings are those that are
asked for now.
"""

import dataclasses
from dataclasses import dataclass

import torch

from lab import rungs
from lab.contract import BACKENDS, DTYPES
from lab.errors import LabError
from lab.formats import FORMATS
from lab.harness import accuracy, ladder_bench, serving_bench, shapes
from lab.model.kv_cache import kv_dtype_of
from lab.model.plans import PLANS, find_plan, refusal
from lab.model.sources import DEFAULT_MODEL
from lab.model.weight_formats import Storage, dtype_of, storage_of
from lab.names import known
from lab.ops import find, require_formats

PLAIN = "none"  # stands for plain weights among weight formats


@dataclass(frozen=True)
class Request:
    """One run of the bench. None: the default, which depends on the device and on `quick`."""

    what: str = "all"  # ops, model, serving, accuracy, ledger or all
    out: str = "out/bench"  # the folder of records.jsonl
    ops: tuple[str, ...] = ()  # for ops: which; none: all
    models: tuple[str, ...] | None = None  # presets: of the ops' shapes, or those that are measured
    device: str | None = None  # cuda or cpu
    backends: tuple[str, ...] | None = None  # named ones must be there; by default those that can run
    dtypes: tuple[str, ...] | None = None  # named ones are measured at every size; by default the first alone
    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None  # tokens in the KV cache
    plans: tuple[str, ...] | None = None  # of the models' decode steps
    weights: str = "random"  # of the models: random, or auto, which reads real ones
    weights_as: str | None = None  # of the models: stored (the default) or a dtype
    quantise: str | None = None  # of the models: a weight format
    quantise_head: str | None = None  # that of the output head, or none
    weight_formats: tuple[str, ...] | None = None  # of ops or models, each in turn; "none": plain weights
    kv_dtype: str | None = None  # of the KV cache, of models and of ops: auto (the default), fp8 or int8
    seconds: float | None = None  # of sampling, for each configuration and timer
    quick: bool = False  # fewer sizes, shorter samples
    ladder: bool = False  # for ops: the rungs of their ladders instead
    swap: bool = False  # for a ledger: also a token for each op swapped
    inside: bool = False  # for a ledger: the inside of the persistent step instead (lab/harness/inside.py)
    vendor: bool = True  # also the ops' peers: cuBLAS, cuDNN, ...
    compile: bool = True  # also the models' torch.compile peer
    fresh: bool = False  # begin a new run even where a stopped one could go on
    points: tuple[shapes.Point, ...] = ()  # of ops: these sizes; none: those of the models
    budget_minutes: float | None = None  # stop cleanly after so long


@dataclass(frozen=True)
class Settings:
    """What is measured, all defaults filled in: two runs of equal settings measure the same rows."""

    what: str
    device: str
    quick: bool
    ops: tuple[str, ...]  # none: all
    models: tuple[str, ...]
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]  # all sizes are measured at the first
    ledger_models: tuple[str, ...]
    batches: tuple[int, ...]  # of ops
    contexts: tuple[int, ...]
    model_batches: tuple[int, ...]  # of models and ledgers
    model_contexts: tuple[int, ...]
    all_dtypes_everywhere: bool  # the other dtypes at every size, too
    weights: str
    weights_as: str | None
    quantise: str | None
    quantise_head: str | None
    weight_formats: tuple[str, ...]  # none: what `quantise` says
    kv_dtype: str | None  # None: the dtype of the model, or of the op
    seconds: float | None
    vendor: bool
    compile: bool
    swap: bool
    plans: tuple[str, ...]
    ladder: bool
    inside: bool
    points: tuple[shapes.Point, ...] = ()  # of ops: these alone

    @property
    def storage(self) -> Storage:
        """In which formats the models' weights are kept."""
        return storage_of(self.weights_as, self.quantise, self.quantise_head, self.device)

    @property
    def storages(self) -> list[Storage]:
        """The same for each of the weight formats that models are measured in, one after the other."""
        if not self.weight_formats or self.what == "all":
            return [self.storage]
        first = (PLAIN,) if self.what == "accuracy" else ()  # what the others are held to
        return [
            storage_of("fp32", *((None, None) if name == PLAIN else (name, self.quantise_head)))
            for name in dict.fromkeys((*first, *self.weight_formats))
        ]

    @property
    def formats(self) -> list[str | None]:
        """The weight formats of ops, None for plain weights."""
        return [None if name == PLAIN else name for name in self.weight_formats]

    def recorded(self) -> dict:
        """As a record has them: JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["points"] = tuple(dataclasses.asdict(point) for point in self.points)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@dataclass(frozen=True)
class Defaults:
    """What is measured where nothing is asked for."""

    models: tuple[str, ...]
    batches: tuple[int, ...]  # of ops
    contexts: tuple[int, ...]
    model_batches: tuple[int, ...]
    model_contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    ledger_models: tuple[str, ...]


# What `all` measures with packed weights, of the products of a layer of its last model, under the basic plan:
# enough to see how each kind of format fares, in half a minute.
IN_FORMATS, IN_FORMATS_BATCHES = ("int4-g128", "fp8", "int8-g32"), (1, 16, 64)

DEFAULTS = {  # (device, quick)
    ("cuda", False): Defaults(
        models=shapes.MODELS,
        batches=(1, 4, 16, 64),
        contexts=(1024, 8192, 32768),
        model_batches=(1, 4, 16, 64),
        model_contexts=(1024, 8192),
        dtypes=("bf16", "fp16", "fp32"),
        # Where a token goes: in the one launches take most of it, in the other bytes do.
        ledger_models=("llama-3.2-1b", "llama-3.1-8b"),
    ),
    ("cuda", True): Defaults(
        models=("smollm2-135m", "llama-3.2-1b"),
        batches=(1, 16),
        contexts=(1024,),
        model_batches=(1, 16),
        model_contexts=(1024,),
        dtypes=("bf16",),
        ledger_models=("llama-3.2-1b",),
    ),
    ("cpu", False): Defaults(
        models=("smollm2-135m",),
        batches=(1, 4),
        contexts=(64, 256),
        model_batches=(1,),
        model_contexts=(32,),
        dtypes=("fp32",),
        ledger_models=("smollm2-135m",),
    ),
    ("cpu", True): Defaults(
        models=("smollm2-135m",),
        batches=(1,),
        contexts=(64,),
        model_batches=(1,),
        model_contexts=(16,),
        dtypes=("fp32",),
        ledger_models=("smollm2-135m",),
    ),
}


def settings_of(request: Request) -> Settings:
    """The request with its defaults filled in. Raises LabError for what there is not, or not here."""
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise LabError("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    if request.ladder and request.what != "ops":
        raise LabError("--ladder measures ops: lab bench ops --ladder")
    for name in () if request.ladder else request.ops:  # names of ladders: require_work() looks them up
        if find(name).whole_step:
            raise LabError(f"{name} is a whole step, measured as a token: lab bench model --plan persistent")
        if find(name).between_ranks:
            raise LabError(f"{name} waits for other ranks, with which it is measured: lab bench exchange")
    check_formats(request)
    serving = request.what == "serving"
    if serving and request.contexts:
        raise LabError("--context: lab bench serving draws the lengths of its sequences")
    default, kv_dtype = DEFAULTS[device, request.quick], kv_dtype_of(request.kv_dtype)
    models = request.models or (default.ledger_models[:1] if serving else default.models)
    of_accuracy = request.what == "accuracy"
    if of_accuracy:  # of real weights, so a model may be a file or a folder, too
        models = request.models or (DEFAULT_MODEL,)
    else:
        for name in models:
            shapes.preset(name)
    of_weights = dtype_of(request.weights_as, request.dtypes[0] if request.dtypes else None)
    dtypes = request.dtypes or ((of_weights,) if of_weights else default.dtypes)
    model_batches = request.batches or default.model_batches[: 1 if of_accuracy else None]
    plans = tuple(PLANS) if device == "cuda" else ("basic",)
    if serving:
        model_batches, plans = request.batches or serving_bench.BATCHES[device], serving_bench.PLANS[device]
    settings = Settings(
        what=request.what,
        device=device,
        quick=request.quick or request.ladder,
        ops=request.ops,
        models=models,
        backends=tuple(known(name, BACKENDS, "backend") for name in request.backends or BACKENDS),
        dtypes=tuple(known(name, list(DTYPES), "dtype") for name in dtypes),
        ledger_models=request.models or default.ledger_models,
        batches=request.batches or default.batches,
        contexts=request.contexts or default.contexts,
        model_batches=model_batches,
        model_contexts=request.contexts or default.model_contexts[: 1 if of_accuracy else None],
        all_dtypes_everywhere=bool(request.dtypes),
        weights="auto" if of_accuracy else request.weights,
        weights_as=request.weights_as,
        quantise=request.quantise,
        quantise_head=request.quantise_head,
        weight_formats=tuple(request.weight_formats or (accuracy.FORMATS if of_accuracy else ())),
        kv_dtype=kv_dtype,
        seconds=request.seconds,
        vendor=request.vendor,
        # The compiled model's KV cache is in the model's dtype.
        compile=request.compile and not request.quick and not of_accuracy and kv_dtype is None,
        swap=request.swap or request.what == "all",
        plans=request.plans or plans,
        ladder=request.ladder,
        inside=request.inside,
        points=request.points,
    )
    settings.storages  # raises LabError for names that are unknown
    if settings.quantise is not None and settings.what == "ops":
        raise LabError("--quantise is of the models' weights: for ops, lab bench ops --weight-format")
    if request.plans:
        require_plans(settings)
    return settings


def check_formats(request: Request) -> None:
    """Raises LabError for weight formats that are unknown, or asked of what has none."""
    if not request.weight_formats:
        return
    for name in request.weight_formats:
        known(name, (*FORMATS, PLAIN), "weight format")
    if request.what == "ledger":
        raise LabError("--weight-format: a ledger is of one format, which --quantise names")
    if request.ladder:
        raise LabError("--weight-format: a ladder has the weights that it was written for")
    if request.quantise is not None or request.weights_as == "stored":
        other = "--quantise" if request.quantise is not None else "--weights-as stored"
        raise LabError(f"--weight-format and {other} contradict each other: leave one of them out")
    for name in request.ops:
        require_formats(find(name))


def require_plans(settings: Settings) -> None:
    """Raises LabError for a plan that takes none of the batches. Only for plans that were asked for: by
    default such a plan is left out."""
    dtype, tried = DTYPES[settings.dtypes[0]], settings.model_batches
    if settings.what == "ledger":
        tried = tried[:1]  # a ledger is of one batch
    for name in settings.plans:
        taken = (batch for batch in tried if not refusal(name, batch, dtype))
        find_plan(name, next(taken, tried[0]), dtype)


def require_work(settings: Settings) -> None:
    """Raises LabError for settings that measure nothing: a context that no model takes, an op without a
    ladder."""
    if settings.what == "accuracy":
        return
    longest = max(shapes.preset(name).max_positions for name in settings.models)
    if settings.what == "ledger" and settings.device == "cpu" and not settings.inside:
        raise LabError(
            "a ledger needs a GPU: its rows are device time stamps (lab bench ops|model run on a CPU)"
        )
    if settings.ladder:
        ladder_bench.points(settings.device, settings.ops, True)
        if not set(settings.backends) & set(rungs.BACKENDS):
            raise LabError(f"nothing to measure: ladders exist in {' and '.join(rungs.BACKENDS)}")
    if settings.what == "model" and min(settings.model_contexts) >= longest:
        raise LabError(f"nothing to measure: the models take contexts below {longest} tokens")
    if settings.what == "ops" and not settings.ladder and not op_points(settings):
        raise LabError("nothing to measure: no op takes these batches and contexts in these models")


def op_points(settings: Settings) -> list:
    """[(dtype, Point)]: the first dtype at every size, the others at the first batch and context, unless
    asked for. With weight formats, the ops that take them, in each format; in `all`, a few of them beside all
    plain ones."""
    if settings.points:
        return [(dtype, point) for dtype in settings.dtypes for point in settings.points]
    found = []
    of_all = settings.what == "all"
    for i, dtype in enumerate(settings.dtypes):
        batches, contexts = settings.batches, settings.contexts
        if i and not settings.all_dtypes_everywhere:
            batches, contexts = batches[:1], contexts[:1]
        points = shapes.points(settings.models, batches, contexts, settings.ops or None, settings.kv_dtype)
        if settings.weight_formats and not of_all:
            points = shapes.in_formats(points, settings.formats)
        found += [(dtype, point) for point in points]
    if of_all and settings.device == "cuda" and not settings.quick:
        points = shapes.in_formats(of_a_layer(settings), settings.formats or IN_FORMATS)
        found += [(settings.dtypes[0], point) for point in points]
    return found


def of_a_layer(settings: Settings) -> list:
    """The points of what each layer of the last model does, under the basic plan alone and at any context."""
    model = settings.models[-1]
    config, batches = shapes.preset(model), [b for b in IN_FORMATS_BATCHES if b in settings.batches]
    return [
        point
        for point in shapes.points((model,), batches, ())
        if find(point.op).plans == ("basic",) and find(point.op).calls(config, point.role) == config.layers
    ]
