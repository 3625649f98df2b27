"""`lab bench serving MODEL`: many sequences through the queue (lab/model/queue.py), by the batch's size.

Prompts and answers are as long as those of a real service; the tokens are random and no answer ends early.
More sequences wait than there are rows, so that a row whose sequence ends is given to the next one. What is
measured begins when the first rows are full, and ends when no sequence waits: what a server under load gives,
without its beginning and its end.

Beside it stands the ideal: all rows always full, no prefills, and each step as long as its graph alone.

What a step costs in the queue beside its graph is told of steps with all rows full and contexts near the
median, for steps of all contexts differ by more than the queue adds; the graph is timed with the contexts
of the one in the middle. `us` is their median, from the end of what the device did before to its own end:
it has the copy of the tokens, what changes for rows that come and go, and whatever the host keeps the
device waiting for. Steps that follow a prefill have a median of their own, `after_prefill_us`: torch's
prefill keeps the host as busy as the device, so the device waits until the host has launched the step,
which is a cost of the prefill. (Where no other steps have all rows full, `us` is of them, too.) Tokens per
second have all of it.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

from lab.errors import LabError, error_text
from lab.harness import timing
from lab.harness.model_bench import fill_rows, release, timed_step
from lab.harness.ops_bench import alive
from lab.model.decoder import Decoder
from lab.model.queue import Mark, Queue
from lab.records.schema import ServingRow

BATCHES = {"cuda": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 2, 4)}
PLANS = {"cuda": ("fused",), "cpu": ("basic",)}  # on a GPU the fastest that takes every batch
SCALE = {"cuda": 1.0, "cpu": 1 / 64}  # of all lengths: on a CPU a token takes a thousand times as long
SEED = 0


@dataclass(frozen=True)
class Drawn:
    """Log-normal lengths in tokens, given by median and mean; a longer one than `most` is cut to it."""

    median: float
    mean: float
    most: int

    def draw(self, rand: random.Random, scale: float) -> int:
        # The mean of a log-normal distribution is median * exp(sigma^2 / 2).
        sigma = math.sqrt(2 * math.log(self.mean / self.median))
        length = min(self.median * math.exp(rand.gauss(0, sigma)), self.most)
        return max(1, round(scale * length))


# Chats with a service: the conversation half of the Azure LLM inference trace of 2023, 19,366 requests
# (github.com/Azure/AzurePublicDataset, CC-BY; Patel and others, "Splitwise", ISCA 2024). Medians and means
# are those of the trace; lengths are cut at its 99th percentiles.
NAME = "azure-chat-2023"
PROMPT, ANSWER = Drawn(1020, 1155, 4142), Drawn(129, 211, 601)


def requests(count: int, vocab: int, scale: float, longest: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens of the answer) of so many sequences, at most `longest` tokens together; always the
    same."""
    rand, found = random.Random(SEED), []
    for _ in range(count):
        prompt = min(PROMPT.draw(rand, scale), longest - 1)
        answer = min(ANSWER.draw(rand, scale), longest - prompt)
        found.append(([rand.randrange(vocab) for _ in range(prompt)], answer))
    return found


def measure(session, rig, weights, name: str, dtype_name: str, batch: int, quick: bool) -> None:
    """Records a row for each backend and plan; one that fails has an `error`. weights: model_bench.Weights.
    quick: fewer sequences."""
    rows = [
        ServingRow(
            session.run,
            name,
            backend,
            plan,
            dtype_name,
            batch,
            NAME,
            SCALE[rig.device],
            "event" if rig.device == "cuda" else "wall",
            weights=weights.kind,
            weight_format=weights.format_of(name),
            kv_dtype=rig.kv_dtype,
            emulated=rig.device != "cuda",
        )
        for backend, plan in rig.sides(batch, dtype_name)
    ]
    for row in rows:
        if session.has(row):
            continue
        try:
            _fill(row, rig, weights.of(name), (2 if quick else 4) * batch + 8)
        except (RuntimeError, LabError) as error:  # out of memory, or a cache that does not fit
            row.error = error_text(error)
        session.add(row)
        print(told(row), flush=True)
        release(rig.device)
        if rig.device == "cuda":
            alive(f"{name} with many sequences, batch {batch}")


