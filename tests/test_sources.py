"""Nothing in a model's file is ignored in silence: it is read, or refused by its name."""

import json
import os
import resource
import struct
import time
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    huggingface_config,
    llama3_divisors,
    reference_logits,
    tensors,
    write_folder,
    write_gguf,
)

from lab.dispatch import select
from lab.errors import LabError
from lab.files import read_json, read_text, regular_file
from lab.model.config import from_huggingface
from lab.model.decoder import Decoder
from lab.model.generate import teacher_forced_logits
from lab.model.rope import LinearScaling, inverse_frequencies
from lab.model.sources import open_source
from lab.model.weights import load

LAYER = "model.layers.1."
IDS = [int(i) for i in torch.randint(0, 272, (16,), generator=torch.Generator().manual_seed(3))]


def written(folder, config, weights, form, **options):
    """The source of `weights` written as a GGUF file, a folder or a folder of two shards."""
    if form == "gguf":
        return open_source(str(write_gguf(folder / "tiny.gguf", config, weights, **options)))
    return open_source(str(write_folder(folder / "tiny", config, weights, shards=1 + (form == "shards"))))


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) / 4


def logits_equal_reference(source, config, weights):
    got = teacher_forced_logits(
        Decoder(load(source), select("torch", "cpu"), max_context=32), IDS, prefilled=14
    )
    torch.testing.assert_close(got.double(), reference_logits(config, weights, IDS)[14:], rtol=0, atol=2e-5)


# --- tensors that are in the file ---


