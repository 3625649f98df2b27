"""The peer that every engine is held to: the same model in plain torch, compiled by torch.compile, in one CUDA graph.

One layer is compiled and called for all of them, so compiling takes seconds at any depth. The KV cache is contiguous,
[batch, kv_heads, context + 1, head_dim], and exactly as long as the step attends to, so no mask is needed: the kindest
case for torch. Random KV; the new token's is written in place.
"""
import torch
import torch.nn.functional as F

from lab.model.rope import cos_sin_table


def norm(x, weight, eps: float):
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def compiled_step(weights, batch, context):
    """A call that decodes one token of `batch` sequences at `context`: ids int32 [batch] in, ids out, in place."""
    config, device = weights.config, weights.device
    q_heads, kv_heads, dim, eps = config.q_heads, config.kv_heads, config.head_dim, config.rms_eps
    table = cos_sin_table(dim, config.rope_theta, config.rope_scaling, context + 1, device)
    cos, sin = table[context].chunk(2, dim=-1)
    shape = (batch, kv_heads, context + 1, dim)
    caches = [tuple(torch.randn(shape, dtype=weights.dtype, device=device) for _ in range(2)) for _ in weights.layers]
    ids = torch.randint(0, config.vocab, (batch,), dtype=torch.int32, device=device)

    def layer(h, attn_norm, wqkv, bqkv, q_norm, k_norm, wo, bo, mlp_norm, w_gate_up, w_down, k_cache, v_cache):
        qkv = F.linear(norm(h, attn_norm, eps), wqkv, bqkv).view(batch, -1, dim)
        q, k, v = qkv.split((q_heads, kv_heads, kv_heads), dim=1)
        if q_norm is not None:
            q, k = norm(q, q_norm, eps), norm(k, k_norm, eps)
        k_cache[:, :, context] = rotate(k, cos, sin)
        v_cache[:, :, context] = v
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin).unsqueeze(2), k_cache, v_cache, enable_gqa=True)
        h = h + F.linear(attended.reshape(batch, -1), wo, bo)
        gate, up = F.linear(norm(h, mlp_norm, eps), w_gate_up).chunk(2, dim=-1)
        return h + F.linear(F.silu(gate) * up, w_down)

    def head(h, final_norm, lm_head):
        return F.linear(norm(h, final_norm, eps), lm_head).argmax(-1).to(torch.int32)

    torch._dynamo.reset()                           # the last configuration's code is of no more use
    layer, head = (torch.compile(f, fullgraph=True, dynamic=False) for f in (layer, head))
    parts = ("attn_norm", "wqkv", "bqkv", "q_norm", "k_norm", "wo", "bo", "mlp_norm", "w_gate_up", "w_down")
    fixed = [tuple(getattr(w, name) for name in parts) for w in weights.layers]

    @torch.inference_mode()
    def step():
        h = F.embedding(ids, weights.embed)
        for layer_weights, (k_cache, v_cache) in zip(fixed, caches):
            h = layer(h, *layer_weights, k_cache, v_cache)
        ids.copy_(head(h, weights.final_norm, weights.lm_head))

    return step
