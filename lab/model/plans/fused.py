"""The fused plan: the model of lab/model/plans/basic.py in five kernels a layer. Hardly anything but weights,
keys and values then goes through memory."""

from __future__ import annotations

import torch

from lab.model.plans.buffers import StepBuffers
from lab.model.sampling import ByRow, Sampling, after_choice, choose


def fused_step(b: StepBuffers, sampling: Sampling | ByRow) -> None:
    """Reads b.ids and b.positions, leaves b.logits and the sampled token in b.ids."""
    ops, eps = b.ops, b.config.rms_eps
    h = ops.embedding(b.ids, b.weights.embed, b.h.dtype, out=b.h)  # the residual stream [batch, hidden]
    for layer, qkv, k_cache, v_cache, scales, _ in b.blocks:
        for w, bias, out in qkv.products:
            ops.norm_linear(h, layer.attn_norm, eps, w, bias, out=out)
        ops.rope_append_attention(
            qkv.q,
            qkv.k,
            qkv.v,
            layer.q_norm,
            layer.k_norm,
            eps,
            b.positions,
            b.cos_sin,
            k_cache,
            v_cache,
            b.block_table,
            b.scale,
            b.splits,
            b.workspace,
            *scales,
            out=b.attention,
        )
        linear_add(b, b.attention_rows, layer.wo, layer.bo)  # h += attention wo^T
        ops.norm_linear_silu_mul(h, layer.mlp_norm, eps, layer.w_gate_up, out=b.act)
        linear_add(b, b.act, layer.w_down)
    head = (h, b.weights.final_norm, eps, b.weights.lm_head)
    if sampling.greedy:
        ops.norm_linear_argmax(*head, b.logits, b.argmax_scratch, out=b.ids)
        after_choice(b, sampling)
    else:
        ops.norm_linear(*head, None, torch.float32, out=b.logits)
        choose(b, sampling)
    if b.exchange is not None:
        ops.all_argmax(b.logits, b.ids, b.first_row, b.exchange)
    b.state.add_(b.live)  # positions and context_lens of live rows


def linear_add(b: StepBuffers, x: torch.Tensor, w, bias: torch.Tensor | None = None) -> None:
    """h += x w^T + bias. Where ranks divide the model, x and w are one rank's part of a sum."""
    if b.exchange is None:
        b.ops.linear_add(x, w, b.h, bias)
    else:
        b.ops.linear(x, w, bias, out=b.x)
        b.ops.all_reduce_add(b.x, b.h, b.exchange)