@pytest.mark.parametrize("form", ["gguf", "folder", "shards"])
@pytest.mark.parametrize(
    "name, stored",
    [
        (LAYER + "mlp.gate_proj.bias", "blk.1.ffn_gate.bias"),
        (LAYER + "mlp.up_proj.bias", "blk.1.ffn_up.bias"),
        (LAYER + "mlp.down_proj.bias", "blk.1.ffn_down.bias"),
        (LAYER + "input_layernorm.bias", "blk.1.attn_norm.bias"),
        (LAYER + "self_attn.q_norm.weight", "blk.1.attn_q_norm.weight"),  # of a Llama
        (
            "model.layers.2.self_attn.q_proj.weight",
            "blk.2.attn_q.weight",
        ),  # a layer more than the config says
        ("model.norm.bias", "output_norm.bias"),
        ("lm_head.bias", "output.bias"),
    ],
)
def test_a_tensor_that_no_part_reads_is_refused_by_name(tmp_path, form, name, stored):
    weights = tensors(CONFIGS["llama"])
    shape = (256, 96) if "q_proj" in name else (160,)
    source = written(tmp_path, CONFIGS["llama"], weights | {name: drawn(*shape)}, form)
    with pytest.raises(
        LabError, match=f"tensor {stored if form == 'gguf' else name} in it belongs to no"
    ) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_many_unread_tensors_are_counted_and_shown_on_one_line(tmp_path):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    save_file(
        tensors(CONFIGS["llama"]) | {f"a\n\x1b[31m{n}": torch.ones(1) for n in range(5)},
        folder / "model.safetensors",
    )
    with pytest.raises(LabError, match="and 2 more in it belong") as caught:
        load(open_source(str(folder)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_inverse_frequencies_of_old_checkpoints_are_let_be(tmp_path, name):
    weights = tensors(CONFIGS["llama"])
    logits_equal_reference(
        written(tmp_path, CONFIGS["llama"], weights | {name: torch.ones(32)}, "folder"),
        CONFIGS["llama"],
        weights,
    )


@pytest.mark.parametrize("form", ["gguf", "shards"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_attention_biases_are_read_where_the_file_holds_them(tmp_path, form, architecture, layers):
    """Whatever the config says; a projection without one has none (llama.cpp adds each bias where it is
    there)."""
    config = replace(CONFIGS[architecture], sliding_window=None)
    weights = tensors(config)
    for index in layers:
        at = f"model.layers.{index}.self_attn."
        weights |= {at + "k_proj.bias": drawn(config.kv_width), at + "o_proj.bias": drawn(config.hidden)}
        if index == 1:
            weights[at + "q_proj.bias"] = drawn(config.q_width)
    source = written(tmp_path, config, weights, form)
    assert source.config.qkv_bias and source.config.o_bias
    logits_equal_reference(source, config, weights)


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_a_bias_that_the_family_has_may_not_be_missing(tmp_path, form):
    weights = tensors(CONFIGS["qwen2"])
    del weights[LAYER + "self_attn.k_proj.bias"]
    with pytest.raises(
        LabError, match=r"tensor (blk.1.attn_k|model.layers.1.self_attn.k_proj).bias is missing"
    ):
        written(tmp_path, CONFIGS["qwen2"], weights, form)


@pytest.mark.parametrize("declared", [False, True])
def test_qwen2_has_its_biases_whatever_attention_bias_says(tmp_path, declared):
    """transformers' Qwen2Attention builds q, k and v with a bias and o without, and never reads
    attention_bias."""
    weights = tensors(CONFIGS["qwen2"])
    folder = write_folder(tmp_path / "tiny", CONFIGS["qwen2"], weights)
    change_json(folder / "config.json", attention_bias=declared)
    logits_equal_reference(open_source(str(folder)), CONFIGS["qwen2"], weights)


def test_attention_bias_declared_and_missing(tmp_path):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    change_json(folder / "config.json", attention_bias=True)
    with pytest.raises(LabError, match="q_proj.bias is missing"):
        open_source(str(folder))


@pytest.mark.parametrize("form", ["gguf", "folder", "shards"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_tied_model_with_a_head_of_its_own_uses_it(tmp_path, form, name):
    """transformers 5: both are present with different values, "so we will NOT tie them"; llama.cpp takes
    output."""
    config, weights = CONFIGS[name], tensors(CONFIGS[name])
    weights["lm_head.weight"] = drawn(config.vocab, config.hidden)
    source = written(tmp_path, config, weights, form)
    loaded = load(source)
    assert torch.equal(loaded.lm_head.data, weights["lm_head.weight"]) and not loaded.config.tie_embeddings
    logits_equal_reference(source, replace(config, tie_embeddings=False), weights)


@pytest.mark.parametrize("form", ["gguf", "folder", "shards"])
def test_a_head_equal_to_the_embedding_is_kept_once(tmp_path, form):
    config, weights = CONFIGS["llama"], tensors(CONFIGS["llama"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    loaded = load(written(tmp_path, config, weights, form))
    assert loaded.lm_head is loaded.embed and loaded.config.tie_embeddings


def test_an_untied_model_without_a_head(tmp_path):
    weights = tensors(CONFIGS["qwen2"])
    del weights["lm_head.weight"]
    with pytest.raises(LabError, match="lm_head.weight is in none"):
        load(written(tmp_path, CONFIGS["qwen2"], weights, "folder"))


@pytest.mark.parametrize(
    "index, says",
    [
        ({"extra.weight": "model-00001-of-00002.safetensors"}, "extra.weight, which .* is in none"),
        ({"model.norm.weight": None}, None),  # transformers loads what the shards hold
    ],
)
def test_an_index_that_differs_from_its_shards(tmp_path, index, says):
    weights = tensors(CONFIGS["llama"])
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], weights, shards=2)
    path = folder / "model.safetensors.index.json"
    found = json.loads(path.read_text())["weight_map"] | index
    path.write_text(json.dumps({"weight_map": {name: file for name, file in found.items() if file}}))
    if says is None:
        logits_equal_reference(open_source(str(folder)), CONFIGS["llama"], weights)
    else:
        with pytest.raises(LabError, match=says):
            load(open_source(str(folder)))


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], shards=2)
    for shard in (1, 2):
        path = folder / f"model-0000{shard}-of-00002.safetensors"
        save_file(load_file(path) | {"model.norm.weight": torch.full((96,), float(shard))}, path)
    with pytest.raises(LabError, match="model.norm.weight is in model-00001.* and in model-00002"):
        open_source(str(folder))


def test_a_whole_file_goes_before_an_old_index(tmp_path):
    """transformers' _get_resolved_checkpoint_files asks for model.safetensors first."""
    old, new = tensors(CONFIGS["llama"]), tensors(CONFIGS["llama"])
    new["model.norm.weight"] = drawn(96)
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], old, shards=2)
    save_file(new, folder / "model.safetensors")
    logits_equal_reference(open_source(str(folder)), CONFIGS["llama"], new)


# --- metadata: config.json ---


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(name="llama", **changes):
    return from_huggingface(huggingface_config(CONFIGS[name]) | changes, "tiny", "config.json")


@pytest.mark.parametrize(
    "key, neutral, other",
    [
        ("logit_scale", 1.0, 0.0625),
        ("logits_scaling", 1.0, 8.0),
        ("embedding_multiplier", 1.0, 12.0),
        ("embedding_scale", 1, 2),
        ("residual_multiplier", 1.0, 0.22),
        ("residual_scale", 1.0, 0.5),
        ("scale_emb", 1, 12),
        ("lm_head_multiplier", 1.0, 0.5),
        ("mlp_multipliers", [1.0, 1.0], [1.0, 0.5]),
        ("attention_multiplier", 0.125, 0.25),
        ("query_pre_attn_scalar", 64, 256),
        ("rotary_dim", 64, 32),
        ("final_logit_softcapping", None, 30.0),
        ("attn_logit_softcapping", 0.0, 50.0),
        ("clip_qkv", None, 8.0),
        ("num_local_experts", 0, 8),
        ("num_experts", None, 4),
        ("use_qk_norm", False, True),
        ("mlp_bias", False, True),
        ("is_causal", True, False),
        ("no_rope_layers", [1, 1], [1, 0]),
        ("rotary_pct", 1.0, 0.25),
        ("hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("attention_chunk_size", None, 8192),
        ("rope_interleaved", False, True),
        ("layer_types", ["full_attention"] * 2, ["full_attention", "linear_attention"]),
        ("layer_types", None, ["full_attention"] * 3),
        ("layer_types", None, ["sliding_attention"] * 2),
        ("intermediate_size", [160, 160], [160, 128]),
        ("num_key_value_heads", [2, 2], [2, 4]),
        ("num_attention_heads", 4, [4, 4, 4]),
        ("rms_norm_eps", 1e-5, float("nan")),
        ("rope_theta", 1e4, -1.0),
        ("rms_norm_eps", 1e-5, 10**400),
        ("hidden_size", 96, 10**400),
        ("logit_scale", 1, 10**400),
        ("partial_rotary_factor", 1, 0.5),
    ],
)
def test_a_key_that_changes_the_logits_is_refused_by_name(key, neutral, other):
    assert config_of(**{key: neutral}) == config_of()
    with pytest.raises(LabError, match=key.replace("rms_norm_eps", "rms_(norm_)?eps")):
        config_of(**{key: other})


def test_keys_that_change_nothing_are_let_be():
    assert (
        config_of(
            pretraining_tp=2,
            ffn_dim_multiplier=1.3,
            attention_dropout=0.1,
            use_cache=False,
            torch_dtype="bfloat16",
            rope_interleaved=False,
            max_window_layers=1,
        )
        == config_of()
    )
    assert config_of("qwen3", use_qk_norm=True) == config_of("qwen3")


@pytest.mark.parametrize(
    "rope, says",
    [
        ({"factor": 4.0}, "factor 4.0.*name the rope_type"),
        ({"rope_type": "default", "factor": 4.0}, "factor 4.0"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "above 0"),
        ({"rope_type": "linear", "factor": 4.0, "type": "yarn"}, "two types"),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "linear", "factor": 4.0, "attention_factor": 1.2}, "attention_factor"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"full_attention": {"rope_theta": 1e6}}, "full_attention"),
        ([], "must be an object"),
        ({"rope_theta": 5e5}, "rope_theta is 10000.0 and"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, "must be above"),
    ],
)
def test_rope_parameters_that_would_be_ignored(rope, says):
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(LabError, match=says):
            config_of(**{key: rope})


