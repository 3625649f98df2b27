"""What distinguishes one family of models from another, where their layers have the same structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lab.model.description import ModelConfig


@dataclass(frozen=True)
class Family:
    """A family's names, its presets, and what its files leave unsaid.

    The defaults are those of transformers' configuration class, where config.json lacks the key. Biases that
    a file holds are read whatever is said here.
    """

    name: str  # model_type in config.json, and ModelConfig.architecture
    gguf: str | None  # general.architecture of its GGUF files; None: it is another family's
    presets: tuple[ModelConfig, ...] = ()

    # The layer.
    qk_norm: bool = False  # RMSNorm over head_dim of each q and k head, before RoPE
    biases: tuple[str, ...] = ()  # the projections, of q, k, v and o, that have a bias in every layer

    # config.json.
    attention_bias_key: bool = False  # whether `attention_bias: true` gives q, k, v and o a bias
    head_dim: int | None = None  # default; None: hidden_size / num_attention_heads
    rms_eps: float = 1e-6  # default of rms_norm_eps
    sliding_window: int | None = None  # default, in tokens
    switches_window: bool = False  # whether use_sliding_window and max_window_layers switch it on

    # GGUF.
    gguf_pairs_rows: bool = False  # the two rows of a RoPE pair lie side by side in q and k
    # What differs from LAYER_NAMES in lab/model/sources/gguf_file.py, keyed as that is.
    gguf_names: Mapping[str, str] = field(default_factory=dict)