def told(row: ServingRow) -> str:
    said = f"{row.model} {row.backend} {row.plan} {row.dtype}, {row.batch} rows: "
    if row.error:
        return said + row.error
    return said + (
        f"{row.tokens_per_s:,.0f} tokens/s, {row.of_ideal:.0%} of the ideal; a step takes {row.us:.0f} us, "
        f"its graph {row.graph_us:.0f} ({row.of_graph - 1:+.1%})"
        + (f", after a prefill {row.after_prefill_us:.0f}" if row.after_prefill_us else "")
        + f"; prefills {row.prefill_share:.0%} of time"
    )


@dataclass
class Step:
    """A step in the queue: its time, and how many tokens each of its rows attended to."""

    begin: Mark
    end: Mark
    contexts: list[int]
    after_prefill: bool

    @property
    def us(self) -> float:
        return 1e3 * self.end.since(self.begin)


def _fill(row: ServingRow, rig, weights, count: int) -> None:
    config = weights.config
    given = requests(count, config.vocab, row.scale, config.max_positions)
    longest = max(len(prompt) + answer for prompt, answer in given)
    ops = rig.backends[row.backend]
    decoder = Decoder(weights, ops, row.batch, longest, plan=row.plan, kv_dtype=rig.kv_dtype)
    queue = Queue(decoder)
    queue.prepare()
    for prompt, _ in given[:2]:  # what is only slow the first time
        queue.submit(prompt, 2)
    queue.run()
    for one in given:
        queue.submit(*one)
    row.sequences = len(given)
    try:
        steps = run(queue)
    finally:
        queue.clear()
    full = [step for step in steps if len(step.contexts) == row.batch]
    if not full:
        raise LabError("no step had all rows full: the sequences are too short")
    after = [step for step in full if step.after_prefill]
    alike = near_the_median([step for step in full if not step.after_prefill] or full)
    for field, value in timing.summarize([step.us for step in alike]).fields().items():
        setattr(row, field, value)
    if after:
        row.after_prefill_us = statistics.median(step.us for step in near_the_median(after))
    sum_up(row, steps, queue)
    fill_rows(decoder, alike[len(alike) // 2].contexts)
    graph = timed_step(decoder, "graph")
    limits = (2, 5) if rig.device == "cpu" else (20, 300)
    row.graph_us = timing.measure({"graph": graph}, 4 * rig.seconds, *limits)["graph"].us
    graph.close()
    row.of_graph = row.us / row.graph_us
    row.ideal_tokens_per_s = row.batch / row.graph_us * 1e6
    row.of_ideal = row.tokens_per_s / row.ideal_tokens_per_s


def near_the_median(steps: list[Step]) -> list[Step]:
    """The fifth in the middle of all steps, in order of the tokens that they attended to."""
    ordered = sorted(steps, key=lambda step: sum(step.contexts))
    return ordered[2 * len(steps) // 5 : -(-3 * len(steps) // 5)]


def run(queue: Queue) -> list[Step]:
    """The steps from the first one with all rows that can be full to the last one before which sequences
    waited."""
    steps = []
    while queue.waiting:
        queue.step()
        step = queue.in_flight
        contexts = [len(task.prompt_ids) + task.launched - 1 for _, task in step.tasks]
        after_prefill = not steps or step.begin is not steps[-1].end
        steps.append(Step(step.begin, step.end, contexts, after_prefill))
    queue.in_flight.end.wait()
    return steps


def sum_up(row: ServingRow, steps: list[Step], queue: Queue) -> None:
    """The row's fields of all steps together. The first prefills lie before the first step and are left
    out."""
    ms, tokens = steps[-1].end.since(steps[0].begin), sum(len(step.contexts) for step in steps)
    row.tokens, row.seconds, row.tokens_per_s = tokens, ms / 1e3, tokens / ms * 1e3
    row.context = round(sum(sum(step.contexts) for step in steps) / tokens)
    row.rows_used = tokens / (len(steps) * row.batch)
    row.prefill_share = max(0.0, 1 - sum(step.us for step in steps) / (1e3 * ms))
    row.paused = queue.paused
