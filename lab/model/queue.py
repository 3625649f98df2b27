"""A queue in front of a Decoder: any number of sequences, which take turns in the rows of its batch and the
pages of its cache (continuous batching).

A sequence gets a row as soon as one is idle and its prompt's pages are free, and leaves it when it ends; the
others go on meanwhile. Sequences that begin alike share the full pages of that beginning. When pages run out,
the youngest is paused: its pages are freed, and when there is room again, prompt and answer so far are
prefilled anew.

Tokens are read one step late: while the device works on a step, the host reads what the step before gave. So
the device never waits for the host. It follows that a sequence which ends at a stop token has a row in one
more step, whose token is dropped; how many tokens a sequence may have at most is known beforehand and costs
none. A prefill, too, is launched as if its numbers were finite, and the step after it is launched before the
host reads whether they are; if not, the sequence is prefilled again with more care, and that step's token of
it is dropped.

The time of a step is from the end of what the device did before (a step, or a prefill) to its own end, so the
times of a sequence's steps leave out the prefills of others. On a GPU the device itself notes these ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from lab.errors import LabError
from lab.model.decoder import Decoder, token_ids
from lab.model.kv_cache import pages_for
from lab.model.sampling import GREEDY, ByRow, Sampling

SIZES = (1, 2, 4, 8, 16, 32, 64)  # batch sizes of which a step is captured as a CUDA graph


@dataclass(eq=False)
class Task:
    """A sequence from its submission to its end. output_ids include the stop token.

    logprobs: for each output id its own log-probability and those of the likeliest tokens, if
    sampling.logprobs asks for them. stopped_by: "stop", "length", "cancelled", or "error", which `error` then
    explains; None as long as it is not at its end. prefill_ms: of all its prefills, if it was paused; it has
    a value once the first token is there. decode_ms: the time in ms of each output id's step.
    """

    number: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Collection[int]
    on_token: Callable[[Task, int], None] | None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    stopped_by: str | None = None
    error: str | None = None
    launched: int = 0  # steps; each gives a token, which is read later
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    prefills: list[tuple[Mark, Mark]] = field(default_factory=list)  # not yet part of prefill_ms
    careful: bool = False  # whether prefill found numbers that are not finite


class Mark:
    """A point in what a device does, as far as it was launched when the mark was made."""

    def __init__(self, device: torch.device):
        if device.type == "cuda":
            self.event, self.at = torch.cuda.Event(enable_timing=True), None
            self.event.record()
        else:
            self.event, self.at = None, time.perf_counter()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, before: Mark) -> float:
        """Milliseconds; the device has passed both."""
        if self.event is not None:
            return before.event.elapsed_time(self.event)
        return (self.at - before.at) * 1e3


@dataclass
class Launched:
    """A step whose tokens are not read yet: tensors on the host that a copy fills, and whose each row is."""

    tasks: list[tuple[int, Task]]
    tensors: list[torch.Tensor]  # ids; with log-probabilities also those of RowSampling
    begin: Mark
    end: Mark  # after the copy

    def wait(self) -> list[list]:
        self.end.wait()
        return [tensor.tolist() for tensor in self.tensors]


def check_new_tokens(most: int) -> None:
    """Raises LabError unless `most` is a number of tokens that an answer may have."""
    if type(most) is not int or most < 1:
        raise LabError(f"max_new_tokens {most!r}: it must be a whole number and at least 1")


class Queue:
    """submit() sequences, then call step() until it returns False, or run(). Not safe for threads: one thread
    calls all methods. Two queues, each with a decoder of its own, may have a thread each; on a GPU give each
    a process instead, as no thread may allocate memory while another captures a CUDA graph."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.cache = decoder, decoder.cache
        self.waiting: deque[Task] = deque()
        self.running: dict[int, Task] = {}  # by row
        self.in_flight: Launched | None = None
        # The latest prefill, as long as the host has not read whether it is right.
        self.prefilled: tuple[Task, torch.Tensor, Mark] | None = None
        self.last = Mark(decoder.device)  # of the latest work
        self.submitted = self.paused = 0  # how many so far
        self.steps_left = 0  # for so many steps all running rows have pages
        self.tasks: list[tuple[int, Task]] = []  # those that ran in the latest step, and its kind
        self.kind: Sampling | ByRow = GREEDY
        self.sizes = [size for size in SIZES if size < decoder.batch] + [decoder.batch]

    def prepare(self, kind: Sampling | ByRow = GREEDY) -> None:
        """On a GPU, captures the steps of all batch sizes; else each is captured when it is first needed."""
        for size in self.sizes:
            self.decoder.prepare(kind, size)

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        on_token: Callable[[Task, int], None] | None = None,
    ) -> Task:
        """Appends a sequence to the queue. It ends after max_new_tokens or when the cache has no room for a
        longer one. on_token(task, token) is called for each token, in order.

        Raises LabError for a prompt that model and cache can never take.
        """
        ids, decoder = token_ids(prompt_ids), self.decoder
        decoder.check(ids)
        check_new_tokens(max_new_tokens)
        wrong = [token for token, _ in sampling.logit_bias if token >= decoder.config.vocab]
        if wrong:
            raise LabError(
                f"logit_bias: token id {wrong[0]} is outside the vocabulary of {decoder.config.vocab}"
            )
        # The last token is never read by a step, so it needs no place in the cache.
        most = min(max_new_tokens, self.cache.max_context - len(ids) + 1)
        needed = pages_for(len(ids) + most - 1, self.cache.page_size)
        if needed > self.cache.pages:
            raise LabError(
                f"a prompt of {len(ids)} tokens and {most} new ones need {needed} pages; the cache has "
                f"{self.cache.pages}"
            )
        task = Task(self.submitted, ids, most, sampling, stop_ids, on_token)
        self.submitted += 1
        self.waiting.append(task)
        return task

    def cancel(self, task: Task) -> None:
        """Ends a sequence; its row and pages are free."""
        if task.stopped_by is None:
            self._end(task, "cancelled")

    def run(self) -> None:
        """Until all sequences have ended. If it fails or is interrupted, rows and queue are empty after."""
        try:
            while self.step():
                pass
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Cancels everything, also a sequence whose last token is still to be read."""
        left = [task for _, task in self.in_flight.tasks] if self.in_flight is not None else []
        self.in_flight = self.prefilled = None
        for task in [*self.waiting, *self.running.values(), *left]:
            self.cancel(task)

    def step(self) -> bool:
        """Launches a step, and reads the tokens of the one before. Returns whether anything is left to do."""
        self._admit()
        self._make_room()
        launched = self._launch() if self.running else None
        self._read()
        self.in_flight = launched
        self._check_prefill()
        return bool(self.waiting or self.running or self.in_flight)

    def _admit(self) -> None:
        idle = self._idle()
        while idle and self.waiting:
            task = self.waiting[0]
            ids = task.prompt_ids + task.output_ids
            size, shared = self.cache.page_size, len(self.cache.shared_pages(ids[:-1]))
            # The next page of each running row is left, or the newcomer would soon be paused again.
            free = len(self.cache.free) - self._lacking(size)
            if pages_for(len(ids), size) - shared > free:
                break
            if self._check_prefill():  # of the one before, whose pages this one may share
                idle = self._idle()
                continue
            ahead = min(size, task.max_new_tokens - task.launched)
            if pages_for(len(ids) - 1 + ahead, size) - shared > free:
                ahead, self.steps_left = 1, 0
            self.waiting.popleft()
            row = idle.pop(0)
            self.decoder.buffers.rows.set(row, task.sampling, task.prompt_ids, task.output_ids)
            before = Mark(self.decoder.device)
            finite = self.decoder.admit(row, ids, share=True, ahead=ahead, wait=task.careful)
            copies = [] if finite is None else self._to_host([finite[None]], 1)
            self.last = Mark(self.decoder.device)
            task.prefills.append((before, self.last))
            self.running[row] = task
            if copies:
                self.prefilled = task, copies[0], self.last
        # A step of a smaller size costs less, so the highest rows move down where that makes a difference.
        while self.running and self._size(len(self.running)) < self._size(max(self.running) + 1):
            source, to = max(self.running), idle.pop(0)
            self.decoder.move(source, to)
            self.running[to] = self.running.pop(source)

    def _idle(self) -> list[int]:
        return [row for row in range(self.decoder.batch) if row not in self.running]

    def _check_prefill(self) -> bool:
        """Waits for the latest prefill. Where it was wrong, its sequence goes back to the queue. Returns
        whether that happened."""
        if self.prefilled is None:
            return False
        (task, finite, end), self.prefilled = self.prefilled, None
        end.wait()
        if finite.item() or task.stopped_by is not None:
            return False
        task.careful = True
        if self.in_flight is not None and any(task is other for _, other in self.in_flight.tasks):
            self.in_flight.tasks = [pair for pair in self.in_flight.tasks if pair[1] is not task]
            task.launched -= 1
        if task not in self.waiting:  # where it is if it was paused
            self._leave(task)
            self.waiting.appendleft(task)
        return True

    def _size(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    def _make_room(self) -> None:
        """Pauses the youngest sequences until the others have pages for a step. Where pages are plenty, the
        rows get those of several steps at once: of 64 rows with pages of 16 tokens four need a new one in
        each step, and each time the device would have to change the block table before that step."""
        if self.steps_left:
            return
        free = self.cache.free
        if self._lacking(1) > len(free):
            self._read()  # to pause a sequence, all its tokens must be known; and some may have ended
        while self._lacking(1) > len(free):
            row = max(self.running, key=lambda row: self.running[row].number)
            task = self.running.pop(row)
            self.decoder.finish(row)
            self.waiting.appendleft(task)
            self.paused += 1
        ahead = self.cache.page_size
        self.steps_left = ahead if self._lacking(ahead) <= len(free) else 1
        self.cache.reserve(self._tokens(self.steps_left))

    def _tokens(self, steps: int) -> dict[int, int]:
        """How many tokens each running row gets in so many steps; none after its last one."""
        return {row: min(steps, task.max_new_tokens - task.launched) for row, task in self.running.items()}

    def _lacking(self, steps: int) -> int:
        """How many pages the running rows lack for so many steps."""
        return sum(self.cache.missing(row, tokens) for row, tokens in self._tokens(steps).items())

    def _launch(self) -> Launched:
        tasks = list(self.running.items())
        if tasks != self.tasks:
            self.tasks, self.kind = tasks, ByRow.of([task.sampling for _, task in tasks])
        kind, size = self.kind, self._size(max(self.running) + 1)
        self.decoder.step(kind, size)
        self.steps_left -= 1
        found, rows = [self.decoder.ids], self.decoder.buffers.rows
        if isinstance(kind, ByRow) and kind.logprobs:
            found += [rows.logprob, rows.top_tokens, rows.top_logprobs]
        copies = self._to_host(found, size)
        begin, self.last = self.last, Mark(self.decoder.device)
        launched = Launched(tasks, copies, begin, self.last)
        for row, task in launched.tasks:
            task.launched += 1
            if task.launched == task.max_new_tokens:  # nothing that is read later can change that
                self._leave(task)
        return launched

    def _to_host(self, tensors, rows) -> list[torch.Tensor]:
        """Copies of the first rows, which the device fills later."""
        if self.decoder.device.type != "cuda":
            return [tensor[:rows].clone() for tensor in tensors]
        # torch keeps freed pinned memory, so no step allocates it anew.
        copies = [torch.empty_like(t[:rows], device="cpu", pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors):
            copy.copy_(tensor[:rows], non_blocking=True)
        return copies

    def _read(self) -> None:
        """Reads the tokens of the step in flight, if there is one."""
        launched, self.in_flight = self.in_flight, None
        if launched is None:
            return
        tokens, *reported = launched.wait()
        took = launched.end.since(launched.begin)
        for row, task in launched.tasks:
            if task.stopped_by is not None:  # it ended after this step was launched
                continue
            token = tokens[row]
            if token < 0:
                task.error = (
                    f"the logits after token {len(task.prompt_ids) + len(task.output_ids)} are not numbers "
                    f"({self.decoder.weights.dtype}); try another --dtype, or check the weights"
                )
                self._end(task, "error")
                continue
            task.output_ids.append(token)
            task.decode_ms.append(took)
            while task.prefills:
                before, after = task.prefills.pop()
                task.prefill_ms += after.since(before)
            if reported and task.sampling.logprobs is not None:
                own, top, values = (numbers[row] for numbers in reported)
                most = task.sampling.logprobs
                task.logprobs.append((own, dict(zip(top[:most], values[:most]))))
            if token in task.stop_ids:
                self._end(task, "stop")
            elif len(task.output_ids) == task.max_new_tokens:
                self._end(task, "length")
            if task.on_token:
                task.on_token(task, token)

    def _end(self, task: Task, why: str) -> None:
        task.stopped_by = why
        self._leave(task)
        if task in self.waiting:
            self.waiting.remove(task)

    def _leave(self, task: Task) -> None:
        for row, other in list(self.running.items()):
            if other is task:
                del self.running[row]
                self.decoder.finish(row)
