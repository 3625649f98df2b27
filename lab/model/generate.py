"""Generation on a Decoder: prompts in, tokens and text out as they come, with the time of each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from lab.errors import LabError
from lab.model.decoder import Decoder, token_ids
from lab.model.queue import Queue, Task
from lab.model.sampling import GREEDY, ByRow, Sampling


@dataclass
class Generation:
    """What one prompt gave. output_ids include the stop token; times are in ms, from the end of what the
    device did before to the end of this (lab/model/queue.py)."""

    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    text: str | None = None  # None without a tokenizer
    prefill_ms: float = 0.0  # the prompt but for its last token
    decode_ms: list[float] = field(default_factory=list)  # one per output id; a batch shares each step's time
    # of Sampling.logprobs: for each output id its own log-probability and those of the likeliest tokens
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    stopped_by: str = "length"  # "stop" (an end token) or "length" (max_new_tokens, or the longest context)
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
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_ids: Collection[int] = (),
    tokenizer=None,
    on_text: Callable[[int, str], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Any number of prompts of any lengths, which take turns in the rows of the decoder's batch
    (lab/model/queue.py). Results are in the order of the prompts; the callbacks' first argument is the
    prompt's index.

    sampling: one for each prompt, or one for all; then prompt i has its seed plus i, so that equal prompts
    get different answers. Every output token comes from a decode step: prefill stops one short of the
    prompt's end. A sequence ends at an id of `stop_ids`, after max_new_tokens, or when it is as long as the
    cache allows. Raises LabError for a prompt or a sampling that the model or the cache cannot take (before
    any work), and for logits that are not numbers. All rows are idle afterwards.
    """
    queue, trace = Queue(decoder), decoder.ops.trace
    texts: list[list[str]] = [[] for _ in prompts]
    streams = {}  # of sequences that have begun and not ended

    def emit(index: int, text: str) -> None:
        texts[index].append(text)
        if text and on_text:
            on_text(index, text)

    def take(task: Task, token: int) -> None:
        index = task.number
        if on_token:
            on_token(index, token)
        if tokenizer is None:
            return
        if index not in streams:
            streams[index] = tokenizer.stream(late=True)
        emit(index, streams[index].push(token))
        if task.stopped_by is not None:
            emit(index, streams.pop(index).finish())

    tasks = [
        queue.submit(ids, max_new_tokens, own, stop_ids, take)
        for ids, own in zip(prompts, by_prompt(sampling, len(prompts)))
    ]
    queue.prepare(ByRow.of([task.sampling for task in tasks]))  # or the first step's time had it in it
    queue.run()
    for task in tasks:
        if task.error:
            raise LabError(task.error)
    kernels = trace.rows() if trace is not None else []
    return [
        Generation(
            task.prompt_ids,
            task.output_ids,
            None if tokenizer is None else "".join(text),
            task.prefill_ms,
            task.decode_ms,
            task.logprobs,
            task.stopped_by,
            kernels,
        )
        for task, text in zip(tasks, texts)
    ]


def by_prompt(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    """One for each of so many prompts; see generate_batch. Raises LabError for another number of them."""
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=(sampling.seed + i) % (1 << 64)) for i in range(prompts)]
    if not isinstance(sampling, Sequence) or not all(isinstance(one, Sampling) for one in sampling):
        raise LabError("sampling must be a Sampling, or a list with one for each prompt")
    if len(sampling) != prompts:
        raise LabError(f"{len(sampling)} samplings for {prompts} prompts: give one for each, or one for all")
    return list(sampling)


def teacher_forced_logits(decoder: Decoder, ids: Sequence[int], prefilled: int = 0) -> torch.Tensor:
    """Logits of the decode path over given ids: float32 [len(ids) - prefilled, vocab] on the CPU.

    Row t holds the logits after reading ids[prefilled + t]; the first `prefilled` ids go through prefill.
    What the model would have sampled is ignored. Uses row 0 of the batch.
    """
    ids = token_ids(ids)
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