def test_neutral_rope_parameters():
    for rope in (
        {"factor": 1.0},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 1},
        {"rope_theta": 1e4},
        {"rope_type": "default", "factor": None},
        {"rope_type": "default", "attention_factor": 1.0},
    ):
        assert config_of(rope_scaling=rope) == config_of()
    with pytest.raises(LabError, match="contradict"):
        config_of(
            rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}
        )


@pytest.mark.parametrize(
    "name, changes, window",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, None),  # from layer 28 on, by default
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            64,
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 2},
            None,
        ),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
    ],
)
def test_layers_that_slide(name, changes, window):
    """As transformers' Qwen2Config and Qwen3Config derive layer_types."""
    assert config_of(name, **changes).sliding_window == window


def test_a_window_that_the_config_does_not_name():
    """transformers' classes: 4096 for Mistral, and for Qwen where the window is switched on."""
    for name, changes in (("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 0})):
        source = huggingface_config(replace(CONFIGS[name], sliding_window=None)) | changes
        assert from_huggingface(source, "tiny", "config.json").sliding_window == 4096
    assert config_of("llama").sliding_window is None


# --- metadata: GGUF ---


def gguf_config(tmp_path, name="llama", **options):
    return open_source(str(write_gguf(tmp_path / "tiny.gguf", CONFIGS[name], **options))).config


@pytest.mark.parametrize(
    "extra, factor",
    [
        ([("add_rope_scaling_factor", 4.0)], 4.0),
        ([("add_float32", "llama.rope.scale_linear", 4.0)], 4.0),
        (
            [
                ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
                ("add_float32", "llama.rope.scale_linear", 4.0),
            ],
            4.0,
        ),
        ([("add_rope_scaling_factor", 0.0)], None),
        ([("add_rope_scaling_factor", 1.0)], None),
        ([("add_float32", "llama.rope.scale_linear", 1.0)], None),
        ([("add_rope_scaling_type", gguf.RopeScalingType.NONE), ("add_rope_scaling_factor", 4.0)], None),
    ],
)
def test_gguf_linear_scaling_as_llama_cpp_reads_it(tmp_path, extra, factor):
    """llama.cpp, load_hparams: the type is linear by default, scale_linear the factor's old name, 0 no
    scaling."""
    assert gguf_config(tmp_path, extra=extra).rope_scaling == (factor and LinearScaling(factor))


@pytest.mark.parametrize(
    "extra", [("add_rope_scaling_factor", 4.0), ("add_float32", "llama.rope.scale_linear", 4.0)]
)
def test_gguf_linear_scaling_turns_the_logits(tmp_path, extra):
    config, weights = CONFIGS["llama"], tensors(CONFIGS["llama"])
    source = written(tmp_path, config, weights, "gguf", extra=[extra])
    logits_equal_reference(source, replace(config, rope_scaling=LinearScaling(4.0)), weights)


def test_gguf_rope_freqs_and_a_factor_both_apply(tmp_path):
    """llama.cpp divides by freq_factors and multiplies by freq_scale."""
    config = CONFIGS["llama-3"]
    found = gguf_config(tmp_path, "llama-3", extra=[("add_rope_scaling_factor", 2.0)])
    divided = inverse_frequencies(64, 5e5) / inverse_frequencies(64, 5e5, found.rope_scaling)
    torch.testing.assert_close(divided, torch.from_numpy(2.0 * llama3_divisors(config)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("values", [[[1.0]] * 32, [1.0] * 5000, [1.0] * 31, [0.0] * 32, [float("nan")] * 32])
def test_gguf_rope_freqs_of_another_shape(tmp_path, values):
    import numpy as np

    extra = [("add_tensor", "rope_freqs.weight", np.array(values, np.float32))]
    with pytest.raises(LabError, match="rope_freqs.weight (is|holds)"):
        gguf_config(tmp_path, extra=extra)


@pytest.mark.parametrize(
    "extra, says",
    [
        ([("add_rope_scaling_factor", -2.0)], "llama.rope.scaling.factor is -2.0"),
        ([("add_rope_scaling_factor", float("nan"))], "llama.rope.scaling.factor is nan"),
        (
            [("add_rope_scaling_factor", 2.0), ("add_float32", "llama.rope.scale_linear", 4.0)],
            "rope.scale_linear of llama differ",
        ),
        ([("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)], "rope.scaling.factor is missing"),
        ([("add_rope_scaling_attn_factors", 1.2)], "llama.rope.scaling.attn_factor"),
        ([("add_logit_scale", 0.0625)], "llama.logit_scale"),
        ([("add_embedding_scale", 12.0)], "llama.embedding_scale"),
        ([("add_residual_scale", 0.22)], "llama.residual_scale"),
        ([("add_attention_scale", 0.25)], "llama.attention.scale"),
        ([("add_clamp_kqv", 8.0)], "llama.attention.clamp_kqv"),
        ([("add_layer_norm_eps", 1e-3)], "llama.attention.layer_norm_epsilon"),
        ([("add_final_logit_softcapping", 30.0)], "llama.final_logit_softcapping"),
        ([("add_attn_logit_softcapping", 50.0)], "llama.attn_logit_softcapping"),
        ([("add_causal_attention", False)], "llama.attention.causal"),
        ([("add_parallel_residual", True)], "llama.use_parallel_residual"),
        ([("add_uint32", "llama.nextn_predict_layers", 1)], "llama.nextn_predict_layers"),
        ([("add_array", "llama.rope.dimension_sections", [16, 24, 24, 0])], "llama.rope.dimension_sections"),
        ([("add_vocab_size", 300)], "llama.vocab_size"),
        ([("add_type", "adapter")], "general.type"),
        ([("add_string", "split.count", "two")], "llama-gguf-split"),
    ],
)
def test_a_gguf_key_that_changes_the_logits_is_refused_by_name(tmp_path, extra, says):
    with pytest.raises(LabError, match=says):
        gguf_config(tmp_path, extra=extra)


def test_gguf_keys_that_change_nothing_are_let_be(tmp_path):
    extra = [
        ("add_logit_scale", 1.0),
        ("add_embedding_scale", 0.0),
        ("add_attention_scale", 0.125),
        ("add_rope_scaling_attn_factors", 1.0),
        ("add_causal_attention", True),
        ("add_vocab_size", 272),
        ("add_clamp_kqv", 0.0),
        ("add_layer_norm_eps", 1e-5),
        ("add_rope_dimension_count", 64),
        ("add_tensor_data_layout", "Meta AI original pth"),
        ("add_expert_count", 0),
        ("add_rope_scaling_finetuned", True),
        ("add_type", "model"),
        ("add_uint32", "other.key", 7),
    ]
    plain = gguf_config(tmp_path)
    assert gguf_config(tmp_path, extra=extra) == plain


@pytest.mark.parametrize(
    "call, key, value",
    [
        ("add_head_count_kv", "attention.head_count_kv", 2),
        ("add_head_count", "attention.head_count", 4),
        ("add_feed_forward_length", "feed_forward_length", 160),
        ("add_key_length", "attention.key_length", 64),
        ("add_layer_norm_rms_eps", "attention.layer_norm_rms_epsilon", 1e-5),
        ("add_rope_freq_base", "rope.freq_base", 1e4),
        ("add_embedding_length", "embedding_length", 96),
        ("add_context_length", "context_length", 256),
    ],
)
def test_gguf_arrays_with_one_value_a_layer(tmp_path, call, key, value):
    weights = tensors(CONFIGS["llama"])
    array = {"changed": {call: None}}
    source = written(
        tmp_path,
        CONFIGS["llama"],
        weights,
        "gguf",
        extra=[("add_array", f"llama.{key}", [value, value])],
        **array,
    )
    logits_equal_reference(source, CONFIGS["llama"], weights)
    for values, says in (
        ([value, value * 2], "differs between layers"),
        ([value] * 3, "3 values for 2 layers"),
    ):
        with pytest.raises(LabError, match=f"llama.{key} .*{says}|llama.{key} {says}"):
            gguf_config(tmp_path, extra=[("add_array", f"llama.{key}", values)], **array)


# --- how far a scaled model goes ---


def test_a_linearly_scaled_model_goes_as_far_as_its_scaled_length(tmp_path, capsys):
    """256 tokens by 4; vLLM's _get_and_verify_max_len multiplies, too. Whether 256 is the scaled length
    already is not known, so that more than 256 are warned of, once."""
    for config in (
        config_of(rope_scaling={"type": "linear", "factor": 4.0}),
        gguf_config(tmp_path, extra=[("add_rope_scaling_factor", 4.0)]),
    ):
        assert config.max_positions == 1024
        config.check_context(256)
        assert capsys.readouterr().err == ""
        config.check_context(1024)
        config.check_context(1024)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "256 tokens" in said
        with pytest.raises(LabError, match="longer than the 1024"):
            config.check_context(1025)


@pytest.mark.parametrize("original, limit", [(256, 1024), (64, 256)])
def test_a_length_that_is_known_is_not_warned_of(tmp_path, capsys, original, limit):
    scaling = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": original}
    extra = [("add_rope_scaling_factor", 4.0), ("add_rope_scaling_orig_ctx_len", original)]
    for config in (config_of(rope_scaling=scaling), gguf_config(tmp_path, extra=extra)):
        assert config.max_positions == limit
        config.check_context(limit)
    assert capsys.readouterr().err == ""


# --- files that are no files, and files made to hurt ---


def put_pipe(path):
    os.mkfifo(path)


def put_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "put, says",
    [(put_pipe, "is a pipe"), (put_device, "is a device"), (lambda path: path.mkdir(), "is a folder")],
)
@pytest.mark.parametrize(
    "name, shards",
    [
        ("config.json", 1),
        ("model.safetensors", 1),
        ("model.safetensors.index.json", 2),
        ("model-00001-of-00002.safetensors", 2),
    ],
)
def test_a_pipe_or_a_device_in_a_folder(tmp_path, put, says, name, shards):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], shards=shards)
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(LabError, match=f"{name} {says}, not a regular file"):
        open_source(str(folder))


@pytest.mark.parametrize("put, says", [(put_pipe, "is a pipe"), (put_device, "is a device")])
def test_a_pipe_or_a_device_as_the_model(tmp_path, put, says):
    put(tmp_path / "tiny.gguf")
    with pytest.raises(LabError, match=says):
        open_source(str(tmp_path / "tiny.gguf"))
    with pytest.raises(LabError, match=says):
        regular_file(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("model", ["x" * 5000, "a\0b", "/proc/self/mem/x"])
def test_names_that_no_file_can_have(model):
    with pytest.raises(LabError):
        open_source(model)


@pytest.mark.parametrize("depth", [200, 5000, 200000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_json_nested_too_deeply(tmp_path, depth, name, opening, closing):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], shards=2)
    (folder / name).write_text('{"x": ' + opening * depth + "1" + closing * depth + "}")
    with pytest.raises(LabError, match=f"{name} is nested more than 100 levels deep") as caught:
        open_source(str(folder))
    assert len(str(caught.value)) < 300


def test_json_that_is_nested_as_deeply_as_real_ones(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ' + "[" * 90 + "]" * 90 + "}")
    assert "x" in read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"x": "\xff"}')
    with pytest.raises(LabError, match="not UTF-8"):
        read_text(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("null")
    with pytest.raises(LabError, match="expected a JSON object"):
        read_json(tmp_path / "a.json")


def metadata(key, kind, payload):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


def with_metadata(path, extra, entries=1):
    """A GGUF file with further entries, whose tensors stay aligned to 32 bytes."""
    data = write_gguf(path, CONFIGS["llama"]).read_bytes()
    count = struct.unpack_from("<Q", data, 16)[0] + entries
    filler = metadata("filler", 9, struct.pack("<IQ", 0, 0))
    filler = metadata("filler", 9, struct.pack("<IQ", 0, -(len(extra) + len(filler)) % 32)) + bytes(
        -(len(extra) + len(filler)) % 32
    )
    path.write_bytes(data[:16] + struct.pack("<Q", count + 1) + extra + filler + data[24:])
    return path


@pytest.mark.parametrize(
    "item, size", [(0, 1), (7, 1), (6, 4), (12, 8), (8, 8)]
)  # uint8, bool, float, empty strings
def test_a_gguf_array_of_5_MB_is_read_in_bulk(tmp_path, item, size):
    """It took 49 s and 2 GB. On a busy machine this one takes up to a second and 100 MB."""
    array = metadata("big", 9, struct.pack("<IQ", item, 5 * 2**20 // size) + bytes(5 * 2**20))
    path = with_metadata(tmp_path / "tiny.gguf", array)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    source = open_source(str(path))
    values = source.array("big")
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert len(values) == 5 * 2**20 // size and not any(values)
    assert torch.equal(load(source).embed.data, tensors(CONFIGS["llama"])["model.embed_tokens.weight"])


def test_gguf_arrays_hold_what_was_written(tmp_path):
    arrays = {
        "ints": [1, -2, 3],
        "floats": [0.5, -1.25],
        "flags": [True, False],
        "words": ["", "a", "日本", "x" * 300],
    }
    source = open_source(
        str(
            write_gguf(
                tmp_path / "tiny.gguf",
                CONFIGS["llama"],
                extra=[("add_array", key, values) for key, values in arrays.items()],
            )
        )
    )
    for key, values in arrays.items():
        assert source.array(key) == values
    assert source.array("not.there") is None
    with pytest.raises(LabError, match="is no array"):
        source.array("general.architecture")


def test_a_gguf_of_the_other_byte_order_is_called_so(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_token_list(["a", "bc"])
    writer.add_array("numbers", [1, 2])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(LabError, match="other byte order"):
        open_source(str(tmp_path / "big.gguf"))


@pytest.mark.parametrize(
    "extra, entries, says",
    [
        (metadata("a", 9, struct.pack("<IQ", 9, 1) * 50000), 1, "array of arrays"),
        (metadata("a", 9, struct.pack("<IQ", 8, 1 << 60)), 1, "ends too early"),
        (metadata("a", 9, struct.pack("<IQ", 8, 3) + struct.pack("<Q", 1 << 62)), 1, "ends too early"),
        (metadata("a", 9, struct.pack("<IQ", 12, 1 << 61)), 1, "ends too early"),
        (metadata("a", 9, struct.pack("<IQ", 77, 1)), 1, "mangled"),
        (b"", 1 << 40, "metadata entries"),
    ],
)
def test_gguf_metadata_made_to_hurt(tmp_path, extra, entries, says):
    path = with_metadata(tmp_path / "tiny.gguf", extra, entries)
    start = time.process_time()
    with pytest.raises(LabError, match=says):
        open_source(str(path))
    assert time.process_time() - start < 5


def test_a_gguf_that_claims_a_billion_layers(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], changed={"add_block_count": 2**31})
    start = time.process_time()
    with pytest.raises(LabError):
        load(open_source(str(path)))
    assert time.process_time() - start < 5
