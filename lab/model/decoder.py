"""The decode step of a Llama-family model: one new token for every sequence of a batch.

The step itself is a plan, a list of the dispatcher's ops (lab/model/plans; basic.py is the textbook model).
This module keeps the state of the sequences. All buffers are allocated once, and positions, context lengths
and sampled ids stay on the device and advance there, so that on a GPU the whole step is captured as one
CUDA graph and replayed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

import torch

from lab.dispatch import Ops
from lab.errors import LabError
from lab.model.kv_cache import PagedKVCache
from lab.model.plans import find_plan
from lab.model.plans.buffers import StepBuffers
from lab.model.prefill import launch_prefill, prefill
from lab.model.sampling import GREEDY, ONE_PART, ByRow, Sampling, send
from lab.model.weights import Weights


def token_ids(ids: Sequence[int]) -> list[int]:
    """ids, which may be whole numbers of NumPy or torch, as Python's. Raises LabError for any other: a tensor
    of ids would cut off what a float has behind its point."""
    try:
        return [operator.index(token) for token in ids]
    except TypeError as error:
        raise LabError(f"token ids must be whole numbers: {error}") from None


class Decoder:
    """A batch of sequences and the buffers of their decode step.

    batch: rows, each empty (idle) or one sequence; max_context: most tokens of one sequence, prompt
    included. eager: launch op by op on a GPU too, instead of replaying a CUDA graph. splits: blocks that
    share one KV head's context in decode_attention; None fills the device. kv_dtype: the format of a
    quantised KV cache (lab/formats/kv.py). Raises LabError for an unknown
    plan, a page size or context that is not supported, and a batch or model that the plan does not take. A
    backend that cannot run was refused before, by lab.dispatch.select.
    """

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        batch: int = 1,
        max_context: int = 1024,
        page_size: int = 16,
        plan: str = "basic",
        eager: bool = False,
        splits: int | None = None,
        pages: int | None = None,
        kv_dtype: str | None = None,
    ):
        self.plan, self.plan_step = plan, find_plan(plan, batch, weights.dtype)
        self.weights, self.ops, self.batch, self.config = weights, ops, batch, weights.config
        self.device = weights.device
        # With check_contents every op first reads tensors on the host; a replayed graph would leave that out.
        self.eager = eager or weights.device.type != "cuda" or ops.check_contents
        self.cache = PagedKVCache(
            weights.config,
            batch,
            max_context,
            weights.dtype,
            weights.device,
            page_size,
            pages,
            kv_dtype=kv_dtype,
            scales=weights.kv_scales if kv_dtype == "fp8" else None,
        )
        self.buffers = StepBuffers(weights, ops, self.cache, batch, splits, persistent=plan == "persistent")
        # The state of the sequences, which the step advances on the device; the tensors stay where they are.
        self.ids, self.logits = self.buffers.ids, self.buffers.logits
        self.state, self.live = self.buffers.state, self.buffers.live
        self.positions, self.context_lens = self.buffers.positions, self.buffers.context_lens
        self.live_rows: set[int] = set()
        self.steps = {batch: self.buffers}  # of the first so many rows
        # by what is sampled, and of how many rows
        self.graphs: dict[tuple[Sampling | ByRow, int], tuple[torch.cuda.CUDAGraph | None, Counter]] = {}

    def admit(
        self, row: int, ids: list[int], share: bool = False, ahead: int = 0, wait: bool = True
    ) -> torch.Tensor | None:
        """Gives an idle row a sequence: prefills all but its last id, which the next step reads.

        share: take the full pages of a beginning that live sequences have in common with it, and let later
        ones take its own. ahead: tokens that follow, for which it takes pages at once. wait: until the
        prefill has ended, and its numbers are known to be right. Without it returns what launch_prefill()
        does, or None where nothing was prefilled: if that is false the row must be finished, and admitted
        anew with `wait`.

        Raises LabError for an empty prompt, an id outside the vocabulary, a row in use and a full cache.
        """
        self.check(ids)
        if row in self.live_rows:
            raise LabError(f"row {row} of the batch already holds a sequence")
        before, finite = ids[:-1], None
        try:
            known = self.cache.share(row, before) if share and before else 0
            # All but the prefill comes before it, so that no more than the next step must be launched after.
            self.cache.reserve({row: len(before) - known + ahead})
            if share:
                self.cache.offer(row, before)
            self._set(row, ids[-1], len(before))
            if before[known:]:
                given = self.weights, self.cache, self.buffers.cos_sin, row, before[known:]
                if wait:
                    prefill(*given)
                else:
                    finite = launch_prefill(*given)
        except BaseException:
            self.finish(row)  # the row stays idle and empty
            raise
        return finite

    def check(self, ids: list[int]) -> None:
        """Raises LabError unless `ids` are a prompt that this model and this cache can take."""
        if not ids:
            raise LabError("the prompt is empty; give at least one token")
        wrong = [token for token in ids if not 0 <= token < self.config.vocab]
        if wrong:
            raise LabError(f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab}")
        if len(ids) > self.cache.max_context:
            most = self.config.max_positions
            raise LabError(
                f"the prompt has {len(ids)} tokens and the cache holds {self.cache.max_context}"
                + (
                    f", all that model {self.config.name} was made for"
                    if self.cache.max_context == most
                    else "; raise --max-context or shorten the prompt"
                )
            )

    def place(self, row: int, token: int) -> None:
        """Makes a row live: the next step reads `token`, which follows the tokens that the cache holds for
        the row. Benchmarks fill the cache themselves and call this alone."""
        self._set(row, token, self.cache.lengths[row])

    def _set(self, row: int, token: int, length: int) -> None:
        """length: tokens that the cache holds for the row when the next step runs."""
        send(self.buffers.of_rows[:, row], [token, length, length + 1, 1, 1])
        self.live_rows.add(row)

    def finish(self, row: int) -> None:
        """Ends a row's sequence: the row is idle and its pages are free."""
        self.buffers.of_rows[1:, row] = self.buffers.idle
        self.live_rows.discard(row)
        self.cache.release(row)

    def move(self, source: int, to: int) -> None:
        """A live row's sequence goes on in an idle row."""
        self.buffers.of_rows[:, to] = self.buffers.of_rows[:, source]
        self.cache.move(source, to)
        self.buffers.rows.move(source, to)
        self.live_rows.add(to)
        self.finish(source)

    def run_plan(self, sampling: Sampling | ByRow, rows: int | None = None) -> None:
        """Launches the kernels of one step, one by one, for live and idle rows alike; rows: for the first
        ones only."""
        rows = self.batch if rows is None else rows
        if rows not in self.steps:
            self.steps[rows] = self.buffers.narrowed(rows)
        self.plan_step(self.steps[rows], sampling)

    @torch.inference_mode()
    def step(self, sampling: Sampling | ByRow = GREEDY, rows: int | None = None) -> torch.Tensor:
        """Decodes one token of every live row, all of which are among the first `rows`. Returns self.ids,
        int32 [batch] on the device, which the next step overwrites.

        A row whose logits hold NaN gets -1. Raises LabError for a full cache, before anything is launched,
        and for a draw from logits that ranks divide.
        """
        if self.weights.group is not None and sampling.needs_all_logits:
            raise LabError(ONE_PART)
        self.cache.extend_all(self.live_rows, 1)
        try:
            self._run(sampling, self.batch if rows is None else rows)
        except BaseException:  # no row has moved on the device, so none has on the host
            self.cache.shorten(self.live_rows, 1)
            raise
        return self.ids

    def _run(self, sampling: Sampling | ByRow, rows: int) -> None:
        if isinstance(sampling, ByRow) and sampling.adjusts:
            self.buffers.rows.allocate_penalties()
        if self.eager:
            self.run_plan(sampling, rows)
        else:
            self.prepare(sampling, rows)
            graph, launches = self.graphs[sampling, rows]
            graph.replay()
            if self.ops.trace is not None:
                self.ops.trace.add(launches)

    @torch.inference_mode()
    def prepare(self, sampling: Sampling | ByRow = GREEDY, rows: int | None = None) -> None:
        """On a GPU, runs a step once, so that kernels are compiled, and captures it as a graph. On a CPU it
        does nothing. rows: a step of the first so many rows.

        In both runs all rows are idle, so that the cache and the positions stay as they are; the trace leaves
        them out.
        """
        if self.device.type != "cuda" or (sampling, rows or self.batch) in self.graphs:
            return
        if isinstance(sampling, ByRow) and sampling.adjusts:
            self.buffers.rows.allocate_penalties()
        trace = self.ops.trace
        before = Counter(trace.counts) if trace is not None else Counter()
        saved = self.buffers.of_rows.clone()
        self.buffers.of_rows.zero_(), self.state[0].fill_(-1)
        stream = torch.cuda.Stream(self.device)  # capture needs a CUDA stream other than the default one
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.run_plan(sampling, rows)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph, warm = None, Counter(trace.counts) if trace is not None else Counter()
        if not self.eager:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run_plan(sampling, rows)
        launches = Counter(trace.counts) - warm if trace is not None else Counter()
        self.graphs[sampling, rows or self.batch] = graph, launches
        self.buffers.of_rows.copy_(saved)
        if trace is not None:
            trace.counts = before
