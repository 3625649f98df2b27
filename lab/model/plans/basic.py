"""The basic plan: the decode step of a Llama-family model, with one kernel for each op of the textbook."""

from __future__ import annotations

import torch

from lab.model.plans.buffers import StepBuffers
from lab.model.sampling import ByRow, Sampling, choose
from lab.ops.all_reduce_add_rmsnorm import fits


def basic_step(b: StepBuffers, sampling: Sampling | ByRow) -> None:
    """Reads b.ids and b.positions, leaves b.logits and the sampled token in b.ids."""
    ops, eps = b.ops, b.config.rms_eps
    h = ops.embedding(b.ids, b.weights.embed, b.h.dtype, out=b.h)  # the residual stream [batch, hidden]
    x = ops.rmsnorm(h, b.weights.layers[0].attn_norm, eps, out=b.x)
    for layer, qkv, k_cache, v_cache, scales, next_norm in b.blocks:
        for w, bias, out in qkv.products:
            ops.linear(x, w, bias, out=out)
        if layer.q_norm is not None:
            ops.rmsnorm(qkv.q, layer.q_norm, eps, out=qkv.q)
            ops.rmsnorm(qkv.k, layer.k_norm, eps, out=qkv.k)
        ops.rope(qkv.q, qkv.k, b.positions, b.cos_sin)
        ops.kv_append(qkv.k, qkv.v, k_cache, v_cache, b.block_table, b.positions, *scales)
        ops.decode_attention(
            qkv.q,
            k_cache,
            v_cache,
            b.block_table,
            b.context_lens,
            b.scale,
            b.splits,
            b.workspace,
            *scales,
            out=b.attention,
        )
        ops.linear(b.attention_rows, layer.wo, layer.bo, out=x)
        add_and_norm(b, layer.mlp_norm)
        ops.linear(x, layer.w_gate_up, out=b.gate_up)
        ops.silu_mul(b.gate_up, out=b.act)
        ops.linear(b.act, layer.w_down, out=x)
        add_and_norm(b, next_norm)
    ops.linear(x, b.weights.lm_head, out_dtype=torch.float32, out=b.logits)
    choose(b, sampling)
    if b.exchange is not None:
        ops.all_argmax(b.logits, b.ids, b.first_row, b.exchange)
    b.state.add_(b.live)  # positions and context_lens of live rows


def add_and_norm(b: StepBuffers, norm: torch.Tensor) -> None:
    """h += x, then x = norm(h). Where ranks divide the model, x is one rank's part of a sum."""
    if b.exchange is None:
        b.ops.rmsnorm(b.x, norm, b.config.rms_eps, residual=b.h, out=b.x)
    elif fits(len(b.x), norm.nbytes):
        b.ops.all_reduce_add_rmsnorm(b.x, b.h, norm, b.config.rms_eps, b.exchange, out=b.x)
    else:  # rows that are too many or too long for one launch
        b.ops.all_reduce_add(b.x, b.h, b.exchange)
        b.ops.rmsnorm(b.h, norm, b.config.rms_eps, out=b.x)
