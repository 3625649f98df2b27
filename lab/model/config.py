"""The shape of a Llama-family model, from a preset, GGUF metadata or a Hugging Face config.json."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lab.errors import LabError
from lab.model.rope import DivisorScaling, LinearScaling, Llama3Scaling, Scaling

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")        # Mistral's files call themselves llama
HEAD_DIMS = (64, 96, 128)       # what the attention kernels are instantiated for


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements; `layers` blocks of attention and SwiGLU, RMSNorm before each, RoPE on q and k."""
    name: str
    architecture: str           # one of ARCHITECTURES
    layers: int
    hidden: int
    intermediate: int           # width of gate and of up
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int          # the longest context the model was made for
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False      # Qwen2
    o_bias: bool = False
    qk_norm: bool = False       # Qwen3: RMSNorm over head_dim of each q and k head, before RoPE
    tie_embeddings: bool = False
    sliding_window: int | None = None

    def __post_init__(self):
        for field in ("layers", "hidden", "intermediate", "q_heads", "kv_heads", "head_dim", "vocab", "max_positions"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise LabError(f"model {self.name}: {field} is {value!r}; it must be a positive integer")
        if self.q_heads % self.kv_heads:
            raise LabError(f"model {self.name}: {self.q_heads} query heads do not divide over {self.kv_heads} KV heads")
        if self.head_dim not in HEAD_DIMS:
            raise LabError(f"model {self.name}: head_dim {self.head_dim} is not built; the kernels take "
                           f"{', '.join(map(str, HEAD_DIMS))}")

    @property
    def q_width(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        attention = self.hidden * (2 * self.q_width + 2 * self.kv_width)
        bias = self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.o_bias * self.hidden
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        layer = attention + bias + norms + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tie_embeddings else 2)

    def check_context(self, tokens: int) -> None:
        """Raises LabError where this model cannot attend to `tokens` tokens at once."""
        if tokens > self.max_positions:
            raise LabError(f"a context of {tokens} tokens is longer than the {self.max_positions} that model "
                           f"{self.name} was made for")
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise LabError(f"a context of {tokens} tokens exceeds the sliding window of {self.sliding_window} of model "
                           f"{self.name}; sliding-window attention is not built: use a shorter context")


def _llama3(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


def _smollm2(name, layers, hidden, intermediate, q_heads, kv_heads, theta=100000.0):
    return ModelConfig(name, "llama", layers, hidden, intermediate, q_heads, kv_heads, 64, 49152, 8192,
                       rope_theta=theta, tie_embeddings=True)


def _llama3_model(name, layers, hidden, intermediate, q_heads, kv_heads, head_dim, factor, tied):
    return ModelConfig(name, "llama", layers, hidden, intermediate, q_heads, kv_heads, head_dim, 128256, 131072,
                       rope_theta=500000.0, rope_scaling=_llama3(factor), tie_embeddings=tied)


def _qwen2(name, layers, hidden, intermediate, q_heads, kv_heads, head_dim, tied, vocab=151936):
    return ModelConfig(name, "qwen2", layers, hidden, intermediate, q_heads, kv_heads, head_dim, vocab, 32768,
                       rms_eps=1e-6, rope_theta=1000000.0, qkv_bias=True, tie_embeddings=tied)


def _qwen3(name, layers, hidden, intermediate, q_heads, kv_heads, tied):
    return ModelConfig(name, "qwen3", layers, hidden, intermediate, q_heads, kv_heads, 128, 151936, 40960,
                       rms_eps=1e-6, rope_theta=1000000.0, qk_norm=True, tie_embeddings=tied)


#                     layers hidden intermediate q_heads kv_heads
PRESETS = {config.name: config for config in (
    _smollm2("smollm2-135m", 30, 576, 1536, 9, 3),
    _smollm2("smollm2-360m", 32, 960, 2560, 15, 5),
    _smollm2("smollm2-1.7b", 24, 2048, 8192, 32, 32, theta=130000.0),
    _qwen3("qwen3-0.6b", 28, 1024, 3072, 16, 8, tied=True),
    _qwen3("qwen3-1.7b", 28, 2048, 6144, 16, 8, tied=True),
    _qwen3("qwen3-4b", 36, 2560, 9728, 32, 8, tied=True),
    _qwen3("qwen3-8b", 36, 4096, 12288, 32, 8, tied=False),
    _qwen2("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, tied=True),
    _qwen2("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, tied=True),
    _qwen2("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, tied=False, vocab=152064),
    _llama3_model("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, factor=32.0, tied=True),
    _llama3_model("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, factor=32.0, tied=True),
    _llama3_model("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, factor=8.0, tied=False),
    ModelConfig("llama-2-7b", "llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
    ModelConfig("tinyllama-1.1b", "llama", 22, 2048, 5632, 32, 4, 64, 32000, 2048),
    ModelConfig("mistral-7b", "mistral", 32, 4096, 14336, 32, 8, 128, 32768, 32768, rope_theta=1000000.0),
)}


def _field(source: Mapping, key: str, kind: type, where: str, default=...):
    """source[key] as `kind`; LabError when it is missing without a default or is of another type."""
    value = source.get(key)
    if value is None:
        if default is ...:
            raise LabError(f"{where}: {key} is missing")
        return default
    numeric = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (numeric or isinstance(value, kind)) or (kind is int and not float(value).is_integer()):
        raise LabError(f"{where}: {key} is {value!r}; expected {kind.__name__}")
    return kind(value)


def from_huggingface(source: Mapping, name: str, where: str) -> ModelConfig:
    """`source` is the parsed config.json (as of transformers 4 or 5); `where` names the file in errors."""
    architecture = source.get("model_type")
    if architecture not in ARCHITECTURES:
        raise LabError(f"{where}: model_type {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if source.get("quantization_config"):
        raise LabError(f"{where}: quantized checkpoints are not supported; use float weights or a GGUF file")
    if source.get("mlp_bias"):
        raise LabError(f"{where}: mlp_bias is not supported")
    if source.get("hidden_act", "silu") not in ("silu", "swish"):
        raise LabError(f"{where}: hidden_act {source['hidden_act']!r} is not supported; the MLP kernel is SiLU")
    hidden = _field(source, "hidden_size", int, where)
    q_heads = _field(source, "num_attention_heads", int, where)
    default_dim = 128 if architecture == "qwen3" else hidden // max(q_heads, 1)
    head_dim = _field(source, "head_dim", int, where, default_dim)
    bias = _field(source, "attention_bias", bool, where, architecture == "qwen2")
    theta, scaling = _huggingface_rope(source, where)
    window = _field(source, "sliding_window", int, where, None)
    if architecture.startswith("qwen") and not source.get("use_sliding_window", False):
        window = None                       # Qwen's configs carry a window that is switched off
    return ModelConfig(
        name, architecture, hidden=hidden, q_heads=q_heads, head_dim=head_dim,
        layers=_field(source, "num_hidden_layers", int, where),
        intermediate=_field(source, "intermediate_size", int, where),
        kv_heads=_field(source, "num_key_value_heads", int, where, q_heads),
        vocab=_field(source, "vocab_size", int, where),
        max_positions=_field(source, "max_position_embeddings", int, where, 2048),
        rms_eps=_field(source, "rms_norm_eps", float, where, 1e-6),
        rope_theta=theta, rope_scaling=scaling,
        qkv_bias=bias, o_bias=bias and architecture != "qwen2",     # Qwen2 has no bias on the output projection
        qk_norm=architecture == "qwen3",
        tie_embeddings=_field(source, "tie_word_embeddings", bool, where, False),
        sliding_window=window)


def _huggingface_rope(source: Mapping, where: str) -> tuple[float, Scaling | None]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters with both."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise LabError(f"{where}: the rope parameters must be an object")
    theta = _field(rope, "rope_theta", float, where, _field(source, "rope_theta", float, where, 10000.0))
    if rope.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0)) != 1.0:
        raise LabError(f"{where}: partial_rotary_factor is not supported; RoPE turns the whole head")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(_field(rope, "factor", float, where))
    if kind == "llama3":
        original = _field(source, "max_position_embeddings", int, where, 8192)
        return theta, Llama3Scaling(_field(rope, "factor", float, where), _field(rope, "low_freq_factor", float, where),
                                    _field(rope, "high_freq_factor", float, where),
                                    _field(rope, "original_max_position_embeddings", int, where, original))
    raise LabError(f"{where}: rope_type {kind!r} is not supported; supported: default, linear, llama3")


def from_gguf(fields: Mapping, tensors: Mapping[str, tuple[int, ...]], rope_freqs: tuple[float, ...] | None,
              name: str, where: str) -> ModelConfig:
    """`fields` maps GGUF metadata keys to values, `tensors` tensor names to row-major shapes.

    rope_freqs: the file's tensor of that name, per-frequency divisors that carry Llama 3's scaling.
    """
    architecture = _field(fields, "general.architecture", str, where)
    if architecture not in GGUF_ARCHITECTURES:
        raise LabError(f"{where}: architecture {architecture!r} is not supported; supported: "
                       f"{', '.join(GGUF_ARCHITECTURES)}")

    def get(key, kind, default=...):
        return _field(fields, f"{architecture}.{key}", kind, where, default)

    hidden, q_heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden // max(q_heads, 1))
    if {get("attention.value_length", int, head_dim), get("rope.dimension_count", int, head_dim)} != {head_dim}:
        raise LabError(f"{where}: key, value and rotary dimensions of a head differ; that is not supported")
    if get("expert_count", int, 0):
        raise LabError(f"{where}: mixture-of-experts models are not supported")
    scaling = None
    kind = get("rope.scaling.type", str, "none")
    if kind == "linear":
        scaling = LinearScaling(get("rope.scaling.factor", float))
    elif kind != "none":
        raise LabError(f"{where}: rope scaling {kind!r} is not supported; supported: none, linear, rope_freqs.weight")
    if rope_freqs is not None:
        if len(rope_freqs) != head_dim // 2:
            raise LabError(f"{where}: rope_freqs.weight holds {len(rope_freqs)} values; expected {head_dim // 2}")
        scaling = DivisorScaling(rope_freqs)
    vocab = tensors.get("token_embd.weight", (0,))[0]
    return ModelConfig(
        name, architecture, hidden=hidden, q_heads=q_heads, head_dim=head_dim, vocab=vocab,
        layers=get("block_count", int), intermediate=get("feed_forward_length", int),
        kv_heads=get("attention.head_count_kv", int, q_heads), max_positions=get("context_length", int),
        rms_eps=get("attention.layer_norm_rms_epsilon", float), rope_theta=get("rope.freq_base", float, 10000.0),
        rope_scaling=scaling, qkv_bias="blk.0.attn_q.bias" in tensors, o_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors, tie_embeddings="output.weight" not in tensors,
        sliding_window=get("attention.sliding_window", int, None))

