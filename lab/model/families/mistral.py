"""Mistral: Llama with a sliding window. Its GGUF files call themselves llama."""

from lab.model.description import ModelConfig
from lab.model.families.family import Family

FAMILY = Family(
    name="mistral",
    gguf=None,
    sliding_window=4096,
    presets=(
        ModelConfig(
            "mistral-7b",
            "mistral",
            layers=32,
            hidden=4096,
            intermediate=14336,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            vocab=32768,
            max_positions=32768,
            rope_theta=1000000.0,
        ),
    ),
)
