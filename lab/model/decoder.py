"""The decode step of a Llama-family model: one new token for every sequence of a batch, through the dispatcher's ops.

`basic_step` is the model (fused.py: the same in fewer kernels, persistent.py: in one); the rest keeps its state. All
buffers are allocated once, so on a GPU the whole step is captured as one CUDA graph and replayed: positions, context
lengths and sampled ids live and advance on the device.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from lab.dispatch import DTYPES, Ops
from lab.errors import LabError
from lab.model.fused import fused_step
from lab.model.kv_cache import PagedKVCache
from lab.model.persistent import persistent_step
from lab.model.prefill import prefill
from lab.model.rope import cos_sin_table
from lab.model.weights import Weights
from lab.ops.sample import check_options


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen (lab/ops/sample.py). temperature 0 is greedy; top_k 0 and top_p 1 keep all."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_options(self.temperature, self.top_k, self.top_p, self.seed)


GREEDY = Sampling()


def basic_step(d: Decoder, sampling: Sampling) -> None:
    """One kernel per textbook op. Reads d.ids and d.positions, leaves d.logits and the sampled token in d.ids."""
    ops, eps = d.ops, d.config.rms_eps
    h = ops.embedding(d.ids, d.weights.embed, out=d.h)                      # the residual stream [batch, hidden]
    x = ops.rmsnorm(h, d.weights.layers[0].attn_norm, eps, out=d.x)
    for layer, k_cache, v_cache, next_norm in d.blocks:
        ops.linear(x, layer.wqkv, layer.bqkv, out=d.qkv)                    # d.q, d.k, d.v are views of d.qkv
        if layer.q_norm is not None:
            ops.rmsnorm(d.q, layer.q_norm, eps, out=d.q)
            ops.rmsnorm(d.k, layer.k_norm, eps, out=d.k)
        ops.rope(d.q, d.k, d.positions, d.cos_sin)
        ops.kv_append(d.k, d.v, k_cache, v_cache, d.cache.block_table, d.positions)
        ops.decode_attention(d.q, k_cache, v_cache, d.cache.block_table, d.context_lens, d.scale, d.splits,
                             d.workspace, out=d.attention)
        ops.linear(d.attention_rows, layer.wo, layer.bo, out=x)
        ops.rmsnorm(x, layer.mlp_norm, eps, residual=h, out=x)              # h += x, then x = norm(h)
        ops.linear(x, layer.w_gate_up, out=d.gate_up)
        ops.silu_mul(d.gate_up, out=d.act)
        ops.linear(d.act, layer.w_down, out=x)
        ops.rmsnorm(x, next_norm, eps, residual=h, out=x)
    ops.linear(x, d.weights.lm_head, out_dtype=torch.float32, out=d.logits)
    ops.sample(d.logits, d.positions, sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, out=d.ids)
    d.state.add_(d.live)                                                    # positions and context_lens of live rows


PLANS = {"basic": basic_step, "fused": fused_step, "persistent": persistent_step}


def refusal(plan: str, batch: int, dtype: torch.dtype) -> str | None:
    """Why a plan does not decode a batch of this size, or a model of this dtype; None where it does."""
    from lab.ops.decode_step import op
    if plan != "persistent":
        return None
    if batch != 1:
        return f"plan persistent decodes one sequence, not a batch of {batch}: use --batch 1, or --plan fused"
    if dtype not in op.dtypes:
        names = " or ".join(name for name, one in DTYPES.items() if one in op.dtypes)
        return f"plan persistent takes models in {names} alone: use --dtype bf16, or --plan fused"
    return None


def find_plan(name: str, batch: int, dtype: torch.dtype):
    """The plan's step. Raises LabError for an unknown plan and for one that takes no such batch or dtype."""
    if name not in PLANS:
        raise LabError(f"unknown plan {name!r}: choose from {', '.join(PLANS)}")
    if why := refusal(name, batch, dtype):
        raise LabError(why)
    return PLANS[name]


