"""Generation on a Decoder: prompts in, tokens and text out as they come, with the time of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from lab.errors import LabError
from lab.model.decoder import Decoder
from lab.model.sampling import GREEDY, ByRow, Sampling, for_rows


@dataclass
class Generation:
    """What one prompt gave. output_ids include the stop token; times are wall time in ms, device work
    included."""

    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    text: str | None = None  # None without a tokenizer
    prefill_ms: float = 0.0  # the prompt but for its last token
    decode_ms: list[float] = field(default_factory=list)  # one per output id; a batch shares each step's time
    # of Sampling.logprobs: for each output id its own log-probability and those of the likeliest tokens
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    stopped_by: str = "length"  # "stop" (an end token) or "length" (max_new_tokens, or the model's context)
    kernels: list[dict] = field(default_factory=list)  # rows of the trace: op, backend, kernel, calls


def generate(
    decoder: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    tokenizer=None,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """One prompt. on_text gets whole characters as they complete, on_token each id. See generate_batch."""
    return generate_batch(
        decoder,
        [prompt_ids],
        max_new_tokens,
        sampling,
        stop_ids,
        tokenizer,
        on_text and (lambda _, text: on_text(text)),
        on_token and (lambda _, token: on_token(token)),
    )[0]


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    tokenizer=None,
    on_text: Callable[[int, str], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Prompts of any lengths, at most decoder.batch of them, decoded together. The callbacks' first
    argument is the row.

    Every output token comes from a decode step: prefill stops one short of the prompt's end. A row ends at
    an id of `stop_ids`, after max_new_tokens, or when it is as long as the longest context that the model
    was made for. Raises LabError for a prompt that the model or the cache cannot take (before any work),
    for a cache that is smaller than that context and becomes full, and for logits that are not numbers. The
    rows are idle afterwards.
    """
    if not 1 <= len(prompts) <= decoder.batch:
        raise LabError(f"{len(prompts)} prompts for a batch of {decoder.batch}")
    if max_new_tokens < 1:
        raise LabError(f"max_new_tokens {max_new_tokens}: it must be at least 1")
    results = [Generation(list(prompt)) for prompt in prompts]
    for result in results:
        decoder.check(result.prompt_ids)
    streams = [tokenizer.stream(late=True) if tokenizer else None for _ in results]
    trace, most = decoder.ops.trace, decoder.config.max_positions
    texts = [[] for _ in results]

    def emit(row: int, text: str) -> None:
        texts[row].append(text)
        if text and on_text:
            on_text(row, text)

    def end(row: int, why: str) -> None:
        results[row].stopped_by = why
        decoder.finish(row)
        if streams[row]:
            emit(row, streams[row].finish())

    by_row = None if sampling.shared else for_rows(sampling, len(results))
    if by_row:
        for row, (own, result) in enumerate(zip(by_row, results)):
            decoder.buffers.rows.set(row, own, result.prompt_ids)
        sampling = ByRow.of(by_row)
    decoder.prepare(sampling)
    try:
        for row, result in enumerate(results):
            started = _now(decoder)
            decoder.admit(row, result.prompt_ids)
            result.prefill_ms = _now(decoder) - started
        while decoder.live_rows:
            started = _now(decoder)
            tokens = decoder.step(sampling).tolist()  # waits for the device
            elapsed = _now(decoder) - started
            for row in sorted(decoder.live_rows):
                result, token = results[row], tokens[row]
                if token < 0:
                    raise LabError(
                        f"the logits after token {len(result.prompt_ids) + len(result.output_ids)} are not "
                        f"numbers ({decoder.weights.dtype}); try another --dtype, or check the weights"
                    )
                result.output_ids.append(token)
                result.decode_ms.append(elapsed)
                if by_row and by_row[row].logprobs is not None:
                    result.logprobs.append(decoder.buffers.rows.reported(row, by_row[row].logprobs))
                if on_token:
                    on_token(row, token)
                if streams[row]:
                    emit(row, streams[row].push(token))
                if token in stop_ids:
                    end(row, "stop")
                elif len(result.output_ids) == max_new_tokens or decoder.cache.lengths[row] == most:
                    end(row, "length")
    finally:
        for row in range(len(results)):
            decoder.finish(row)
    for row, result in enumerate(results):
        result.text = "".join(texts[row]) if tokenizer else None
        result.kernels = trace.rows() if trace is not None else []
    return results


def teacher_forced_logits(decoder: Decoder, ids: Sequence[int], prefilled: int = 0) -> torch.Tensor:
    """Logits of the decode path over given ids: float32 [len(ids) - prefilled, vocab] on the CPU.

    Row t holds the logits after reading ids[prefilled + t]; the first `prefilled` ids go through prefill.
    What the model would have sampled is ignored. Uses row 0 of the batch.
    """
    ids = list(ids)
    if not 0 <= prefilled < len(ids):
        raise LabError(f"prefilled {prefilled}: it must be 0 or more and below the {len(ids)} ids")
    decoder.check(ids)
    decoder.prepare()
    rows = []
    try:
        decoder.admit(0, ids[: prefilled + 1])
        for following in [*ids[prefilled + 1 :], None]:
            decoder.step()
            rows.append(decoder.logits[0].cpu().clone())
            if following is not None:
                decoder.ids[0] = following
    finally:
        decoder.finish(0)
    return torch.stack(rows)


def _now(decoder: Decoder) -> float:
    """Wall time in ms, after the device has finished what it was given."""
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.perf_counter() * 1e3
