"""Refuses what a model's metadata ask for and the lab does not compute. If it were ignored, the text would
look plausible and be wrong.

A GGUF file keeps its model's keys under the name of its architecture, so every key there is read by
`config.from_gguf`, known to change nothing, or refused. A config.json also holds the keys of many other
programs, so there the keys that are known to change the logits are refused, unless their value is the
neutral one.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping

from lab.errors import LabError, named

# Keys of a GGUF file, without the architecture, that change no logits of a dense model within its window.
GGUF_HARMLESS = {
    "tensor_data_layout",
    "pooling_type",
    "attention.sliding_window_pattern",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",  # of YaRN, whose type is refused
}

# Keys of config.json by the values that change nothing; null is neutral for all of them.
OFF = {
    "add_cross_attention",
    "alibi",
    "attention_chunk_size",
    "attn_output_gate",
    "attn_temperature_tuning",
    "block_configs",
    "clip_qkv",
    "cross_attention_layers",
    "kv_lora_rank",
    "lm_head_bias",
    "mlp_bias",
    "n_routed_experts",
    "num_experts",
    "num_kv_shared_layers",
    "num_local_experts",
    "parallel_attn",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_interleave",
    "rope_interleaved",
    "rope_local_base_freq",
    "rope_traditional",
    "transformers_weights",
    "use_alibi",
    "use_bidirectional_attention",
    "use_dynamic_ntk",
    "use_logn_attn",
    "use_mrope",
    "use_parallel_residual",
}
ONE = {"scale_emb", "rotary_pct", "rotary_percent", "rope_condense_ratio", "rope_ratio"}
HEAD_DIM = {"query_pre_attn_scalar", "qk_head_dim", "rotary_dim", "v_head_dim"}
ATTENTION_SCALE = {"attention_multiplier", "attention_scale", "softmax_scale"}  # neutral: 1/sqrt(head_dim)
QK_NORM = {"qk_layernorm", "qk_norm", "use_qk_layernorm", "use_qk_norm"}
ACTIVATION = {"activation_function", "hidden_act", "hidden_activation", "mlp_hidden_act"}
FACTOR = re.compile(
    r"(?<!ffn_dim_)multipliers?$|logits?_scal(e|ing)$|(^|_)(depth|embeddings?|residual)_scale$"
)
SOFT_CAP = re.compile(r"soft_?cap(ping)?$")


def refuse_huggingface(source: Mapping, qk_norm: bool, head_dim: int, where: str) -> None:
    """Raises LabError for the first key of a config.json whose value changes the logits in a way that is not
    computed here.

    qk_norm: whether the family norms q and k whatever the config says.
    """
    for key, value in source.items():
        if value is None:
            continue
        if key in ATTENTION_SCALE:
            neutral = close(value, head_dim**-0.5)
        elif key in HEAD_DIM:
            neutral = close(value, head_dim)
        elif key in ACTIVATION:
            neutral = value in ("silu", "swish")
        elif key in QK_NORM:
            neutral = qk_norm or not value
        elif key == "is_causal":
            neutral = value is True
        elif key == "no_rope_layers":  # 1 where a layer has RoPE
            neutral = isinstance(value, list) and all(layer == 1 for layer in value)
        elif key in OFF or SOFT_CAP.search(key):
            neutral = not value
        elif key in ONE or FACTOR.search(key):
            neutral = all(close(factor, 1.0) for factor in (value if isinstance(value, list) else [value]))
        else:
            neutral = True
        if not neutral:
            raise LabError(
                f"{where}: {named(key)} {quoted(value)} is not supported: it changes what the model computes"
            )


def refuse_gguf(
    fields: Mapping,
    read: set[str],
    architecture: str,
    head_dim: int,
    rms_eps: float,
    rope_theta: float,
    where: str,
) -> None:
    """Raises LabError for the first key of the architecture that is not in `read`, harmless or neutral.

    Zero is neutral for a key that is not known here: it is how llama.cpp's files say that a feature is off.
    """
    neutral_values = {
        "attention.causal": (True,),
        "attention.scale": (0.0, head_dim**-0.5),
        "attention.layer_norm_epsilon": (rms_eps,),
        "embedding_scale": (0.0, 1.0),
        "logit_scale": (0.0, 1.0),
        "residual_scale": (0.0, 1.0),
        "rope.freq_base_swa": (rope_theta,),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (0.0, -1.0),
    }  # -1: not set
    for key, value in fields.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or key in read or name in GGUF_HARMLESS:
            continue
        if not any(close(value, neutral) for neutral in neutral_values.get(name, (0,))):
            raise LabError(
                f"{where}: {named(key)} {quoted(value)} is not supported: it may change what the "
                "model computes"
            )


def close(value, wanted: float) -> bool:
    """Equal to within float32's rounding; GGUF files hold float32."""
    number = isinstance(value, (int, float)) and abs(value) < 2**63
    return number and math.isclose(value, wanted, rel_tol=1e-6)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist, _SHORT.maxdict = 8, 4


def quoted(value) -> str:
    """A value from a file for an error: as Python writes it, on one line and not endless."""
    return _SHORT.repr(value)
