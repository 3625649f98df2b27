"""Prefill by torch: runs a prompt through every layer, chunk by chunk, and writes its keys and values to the
paged cache.

The lab is about decode kernels. Here torch's own kernels (matrix products, scaled_dot_product_attention) do
the work, with the same weights as the decode step and with roundings at the same places.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.model.kv_cache import PagedKVCache
from lab.model.torch_layer import after_attention, queries_keys_values, rms_norm, rotate
from lab.model.weights import Weights

# Not cuDNN's, which torch prefers on Hopper: that one makes a plan for each new number of tokens, and prompts
# seldom have the same. 1B, H100: a prompt of 1,000 tokens takes 20 ms, and with cuDNN 98 the first time.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# sdpa_kernel() sets flags of the whole process, and in the end puts the former ones back. Of two threads in
# it at once, the one that leaves last would put back what the other has set.
FLAGS = threading.Lock()
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
    return torch.cat(hidden) if len(hidden) > 1 else hidden[0]


@torch.inference_mode()
def launch_prefill(
    weights: Weights, cache: PagedKVCache, cos_sin: torch.Tensor, sequence: int, ids: list[int]
) -> torch.Tensor:
    """prefill() for a caller that does not wait for the device. Returns whether all keys and values of `ids`
    are finite, bool [] on the device. Where they are not, those in the cache are wrong: prefill() writes the
    right ones to a sequence that begins anew.
    """
    start = cache.lengths[sequence]
    cache.extend(sequence, len(ids))
    finite = [
        _layers(weights, cache, cos_sin, sequence, ids[at : at + CHUNK], start + at, attend_to_finite)[1]
        for at in range(0, len(ids), CHUNK)
    ]
    return torch.stack(finite).all()


def _chunk(
    weights: Weights, cache: PagedKVCache, cos_sin: torch.Tensor, sequence: int, ids: list[int], start: int
) -> torch.Tensor:
    """The hidden states of one chunk, which begins at token `start` of its sequence.

    All layers run as if every key and value of the chunk were finite. Whether they are, the host then reads
    once; before, it would have to wait for the device in every layer. Where one is not (an overflow, mostly),
    the chunk runs again, more slowly, and writes the same slots.
    """
    hidden, finite = _layers(weights, cache, cos_sin, sequence, ids, start, attend_to_finite)
    if not finite:
        hidden, _ = _layers(weights, cache, cos_sin, sequence, ids, start, attend)
    return hidden


def _layers(weights, cache, cos_sin, sequence, ids, start, attend) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states, whether the keys and values of these tokens are finite in all layers: bool [])."""
    config, layer, tokens = weights.config, weights.config.layer, len(ids)
    # A blocking copy would wait for what the device does, before anything of this is launched.
    h = weights.embed.lookup(torch.tensor(ids).to(weights.device, non_blocking=True))
    cos, sin = cos_sin[start : start + tokens, None].chunk(2, dim=-1)
    here, seen = cache.slots(sequence, start, start + tokens), cache.slots(sequence, 0, start + tokens)
    sums, total = [], {} if weights.group is None else {"total": weights.group.sum}
    with FLAGS, sdpa_kernel(ATTENTION):
        for index, w in enumerate(weights.layers):
            q, k, v = queries_keys_values(layer, w, h)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            # One that is not finite makes the sum so, too. (A sum that overflows by itself costs only time.)
            sums += [k.sum(dtype=torch.float32), v.sum(dtype=torch.float32)]
            cache.write(index, here, k, v)
            # A quantised cache is read by all tokens alike, by those of this chunk, too.
            if start or cache.kv_dtype:
                k, v = cache.read(index, seen)
            h = after_attention(layer, w, h, attend(q, k, v), **total)
    bad = torch.stack(sums).isfinite().logical_not().sum()
    if weights.group is not None:
        weights.group.sum(bad)  # all ranks must go on in the same way
    return rms_norm(h, weights.final_norm, config.rms_eps), bad == 0


def attend_to_finite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last len(q) tokens over all len(k): [len(q), q_heads * head_dim].

    The last len(q) keys and values must be finite: a query multiplies those that it may not see by 0, which
    would make NaN of a NaN or inf. What lies before them is seen by every query and may be anything.
    """
    queries, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    causal, mask = queries == keys, None
    if not causal and queries > 1:  # is_causal would align the mask to the first key, not to the last
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out[0].transpose(0, 1).flatten(1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """attend_to_finite() for any keys and values: each query gets what it would get if the text ended there.

    The queries before the first of their keys and values that is not finite go together, each later one by
    itself, over no more than it may see. Reads one number on the host.
    """
    queries, before = q.shape[0], k.shape[0] - q.shape[0]
    bad = ~(k[before:].isfinite().flatten(1).all(1) & v[before:].isfinite().flatten(1).all(1))
    together = int(F.pad(bad.int(), (0, 1), value=1).argmax())  # all where none is bad
    seen = before + together
    parts = [attend_to_finite(q[:together], k[:seen], v[:seen])] if together else []
    for i in range(together, queries):
        seen = before + i + 1
        parts.append(attend_to_finite(q[i : i + 1], k[:seen], v[:seen]))
    return torch.cat(parts)
