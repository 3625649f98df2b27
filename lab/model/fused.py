"""The fused plan: the model of decoder.basic_step in five kernels a layer, so that little but weights and KV moves."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lab.model.decoder import Decoder, Sampling


def fused_step(d: Decoder, sampling: Sampling) -> None:
    """Reads d.ids and d.positions, leaves d.logits and the sampled token in d.ids."""
    ops, eps = d.ops, d.config.rms_eps
    h = ops.embedding(d.ids, d.weights.embed, out=d.h)                      # the residual stream [batch, hidden]
    for layer, k_cache, v_cache, _ in d.blocks:
        ops.norm_linear(h, layer.attn_norm, eps, layer.wqkv, layer.bqkv, out=d.qkv)     # d.q, d.k, d.v are views of it
        ops.rope_append_attention(d.q, d.k, d.v, layer.q_norm, layer.k_norm, eps, d.positions, d.cos_sin, k_cache,
                                  v_cache, d.cache.block_table, d.scale, d.splits, d.workspace, out=d.attention)
        ops.linear_add(d.attention_rows, layer.wo, h, layer.bo)             # h += attention wo^T
        ops.norm_linear_silu_mul(h, layer.mlp_norm, eps, layer.w_gate_up, out=d.act)
        ops.linear_add(d.act, layer.w_down, h)
    head = (h, d.weights.final_norm, eps, d.weights.lm_head)
    if sampling.temperature == 0:
        ops.norm_linear_argmax(*head, d.logits, d.argmax_scratch, out=d.ids)
    else:
        ops.norm_linear(*head, None, torch.float32, out=d.logits)
        ops.sample(d.logits, d.positions, sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed,
                   out=d.ids)
    d.state.add_(d.live)                                                    # positions and context_lens of live rows
