"""What the options of a model ask for, refused before anything is loaded where it cannot be had; and a model
with its decoder for a verb that serves many sequences: `lab run --batch-file`, `lab chat`, `lab serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lab.contract import DTYPES
from lab.dispatch import Ops, Trace, select
from lab.errors import LabError, warn
from lab.model.decoder import Decoder
from lab.model.kv_cache import kv_dtype_of
from lab.model.plans import find_plan
from lab.model.ranks import take_gpu
from lab.model.sources import open_source
from lab.model.text.tokenizer import Tokenizer
from lab.model.weight_formats import Formats, Storage, dtype_of, storage_of
from lab.model.weights import load, planned
from lab.names import known

CONTEXT = 2048  # tokens of a sequence that the cache has room for, unless --max-context says otherwise


@dataclass(frozen=True)
class Choice:
    """How a model is run: all names are known, fit each other, and this machine can run them."""

    device: str  # cuda or cpu
    dtype_name: str
    storage: Storage
    plan: str
    kv_dtype: str | None
    rows: int
    ops: Ops

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def formats_of(self, source) -> Formats:
        """In which formats a source's weights would be kept. Raises LabError where they cannot be. Reads no
        weights."""
        return planned(source, self.dtype, self.storage)[1]


def choose(
    backend: str | None = None,
    overrides: Mapping[str, str] | Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    plan: str = "basic",
    weights_as: str | None = None,
    quantise: str | None = None,
    quantise_head: str | None = None,
    kv_dtype: str | None = None,
    rows: int = 1,
    trace: Trace | None = None,
) -> Choice:
    """What the options of `lab run` and the arguments of lab.load() ask for; rows: sequences that are decoded
    together.

    Raises LabError for names that are unknown or contradict each other, Unavailable for a backend that this
    machine cannot run.
    """
    device = known(device or ("cuda" if torch.cuda.is_available() else "cpu"), ("cuda", "cpu"), "device")
    storage = storage_of(weights_as, quantise, quantise_head, device)
    name = dtype_of(weights_as, dtype) or ("bf16" if device != "cpu" else "fp32")
    name, cached = known(name, tuple(DTYPES), "dtype"), kv_dtype_of(kv_dtype)
    find_plan(plan, rows, DTYPES[name])
    take_gpu(device)  # the ops are bound to the current one
    ops = select(backend, device, overrides, trace)  # last: it may load an extension
    return Choice(device, name, storage, plan, cached, rows, ops)


def choice_of(args, rows: int = 1, trace: Trace | None = None) -> Choice:
    """choose() from the options of lab.options.model_arguments."""
    return choose(
        args.backend,
        args.override,
        args.device,
        args.dtype,
        args.plan,
        args.weights_as,
        args.quantise,
        args.quantise_head,
        args.kv_dtype,
        rows,
        trace,
    )


@dataclass
class Opened:
    """name: of the model. tokenizer: None where the model has none and none is needed."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None


def open_model(
    args, rows: int, needs_text: bool, context: Callable[[Tokenizer | None], int] = lambda _: CONTEXT
) -> Opened:
    """args: options of lab.options.model_arguments. rows: sequences that are decoded together. context:
    tokens of a sequence that the cache has room for, where --max-context is not given.

    Raises LabError for what cannot be had, before weights are loaded.
    """
    from lab.model.run import find_tokenizer, slowness

    if rows < 1:
        raise LabError(f"--batch {rows}: it must be at least 1")
    choice = choice_of(args, rows)
    source = open_source(args.model, args.weights)
    formats = choice.formats_of(source)
    tokenizer = find_tokenizer(source, needed=needs_text)
    limit = source.config.max_positions
    wanted = min(context(tokenizer), limit)
    context = wanted if args.max_context is None else args.max_context
    source.config.check_context(context)
    if slow := slowness(choice.ops, args.plan, choice.device, formats.packed):
        warn(slow)
    decoder = Decoder(
        load(source, choice.dtype, choice.device, choice.storage),
        choice.ops,
        rows,
        context,
        args.page_size,
        args.plan,
        args.eager,
        kv_dtype=choice.kv_dtype,
    )
    return Opened(source.name, decoder, tokenizer)
