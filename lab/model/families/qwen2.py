"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from lab.model.description import ModelConfig
from lab.model.families.family import Family


def _qwen2(name, layers, hidden, intermediate, q_heads, kv_heads, head_dim, tied, vocab=151936):
    return ModelConfig(
        name,
        "qwen2",
        layers,
        hidden,
        intermediate,
        q_heads,
        kv_heads,
        head_dim,
        vocab,
        32768,
        rms_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="qwen2",
    gguf="qwen2",
    biases=("q", "k", "v"),  # whatever attention_bias says
    sliding_window=4096,
    switches_window=True,
    presets=(
        #                layers hidden intermediate q_heads kv_heads
        _qwen2("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, tied=True),
        _qwen2("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, tied=True),
        _qwen2("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, tied=False, vocab=152064),
    ),
)
