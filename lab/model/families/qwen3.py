"""Qwen3, its dense models: Llama with an RMSNorm on each head of q and k."""

from lab.model.description import ModelConfig
from lab.model.families.family import Family


def _qwen3(name, layers, hidden, intermediate, q_heads, kv_heads, tied):
    return ModelConfig(
        name,
        "qwen3",
        layers,
        hidden,
        intermediate,
        q_heads,
        kv_heads,
        128,
        151936,
        40960,
        rms_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="qwen3",
    gguf="qwen3",
    qk_norm=True,  # whatever use_qk_norm says
    attention_bias_key=True,
    head_dim=128,
    sliding_window=4096,
    switches_window=True,
    presets=(
        #              layers hidden intermediate q_heads kv_heads
        _qwen3("qwen3-0.6b", 28, 1024, 3072, 16, 8, tied=True),
        _qwen3("qwen3-1.7b", 28, 2048, 6144, 16, 8, tied=True),
        _qwen3("qwen3-4b", 36, 2560, 9728, 32, 8, tied=True),
        _qwen3("qwen3-8b", 36, 4096, 12288, 32, 8, tied=False),
    ),
)
