"""Llama, and what calls itself llama: SmolLM2, TinyLlama, and Mistral's GGUF files."""

from lab.model.description import ModelConfig
from lab.model.families.family import Family
from lab.model.rope import Llama3Scaling


def _smollm2(name, layers, hidden, intermediate, q_heads, kv_heads, theta=100000.0):
    return ModelConfig(
        name,
        "llama",
        layers,
        hidden,
        intermediate,
        q_heads,
        kv_heads,
        64,
        49152,
        8192,
        rope_theta=theta,
        tie_embeddings=True,
    )


def _llama2(name, layers, hidden, intermediate, q_heads, kv_heads, head_dim, max_positions):
    return ModelConfig(
        name, "llama", layers, hidden, intermediate, q_heads, kv_heads, head_dim, 32000, max_positions
    )


def _llama3(name, layers, hidden, intermediate, q_heads, kv_heads, head_dim, factor, tied):
    scaling = Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    return ModelConfig(
        name,
        "llama",
        layers,
        hidden,
        intermediate,
        q_heads,
        kv_heads,
        head_dim,
        128256,
        131072,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="llama",
    gguf="llama",
    attention_bias_key=True,
    gguf_pairs_rows=True,
    presets=(
        #                   layers hidden intermediate q_heads kv_heads
        _smollm2("smollm2-135m", 30, 576, 1536, 9, 3),
        _smollm2("smollm2-360m", 32, 960, 2560, 15, 5),
        _smollm2("smollm2-1.7b", 24, 2048, 8192, 32, 32, theta=130000.0),
        _llama3("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, factor=32.0, tied=True),
        _llama3("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, factor=32.0, tied=True),
        _llama3("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, factor=8.0, tied=False),
        _llama3("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, factor=8.0, tied=False),
        _llama2("llama-2-7b", 32, 4096, 11008, 32, 32, 128, max_positions=4096),
        _llama2("tinyllama-1.1b", 22, 2048, 5632, 32, 4, 64, max_positions=2048),
    ),
)
