"""A layer's mathematics in plain torch: what prefill and the torch.compile peer share.

They keep keys and values in different places, so each attends by itself, between two functions of a layer:

    q, k, v = queries_keys_values(description, w, h)
    ...                                 rotate q and k, store k and v, attend
    h = after_attention(description, w, h, attended)

Values are rounded to the model's dtype where the decode ops round them. w: a lab.model.weights.Layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lab.model.description import LayerDescription


def queries_keys_values(description: LayerDescription, w, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v [tokens, heads, head_dim] of the residual stream h [tokens, hidden].

    q and k are normed where the model does that, and not yet rotated.
    """
    d, eps = description, description.rms_eps
    qkv = w.wqkv.product(rms_norm(h, w.attn_norm, eps), w.bqkv).view(h.shape[0], -1, d.head_dim)
    q, k, v = qkv.split((d.q_heads, d.kv_heads, d.kv_heads), dim=1)
    if d.qk_norm:
        q, k = rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
    return q, k, v


def after_attention(
    description: LayerDescription, w, h: torch.Tensor, attended: torch.Tensor, total=lambda part: part
) -> torch.Tensor:
    """The residual stream [tokens, hidden] after the layer. attended [tokens, q_heads * head_dim].

    total: makes the sum over all ranks of what one rank adds, where ranks divide the model.
    """
    h = h + total(w.wo.product(attended, w.bo))
    gate, up = w.w_gate_up.product(rms_norm(h, w.mlp_norm, description.rms_eps)).chunk(2, dim=-1)
    return h + total(w.w_down.product(F.silu(gate) * up))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32, rounded to x's dtype before the weight, as the rmsnorm op rounds."""
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in float32 of x [tokens, heads, head_dim]; pairs are (i, i + head_dim/2).

    cos and sin broadcast to [tokens, heads, head_dim/2].
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
