"""The peer that every engine is held to: the same model in plain torch, compiled by torch.compile, in one
CUDA graph.

One layer is compiled and called for all of them, so compiling takes seconds at any depth. The KV cache is
contiguous, [batch, kv_heads, context + 1, head_dim], and exactly as long as the step attends to, so no mask
is needed: the kindest case for torch. Random KV; the new token's is written in place.

Where ranks divide the model, the sums over them are torch.distributed's functional all_reduce inside the
compiled layer, which is how gpt-fast (github.com/pytorch-labs/gpt-fast, tp.py) divides one; the logits, which
gpt-fast leaves undivided, are gathered, so that all ranks read as few bytes as ours.
"""

import torch
import torch.nn.functional as F

from lab.model.rope import cos_sin_table
from lab.model.torch_layer import after_attention, queries_keys_values, rms_norm, rotate


def compiled_step(weights, batch, context, ids=None, backend="inductor"):
    """A call that decodes one token of `batch` sequences at `context`: ids int32 [batch] in, ids out, in
    place; random ones by default.

    backend: of torch.compile. Where ranks divide the weights, each makes the call.
    """
    config, device, description = weights.config, weights.device, weights.config.layer
    table = cos_sin_table(config.head_dim, config.rope_theta, config.rope_scaling, context + 1, device)
    cos, sin = table[context].chunk(2, dim=-1)
    shape = (batch, config.kv_heads, context + 1, config.head_dim)
    caches = [
        tuple(torch.randn(shape, dtype=weights.dtype, device=device) for _ in range(2))
        for _ in weights.layers
    ]
    if ids is None:
        ids = torch.randint(0, config.vocab, (batch,), dtype=torch.int32, device=device)
    total, gathered = over_ranks() if weights.group is not None else (same, same)

    def layer(h, w, k_cache, v_cache):
        q, k, v = queries_keys_values(description, w, h)
        k_cache[:, :, context] = rotate(k, cos, sin)
        v_cache[:, :, context] = v
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin).unsqueeze(2), k_cache, v_cache, enable_gqa=True
        )
        return after_attention(description, w, h, attended.reshape(batch, -1), total)

    def head(h, final_norm, lm_head):
        logits = lm_head.product(rms_norm(h, final_norm, config.rms_eps))
        return gathered(logits).argmax(-1).to(torch.int32)

    torch._dynamo.reset()  # the last configuration's code is of no more use
    layer, head = (torch.compile(f, backend=backend, fullgraph=True, dynamic=False) for f in (layer, head))

    @torch.inference_mode()
    def step():
        h = weights.embed.lookup(ids)
        for w, (k_cache, v_cache) in zip(weights.layers, caches):
            h = layer(h, w, k_cache, v_cache)
        ids.copy_(head(h, weights.final_norm, weights.lm_head))

    return step


def same(part):
    return part


def over_ranks():
    """(the sum of a tensor over all ranks, their tensors beside each other along the last axis), as functions
    that torch.compile takes."""
    import torch.distributed._functional_collectives as collectives

    world = torch.distributed.group.WORLD
    ranks = torch.distributed.get_world_size()

    def gathered(part):
        # Along the first axis: torch 2.11 does not compile a gathering along another.
        return torch.cat(collectives.all_gather_tensor(part, 0, world).chunk(ranks), dim=-1)

    return lambda part: collectives.all_reduce(part, "sum", world), gathered
