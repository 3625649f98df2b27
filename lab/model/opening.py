"""A model and a decoder from the options of a verb that serves many sequences: `lab run --batch-file`, `lab
chat`, `lab serve`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.errors import LabError, warn
from lab.model.decoder import Decoder
from lab.model.text.tokenizer import Tokenizer

CONTEXT = 2048  # tokens of a sequence that the cache has room for, unless --max-context says otherwise


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

    from lab.contract import DTYPES
    from lab.dispatch import environment_overrides, select
    from lab.model.kv_cache import kv_dtype_of
    from lab.model.plans import find_plan
    from lab.model.run import find_tokenizer, numbers_of, slowness
    from lab.model.sources import open_source
    from lab.model.weights import load, planned

    if rows < 1:
        raise LabError(f"--batch {rows}: it must be at least 1")
    device, storage, dtype_name = numbers_of(args)
    dtype, cached = DTYPES[dtype_name], kv_dtype_of(args.kv_dtype)
    find_plan(args.plan, rows, dtype, cached)
    ops = select(args.backend, device, args.override or environment_overrides())
    source = open_source(args.model, args.weights)
    _, formats = planned(source, dtype, storage)
    find_plan(args.plan, rows, dtype, cached, formats.names)
    tokenizer = find_tokenizer(source, needed=needs_text)
    limit = source.config.max_positions
    wanted = min(context(tokenizer), limit)
    context = wanted if args.max_context is None else args.max_context
    source.config.check_context(context)
    if slow := slowness(ops, args.plan, device, formats.packed):
        warn(slow)
    decoder = Decoder(
        load(source, dtype, device, storage),
        ops,
        rows,
        context,
        args.page_size,
        args.plan,
        args.eager,
        kv_dtype=cached,
    )
    return Opened(source.name, decoder, tokenizer)
