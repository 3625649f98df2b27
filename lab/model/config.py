"""The configuration of a model, read from GGUF metadata or a Hugging Face config.json.

What differs between families stands in lab/model/families.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from lab.errors import LabError, named
from lab.model.description import ModelConfig
from lab.model.families import FAMILIES, Family, find_gguf
from lab.model.rope import DivisorScaling, LinearScaling, Llama3Scaling, Scaling
from lab.model.unsupported import quoted, refuse_gguf, refuse_huggingface


def _field(source: Mapping, key: str, kind: type, where: str, default=..., layers: int | None = None):
    """source[key] as `kind`; LabError when it is missing without a default, not finite or of another type.

    A list of numbers counts as one for each of the `layers`: their common value is taken, and LabError raised
    where they differ, since all layers of a model have one shape here.
    """
    value = source.get(key)
    if isinstance(value, list) and kind in (int, float):
        if not value or any(item != value[0] for item in value):
            raise LabError(f"{where}: {key} differs between layers ({quoted(value)}); that is not supported")
        if layers is not None and len(value) != layers:
            raise LabError(f"{where}: {key} has {len(value)} values for {layers} layers")
        value = value[0]
    if value is None:
        if default is ...:
            raise LabError(f"{where}: {key} is missing")
        return default
    if isinstance(value, bool) or kind not in (int, float):  # Python counts True as an integer
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    else:  # NaN is below nothing
        fits = (
            isinstance(value, (int, float)) and abs(value) < 2**63 and (kind is float or value == int(value))
        )
    if not fits:
        raise LabError(f"{where}: {key} is {quoted(value)}; expected {kind.__name__}")
    return kind(value)


def with_held_biases(
    config: ModelConfig,
    required: tuple[str, ...],
    tensors: Collection[str],
    stored: Callable[[str], str],
    where: str,
) -> ModelConfig:
    """`config` with the attention biases that its file holds in any layer, whatever the metadata say of them.

    required: the projections, of q, k, v and o, that have a bias in every layer of this model; LabError where
    the file lacks one. tensors: the names in the file. stored: how the file writes a name of Hugging Face's.
    """
    if config.layers > len(tensors):
        return config  # of a mangled file; loading says what is missing

    def held(projection):
        names = [
            stored(f"model.layers.{index}.self_attn.{projection}_proj.bias") for index in range(config.layers)
        ]
        missing = [name for name in names if name not in tensors]
        if missing and projection in required:
            raise LabError(f"{where}: tensor {missing[0]} is missing")
        return len(missing) < len(names)

    found = {projection: held(projection) for projection in "qkvo"}
    return replace(config, qkv_bias=found["q"] or found["k"] or found["v"], o_bias=found["o"])


def from_huggingface(source: Mapping, name: str, where: str) -> ModelConfig:
    """`source` is the parsed config.json (as of transformers 4 or 5); `where` names the file in errors."""
    architecture = source.get("model_type")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise LabError(
            f"{where}: model_type {quoted(architecture)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    layers = _field(source, "num_hidden_layers", int, where)

    def get(key, kind, default=...):
        return _field(source, key, kind, where, default, layers)

    hidden, q_heads = get("hidden_size", int), get("num_attention_heads", int)
    head_dim = get("head_dim", int, family.head_dim or hidden // max(q_heads, 1))
    refuse_huggingface(source, family.qk_norm, head_dim, where)
    biased = huggingface_biases(source, where)
    theta, scaling, original = _huggingface_rope(source, where)
    max_positions, stated = _lengthened(get("max_position_embeddings", int, 2048), scaling, original)
    return ModelConfig(
        name,
        architecture,
        hidden=hidden,
        q_heads=q_heads,
        head_dim=head_dim,
        layers=layers,
        intermediate=get("intermediate_size", int),
        kv_heads=get("num_key_value_heads", int, q_heads),
        vocab=_field(source, "vocab_size", int, where),
        max_positions=max_positions,
        stated_positions=stated,
        rms_eps=get("rms_norm_eps", float, family.rms_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="q" in biased,
        o_bias="o" in biased,
        qk_norm=family.qk_norm,
        tie_embeddings=_field(source, "tie_word_embeddings", bool, where, False),
        sliding_window=_sliding_window(source, family, layers, where),
    )


def huggingface_biases(source: Mapping, where: str) -> tuple[str, ...]:
    """The projections, of q, k, v and o, that have a bias in every layer as transformers' classes build them.

    source: a config.json whose model_type is that of a family.
    """
    family, declared = FAMILIES[source["model_type"]], _field(source, "attention_bias", bool, where, False)
    return ("q", "k", "v", "o") if declared and family.attention_bias_key else family.biases


def _sliding_window(source: Mapping, family: Family, layers: int, where: str) -> int | None:
    """The window that limits the context: that of the config where any layer slides, else None."""
    default = None if "sliding_window" in source else family.sliding_window
    window, switched = _field(source, "sliding_window", int, where, default), family.switches_window
    if switched and not _field(source, "use_sliding_window", bool, where, False):
        window = None
    kinds = source.get("layer_types")
    if kinds is None:  # transformers: the layers from max_window_layers on slide
        return None if switched and _field(source, "max_window_layers", int, where, 28) >= layers else window
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise LabError(
            f"{where}: layer_types {quoted(kinds)} is not supported; each of the {layers} layers must "
            "be full_attention or sliding_attention"
        )
    if "sliding_attention" not in kinds:
        return None if switched else window
    if window is None:
        raise LabError(
            f"{where}: layer_types has sliding_attention; sliding_window is not set or switched off"
        )
    return window


def _huggingface_rope(source: Mapping, where: str) -> tuple[float, Scaling | None, int | None]:
    """(theta, scaling, context before scaling or None).

    transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters with both.
    """
    given = {key: source[key] for key in ("rope_parameters", "rope_scaling") if source.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, Mapping):
            raise LabError(f"{where}: {key} must be an object of the rope parameters")
    given = {key: value for key, value in given.items() if value}
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise LabError(f"{where}: rope_parameters and rope_scaling contradict each other; leave one out")
    rope = {key: value for key, value in next(iter(given.values()), {}).items() if value is not None}
    outer = _field(source, "rope_theta", float, where, None)
    theta = _field(rope, "rope_theta", float, where, 10000.0 if outer is None else outer)
    if outer is not None and theta != outer:
        raise LabError(f"{where}: rope_theta is {outer} and, within the rope parameters, {theta}")
    for holder in (rope, source):
        if _field(holder, "partial_rotary_factor", float, where, 1.0) != 1.0:
            raise LabError(f"{where}: partial_rotary_factor is not supported; RoPE turns the whole head")
    if rope.get("rope_type", rope.get("type")) != rope.get("type", rope.get("rope_type")):
        raise LabError(
            f"{where}: the rope parameters name two types, {quoted(rope['rope_type'])} and "
            f"{quoted(rope['type'])}"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    uses = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if not isinstance(kind, str) or kind not in uses:
        raise LabError(f"{where}: rope_type {quoted(kind)} is not supported; supported: {', '.join(uses)}")
    always = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    for key, value in rope.items():
        neutral = key in ("factor", "attention_factor") and value == 1
        if key not in always and key not in uses[kind] and not neutral:
            hint = "; name the rope_type that is meant" if kind == "default" else ""
            raise LabError(
                f"{where}: the rope parameters have {named(key)} {quoted(value)}, which rope_type "
                f"{kind!r} does not use{hint}"
            )
    # The one outside the rope parameters counts where there are two, as in transformers 5
    # (standardize_rope_params).
    original = next(
        (
            _positive(found, "original_max_position_embeddings", where)
            for holder in (source, rope)
            if (found := _field(holder, "original_max_position_embeddings", int, where, None)) is not None
        ),
        None,
    )
    factor = _positive(_field(rope, "factor", float, where, ... if uses[kind] else 1.0), "factor", where)
    if kind == "default" or (kind == "linear" and factor == 1.0):
        return theta, None, original
    if kind == "linear":
        return theta, LinearScaling(factor), original
    low, high = (_field(rope, f"{end}_freq_factor", float, where) for end in ("low", "high"))
    if not high > low:
        raise LabError(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
    context = _field(source, "max_position_embeddings", int, where, 8192) if original is None else original
    return theta, Llama3Scaling(factor, low, high, context), original


def _positive(value: float, key: str, where: str) -> float:
    if not value > 0:
        raise LabError(f"{where}: {key} is {value}; it must be above 0")
    return value


def _lengthened(stated: int, scaling: Scaling | None, original: int | None) -> tuple[int, int | None]:
    """(the longest context, `stated` where it is not known to be that long) of a linearly scaled model.

    stated: max_position_embeddings or context_length, which some models give before scaling (Vicuna 16k:
    4,096 by 4) and others after (LLaMA-2-7B-32K: 32,768 by 8). original: the context before scaling, where
    the file says it.
    """
    if not isinstance(scaling, LinearScaling) or scaling.factor <= 1:
        return stated, None
    if original is not None:
        return max(stated, int(original * scaling.factor)), None
    return int(stated * scaling.factor), stated


class _Noted(Mapping):
    """A mapping that notes in `read` the keys that were asked for."""

    def __init__(self, fields: Mapping):
        self.fields, self.read = fields, set()

    def __getitem__(self, key):
        self.read.add(key)
        return self.fields[key]

    def __iter__(self):
        return iter(self.fields)

    def __len__(self):
        return len(self.fields)


def from_gguf(
    fields: Mapping,
    tensors: Mapping[str, tuple[int, ...]],
    rope_freqs: tuple[float, ...] | None,
    name: str,
    where: str,
) -> ModelConfig:
    """`fields` maps GGUF metadata keys to values, `tensors` tensor names to row-major shapes.

    rope_freqs: the file's tensor of that name, per-frequency divisors that carry Llama 3's scaling.
    """
    architecture = _field(fields, "general.architecture", str, where)
    family = find_gguf(architecture)
    if family is None:
        supported = ", ".join(one.gguf for one in FAMILIES.values() if one.gguf is not None)
        raise LabError(
            f"{where}: architecture {quoted(architecture)} is not supported; supported: {supported}"
        )
    if fields.get("general.type", "model") != "model":
        raise LabError(f"{where}: it holds no model (its general.type is {quoted(fields['general.type'])})")
    noted = _Noted(fields)
    layers = _field(noted, f"{architecture}.block_count", int, where)

    def get(key, kind, default=...):
        return _field(noted, f"{architecture}.{key}", kind, where, default, layers)

    hidden, q_heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden // max(q_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise LabError(
                f"{where}: {architecture}.{key} is {get(key, int)} and a head has {head_dim}: key, "
                "value and rotary dimensions of a head that differ are not supported"
            )
    if get("expert_count", int, 0):
        raise LabError(f"{where}: mixture-of-experts models are not supported")
    vocab = (tensors.get("token_embd.weight") or (0,))[0]
    if get("vocab_size", int, vocab) != vocab:
        raise LabError(
            f"{where}: {architecture}.vocab_size is {get('vocab_size', int)} and token_embd.weight "
            f"has {vocab} rows"
        )
    scaling = _gguf_scaling(get, architecture, where)
    max_positions, stated = _lengthened(
        get("context_length", int), scaling, get("rope.scaling.original_context_length", int, None)
    )
    if rope_freqs is not None:
        if len(rope_freqs) != head_dim // 2:
            raise LabError(
                f"{where}: rope_freqs.weight holds {len(rope_freqs)} values; expected {head_dim // 2}"
            )
        if not all(math.isfinite(value) and value > 0 for value in rope_freqs):
            raise LabError(f"{where}: rope_freqs.weight holds values that are not above 0")
        linear = scaling.factor if scaling else 1.0  # llama.cpp applies both
        scaling = DivisorScaling(tuple(value * linear for value in rope_freqs))
    config = ModelConfig(
        name,
        family.name,
        hidden=hidden,
        q_heads=q_heads,
        head_dim=head_dim,
        vocab=vocab,
        layers=layers,
        intermediate=get("feed_forward_length", int),
        kv_heads=get("attention.head_count_kv", int, q_heads),
        max_positions=max_positions,
        stated_positions=stated,
        rms_eps=get("attention.layer_norm_rms_epsilon", float),
        rope_theta=get("rope.freq_base", float, 10000.0),
        rope_scaling=scaling,
        qk_norm=family.qk_norm,
        tie_embeddings="output.weight" not in tensors,
        sliding_window=get("attention.sliding_window", int, None) or None,  # 0: there is none
    )
    refuse_gguf(fields, noted.read, architecture, head_dim, config.rms_eps, config.rope_theta, where)
    return config


def _gguf_scaling(get: Callable, architecture: str, where: str) -> LinearScaling | None:
    """RoPE's scaling as llama.cpp reads it (src/llama-model.cpp, load_hparams): without a type it is linear,
    `rope.scale_linear` is the factor's older name, and a factor of 0 or 1 changes nothing.
    """
    kind = get("rope.scaling.type", str, None)
    factors = {key: get(key, float, None) for key in ("rope.scaling.factor", "rope.scale_linear")}
    factors = {key: value or 1.0 for key, value in factors.items() if value is not None}
    if kind not in (None, "none", "linear"):
        raise LabError(
            f"{where}: rope scaling {quoted(kind)} is not supported; supported: none, linear, "
            "rope_freqs.weight"
        )
    if kind == "none":
        return None
    if len(set(factors.values())) > 1:
        raise LabError(f"{where}: rope.scaling.factor and rope.scale_linear of {architecture} differ")
    if kind == "linear" and not factors:
        raise LabError(f"{where}: {architecture}.rope.scaling.factor is missing")
    key, factor = next(iter(factors.items()), ("", 1.0))
    return None if factor == 1.0 else LinearScaling(_positive(factor, f"{architecture}.{key}", where))
