"""The buffers of a decode step: what every plan reads and writes, allocated once.

Their addresses never change, so that a step can be captured as a CUDA graph and replayed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from lab.dispatch import Ops
from lab.model.kv_cache import PagedKVCache
from lab.model.rope import cos_sin_table
from lab.model.sampling import RowSampling
from lab.model.weights import Weights
from lab.ops.all_reduce_add_rmsnorm import slot_words
from lab.ops.decode_attention import Workspace, choose_splits
from lab.ops.decode_step import StepModel, StepWorkspace
from lab.ops.norm_linear_argmax import new_scratch

NARROWED = (  # tensors with a row for each sequence; of `state` and `live` a step always advances all
    *("h", "x", "attention", "attention_rows", "gate_up", "act", "logits"),
    *("ids", "block_table", "positions", "context_lens"),
)


@dataclass
class Projections:
    """Queries, keys and values of a layer, views [batch, heads, head_dim] of what its products write.

    products: (w, bias or None, out [batch, rows of w]). It is one product, unless the layer stores the three
    apart (lab/model/matrix.py); their outputs are then tensors of their own, as ops want them.
    """

    products: list[tuple]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def narrowed(self, rows: int) -> Projections:
        products = [(w, bias, out[:rows]) for w, bias, out in self.products]
        return Projections(products, self.q[:rows], self.k[:rows], self.v[:rows])


class StepBuffers:
    """Activations have the model's dtype and shape [batch, ...].

    ids int32 [batch]: the token that the step reads, then the one it sampled. logits float32 [batch, vocab].
    positions, context_lens int32 [batch]: of each row's sequence; -1 and 0 for an idle row. of_rows int32
    [5, batch or a little more]: the memory of all of these and of what a step adds to the latter two, so that
    of_rows[:, b] is the state of row b; idle int32 [4]: of_rows[1:, b] of an idle row. weights: each
    matrix as the ops take it (Weights.operands), found once and not in every step. blocks: for every layer
    its weights, its Projections, its K and V cache, their scales (none, or two), and the weight of the norm
    that follows it.

    splits: blocks that share one KV head's context in decode_attention; None fills the device. persistent:
    also make what the plan of that name takes, step_model and step_workspace. exchange: of a model that ranks
    divide, the memory through which the kernels pass their results; else None. Raises LabError for a model
    that this plan does not take.
    """

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        cache: PagedKVCache,
        batch: int,
        splits: int | None,
        persistent: bool,
    ):
        config, device, dtype = weights.config, weights.device, weights.dtype
        parts = config.parts
        self.weights, self.ops, self.cache, self.config = weights.operands(), ops, cache, config
        self.cos_sin = cos_sin_table(
            config.head_dim, config.rope_theta, config.rope_scaling, cache.max_context, device
        )
        self.scale = config.head_dim**-0.5
        self.device, self.asked_splits = device, splits
        self._make_scratch(batch)

        def buffer(*shape, dtype=dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.h, self.x = buffer(batch, config.hidden), buffer(batch, config.hidden)
        self.qkv = {}  # outputs by their widths: of all layers that store q, k and v alike the same

        def projections(layer):
            matrices = layer.wqkv if isinstance(layer.wqkv, tuple) else (layer.wqkv,)
            widths = tuple(w.shape[0] for w in matrices)
            if widths not in self.qkv:
                self.qkv[widths] = [buffer(batch, width) for width in widths]
            outs = self.qkv[widths]
            biases = layer.bqkv.split(widths) if layer.bqkv is not None else [None] * len(widths)
            heads = [config.q_heads, config.kv_heads, config.kv_heads]
            found = []
            for out in outs:
                rows = out.view(batch, -1, config.head_dim)
                while rows.shape[1]:
                    found.append(rows[:, : heads[len(found)]])
                    rows = rows[:, found[-1].shape[1] :]
            return Projections(list(zip(matrices, biases, outs)), *found)

        self.attention = buffer(batch, config.q_heads, config.head_dim)
        self.attention_rows = self.attention.view(batch, -1)
        self.gate_up = buffer(batch, parts["w_gate_up"].rows)
        self.act = buffer(batch, parts["w_down"].columns)
        self.exchange, self.first_row = None, 0  # of lm_head, on this rank
        if weights.group is not None:
            of_a_sum = slot_words(batch, self.h[0].nbytes)
            self.exchange = weights.group.exchange(max(of_a_sum, 2 * batch))
            self.first_row = weights.group.rank * parts["lm_head"].rows
        self.logits = buffer(batch, parts["lm_head"].rows, dtype=torch.float32)
        self.block_table = cache.block_table
        self.rows = RowSampling(batch, parts["lm_head"].rows, device)
        # Rows of one tensor, so that one copy sets all of a sequence and one add advances positions and
        # lengths; padded, so that each begins at 16 bytes.
        self.of_rows = buffer(5, -(-batch // 4) * 4, dtype=torch.int32)
        self.ids, self.state = self.of_rows[0, :batch], self.of_rows[1:3]
        self.live = self.of_rows[3:]  # what a step adds to state: 1 for live rows, 0 for idle ones
        self.positions, self.context_lens = self.state[0, :batch], self.state[1, :batch]
        self.state[0] = -1  # idle: see lab/ops/kv_append.py
        self.idle = self.of_rows[1:, 0].clone()
        layers = self.weights.layers
        next_norms = [layer.attn_norm for layer in layers[1:]] + [weights.final_norm]
        scales = [()] * len(layers)
        if cache.k_scales is not None:
            scales = list(zip(cache.k_scales.unbind(), cache.v_scales.unbind()))
        self.blocks = list(
            zip(layers, map(projections, layers), cache.k.unbind(), cache.v.unbind(), scales, next_norms)
        )
        if persistent:
            group = weights.group
            self.step_model = StepModel.of(
                self.weights,
                self.cos_sin,
                config.q_heads,
                config.kv_heads,
                config.head_dim,
                config.rms_eps,
                1 if group is None else group.ranks,
            )
            exchange = None if group is None else group.exchange(config.hidden)
            self.step_workspace = StepWorkspace.of(self.step_model, exchange)

    def _make_scratch(self, batch: int) -> None:
        """What depends on the number of rows and is no row of anything."""
        config, device = self.config, self.device
        multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )
        self.splits = self.asked_splits or choose_splits(
            batch, config.kv_heads, self.cache.max_context, multiprocessors
        )
        self.workspace = Workspace.empty(
            batch, config.q_heads, config.kv_heads, config.head_dim, self.splits, device
        )
        self.argmax_scratch = new_scratch(batch, device)

    def narrowed(self, rows: int) -> StepBuffers:
        """The buffers of a step of the first `rows` rows alone. They are the same memory, with the same state
        of sequences; only scratch memory is its own."""
        small = copy.copy(self)
        small._make_scratch(rows)
        for name in NARROWED:
            setattr(small, name, getattr(self, name)[:rows])
        small.blocks = [(layer, qkv.narrowed(rows), *rest) for layer, qkv, *rest in self.blocks]
        return small