class Decoder:
    """A batch of sequences and the buffers of their decode step.

    batch: rows, each empty (idle) or one sequence; max_context: most tokens of one sequence, prompt included.
    eager: launch op by op on a GPU too, instead of replaying a CUDA graph. splits: blocks that share one KV head's
    context in decode_attention; None fills the device. Raises LabError for a plan, page size or context that is not
    to be had, and for a batch or a model that the plan does not take; `Unavailable` comes earlier, from
    lab.dispatch.select.
    """

    def __init__(self, weights: Weights, ops: Ops, batch: int = 1, max_context: int = 1024, page_size: int = 16,
                 plan: str = "basic", eager: bool = False, splits: int | None = None, pages: int | None = None):
        from lab.ops.decode_attention import Workspace, choose_splits
        from lab.ops.decode_step import StepModel, StepWorkspace
        from lab.ops.norm_linear_argmax import new_scratch
        self.plan, self.run_plan = plan, find_plan(plan, batch, weights.dtype)
        self.weights, self.ops, self.batch, self.config = weights, ops, batch, weights.config
        config, device, dtype = weights.config, weights.device, weights.dtype
        self.device, self.eager = device, eager or device.type != "cuda"
        self.cache = PagedKVCache(config, batch, max_context, dtype, device, page_size, pages)
        self.cos_sin = cos_sin_table(config.head_dim, config.rope_theta, config.rope_scaling, max_context, device)
        self.scale = config.head_dim ** -0.5
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.splits = splits or choose_splits(batch, config.kv_heads, max_context, multiprocessors)
        self.workspace = Workspace.empty(batch, config.q_heads, config.kv_heads, config.head_dim, self.splits, device)

        def buffer(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.h, self.x = buffer(batch, config.hidden), buffer(batch, config.hidden)
        self.qkv = buffer(batch, config.q_width + 2 * config.kv_width)
        heads = self.qkv.view(batch, -1, config.head_dim)
        self.q, self.k, self.v = heads.split([config.q_heads, config.kv_heads, config.kv_heads], dim=1)
        self.attention = buffer(batch, config.q_heads, config.head_dim)
        self.attention_rows = self.attention.view(batch, -1)
        self.gate_up, self.act = buffer(batch, 2 * config.intermediate), buffer(batch, config.intermediate)
        self.logits = buffer(batch, config.vocab, dtype=torch.float32)
        self.argmax_scratch = new_scratch(batch, device)
        self.ids = buffer(batch, dtype=torch.int32)
        # positions and context_lens are rows of one tensor, padded so that both begin at 16 bytes: one add moves both.
        self.state = buffer(2, -(-batch // 4) * 4, dtype=torch.int32)
        self.live = buffer(2, self.state.shape[1], dtype=torch.int32)       # 1 for live rows, 0 for idle ones
        self.positions, self.context_lens = self.state[0, :batch], self.state[1, :batch]
        self.state[0] = -1                                                  # idle: see lab/ops/kv_append.py
        next_norms = [layer.attn_norm for layer in weights.layers[1:]] + [weights.final_norm]
        self.blocks = list(zip(weights.layers, self.cache.k.unbind(), self.cache.v.unbind(), next_norms))
        if plan == "persistent":
            self.step_model = StepModel.of(weights, self.cos_sin, config.q_heads, config.kv_heads, config.head_dim,
                                           config.rms_eps)
            self.step_workspace = StepWorkspace.of(self.step_model)
        self.live_rows: set[int] = set()
        self.graphs: dict[Sampling, tuple[torch.cuda.CUDAGraph, Counter]] = {}

    def admit(self, row: int, ids: list[int]) -> None:
        """Gives an idle row a sequence: prefills all but its last id, which the next step reads.

        Raises LabError for an empty prompt, an id outside the vocabulary, a row in use and a cache that is full.
        """
        self.check(ids)
        if row in self.live_rows:
            raise LabError(f"row {row} of the batch already holds a sequence")
        if len(ids) > 1:
            prefill(self.weights, self.cache, self.cos_sin, row, ids[:-1])
        self.place(row, ids[-1])

    def check(self, ids: list[int]) -> None:
        """Raises LabError unless `ids` are a prompt that this model and this cache can take."""
        if not ids:
            raise LabError("the prompt is empty; give at least one token")
        wrong = [token for token in ids if not 0 <= token < self.config.vocab]
        if wrong:
            raise LabError(f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab}")
        if len(ids) > self.cache.max_context:
            most = self.config.max_positions
            raise LabError(f"the prompt has {len(ids)} tokens and the cache holds {self.cache.max_context}" +
                           (f", all that model {self.config.name} was made for" if self.cache.max_context == most else
                            "; raise --max-context or shorten the prompt"))

    def place(self, row: int, token: int) -> None:
        """Makes a row live: `token` follows whatever the cache holds for it. (Benchmarks fill the cache themselves.)"""
        length = self.cache.lengths[row]
        self.ids[row] = token
        self.positions[row], self.context_lens[row] = length, length + 1
        self.live[:, row] = 1
        self.live_rows.add(row)

    def finish(self, row: int) -> None:
        """Ends a row's sequence: the row is idle and its pages are free."""
        self.positions[row], self.context_lens[row] = -1, 0
        self.live[:, row] = 0
        self.live_rows.discard(row)
        self.cache.release(row)

    @torch.inference_mode()
    def step(self, sampling: Sampling = GREEDY) -> torch.Tensor:
        """Decodes one token of every live row. Returns d.ids, int32 [batch] on the device: a static buffer.

        A row whose logits hold NaN gets -1. Raises LabError when the cache is full, before anything is launched.
        """
        for row in self.live_rows:
            self.cache.extend(row, 1)
        if self.eager:
            self.run_plan(self, sampling)
        else:
            self.prepare(sampling)
            graph, launches = self.graphs[sampling]
            graph.replay()
            if self.ops.trace is not None:
                self.ops.trace.add(launches)
        return self.ids

    @torch.inference_mode()
    def prepare(self, sampling: Sampling = GREEDY) -> None:
        """On a GPU, compiles what is compiled at first use and captures the step's graph; on the CPU, nothing.

        The warm-up runs on idle rows, which neither write the cache nor move, and is kept out of the trace.
        """
        if self.device.type != "cuda" or sampling in self.graphs:
            return
        trace = self.ops.trace
        before = Counter(trace.counts) if trace is not None else Counter()
        saved = [(t, t.clone()) for t in (self.ids, self.state, self.live)]
        self.ids.zero_(), self.state[0].fill_(-1), self.state[1].zero_(), self.live.zero_()
        stream = torch.cuda.Stream(self.device)                             # capture wants a stream of its own
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.run_plan(self, sampling)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph, warm = None, Counter(trace.counts) if trace is not None else Counter()
        if not self.eager:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run_plan(self, sampling)
        self.graphs[sampling] = graph, (Counter(trace.counts) - warm if trace is not None else Counter())
        for tensor, value in saved:
            tensor.copy_(value)
        if trace is not None:
            trace.counts = before
