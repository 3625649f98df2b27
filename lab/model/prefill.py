"""Prefill by torch: the prompt's tokens in chunks through every layer, their keys and values into the paged
cache.

The lab is about decode kernels; here torch's own kernels (matrix products, scaled_dot_product_attention) do
the work, with the same weights and the same rounding points as the decode step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lab.model.kv_cache import PagedKVCache
from lab.model.torch_layer import after_attention, queries_keys_values, rms_norm, rotate
from lab.model.weights import Weights

CHUNK = 2048  # tokens at a time: bounds the activations and the attention mask


@torch.inference_mode()
def prefill(
    weights: Weights, cache: PagedKVCache, cos_sin: torch.Tensor, sequence: int, ids: list[int]
) -> torch.Tensor:
    """Appends `ids` to a sequence of the cache. Returns the last hidden states, normed: [len(ids), hidden].

    ids are checked by the caller. Raises LabError when the cache is full.
    """
    start = cache.lengths[sequence]
    cache.extend(sequence, len(ids))
    hidden = [
        _chunk(weights, cache, cos_sin, sequence, ids[at : at + CHUNK], start + at)
        for at in range(0, len(ids), CHUNK)
    ]
    return torch.cat(hidden)


def _chunk(
    weights: Weights, cache: PagedKVCache, cos_sin: torch.Tensor, sequence: int, ids: list[int], start: int
) -> torch.Tensor:
    config, layer, tokens = weights.config, weights.config.layer, len(ids)
    h = weights.embed.lookup(torch.tensor(ids, device=weights.device))
    cos, sin = cos_sin[start : start + tokens, None].chunk(2, dim=-1)
    here, seen = cache.slots(sequence, start, start + tokens), cache.slots(sequence, 0, start + tokens)
    for index, w in enumerate(weights.layers):
        q, k, v = queries_keys_values(layer, w, h)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.write(index, here, k, v)
        if start:
            k, v = cache.read(index, seen)
        h = after_attention(layer, w, h, attend(q, k, v))
    return rms_norm(h, weights.final_norm, config.rms_eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last len(q) tokens over all len(k): [len(q), q_heads * head_dim]."""
    queries, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    if not (k.isfinite().all() and v.isfinite().all()):
        return _attend_to_prefixes(q, k, v)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mask = None
    if queries != keys:  # is_causal would align the mask to the first key, not to the last
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out[0].transpose(0, 1).flatten(1)


def _attend_to_prefixes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """attend() where a key or value is NaN or inf: each query multiplies only what it may see, for a masked
    weight of 0 would make NaN of these. The queries before the first of them still go together."""
    queries, keys = q.shape[0], k.shape[0]
    finite = k.isfinite().flatten(1).all(1) & v.isfinite().flatten(1).all(1)
    clean = int((~finite).int().argmax())  # keys before the first that is not finite
    together = max(0, clean - (keys - queries))
    parts = [attend(q[:together], k[:clean], v[:clean])] if together else []
    group = q.shape[1] // k.shape[1]
    for i in range(together, queries):
        seen = keys - queries + i + 1
        one, many, values = (
            t.transpose(0, 1)[None]
            for t in (
                q[i : i + 1],
                k[:seen].repeat_interleave(group, dim=1),
                v[:seen].repeat_interleave(group, dim=1),
            )
        )
        parts.append(F.scaled_dot_product_attention(one, many, values)[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)
