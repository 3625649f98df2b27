"""Tiny models for the tests: random weights, written as a Hugging Face folder or a GGUF file, and a plain
reference."""

import json
from dataclasses import replace

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from lab.model.description import ModelConfig
from lab.model.rope import LinearScaling, Llama3Scaling
from lab.model.sources.random import RandomSource

LLAMA = ModelConfig(
    "tiny",
    "llama",
    layers=2,
    hidden=96,
    intermediate=160,
    q_heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=272,
    max_positions=256,
    rope_theta=10000.0,
)
CONFIGS = {
    "llama": replace(LLAMA, tie_embeddings=True),
    "llama-3": replace(LLAMA, rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "mistral": replace(LLAMA, architecture="mistral", q_heads=2, kv_heads=2, sliding_window=192),
    "qwen2": replace(LLAMA, architecture="qwen2", qkv_bias=True, q_heads=6, kv_heads=1),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_norm=True, rms_eps=1e-6, tie_embeddings=True),
}


def tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """float32 tensors by their Hugging Face names, from the shapes that the architecture prescribes."""
    hidden, q, kv, mid = config.hidden, config.q_width, config.kv_width, config.intermediate
    shapes = {"model.embed_tokens.weight": (config.vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    for index in range(config.layers):
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (mid, hidden),
            "mlp.up_proj.weight": (mid, hidden),
            "mlp.down_proj.weight": (hidden, mid),
        }
        if config.qkv_bias:
            block |= {
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
            }
        if config.qk_norm:
            block |= {f"self_attn.{x}_norm.weight": (config.head_dim,) for x in "qk"}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    source, made = RandomSource(config, seed=1), {}
    for name, shape in shapes.items():
        made[name] = torch.empty(shape)
        source.fill(name, made[name])
    return made


def huggingface_config(config: ModelConfig) -> dict:
    found = {
        "model_type": config.architecture,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": 257,
        "bos_token_id": 256,
    }
    if config.sliding_window:
        found["sliding_window"] = config.sliding_window
    if config.rope_scaling:
        scaling = config.rope_scaling
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return found


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """(tokens, merges): the 256 bytes, <|start|> at 256, <|end|> at 257, three merges, then unused tokens."""
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet += [chr(256 + n) for n in range(256 - len(alphabet))]  # GPT-2's stand-ins for unprintable bytes
    merges = ["h e", "l l", "he ll"]
    tokens = [*alphabet, "<|start|>", "<|end|>", *(merge.replace(" ", "") for merge in merges)]
    return tokens + [f"<unused{n}>" for n in range(size - len(tokens))], merges


def tokenizer_json(size: int) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = byte_level_vocabulary(size)
    backend = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(merge.split()) for merge in merges]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|start|>", "<|end|>")])
    return backend.to_str()


def write_folder(
    folder, config: ModelConfig, weights=None, shards: int = 1, dtype=torch.float32, tokenizer=True
):
    weights = {name: t.to(dtype) for name, t in (weights or tensors(config)).items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        names, weight_map = sorted(weights), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file({name: weights[name] for name in names[shard::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[shard::shards], file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer_json(config.vocab))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "bos_token": "<|start|>",
                    "eos_token": {"content": "<|end|>"},
                    "chat_template": CHAT_TEMPLATE,
                }
            )
        )
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(
    path,
    config: ModelConfig,
    weights=None,
    kind="F32",
    tokenizer=True,
    extra=(),
    pre="smollm",
    changed={},
    arch=None,
    reordered=None,
    names={},
):
    """As llama.cpp's converter writes it: matrices of type `kind`, the rest F32, Llama's q and k rows
    reordered. kind: also a function of a tensor's Hugging Face name.

    extra: further calls of the writer, (method, *arguments). changed: another argument for one of the calls
    below, by its method; with None it is left out. Of a family that is not known here, arch: its architecture
    in GGUF files,
    reordered: whether these reorder q and k as Llama's do, names: what differs from GGUF_NAMES.
    """
    arch = arch or ("llama" if config.architecture == "mistral" else config.architecture)
    reordered = arch == "llama" if reordered is None else reordered
    writer = gguf.GGUFWriter(path, arch)
    shape = {
        "add_block_count": config.layers,
        "add_context_length": config.max_positions,
        "add_embedding_length": config.hidden,
        "add_feed_forward_length": config.intermediate,
        "add_head_count": config.q_heads,
        "add_head_count_kv": config.kv_heads,
        "add_key_length": config.head_dim,
        "add_value_length": config.head_dim,
        "add_layer_norm_rms_eps": config.rms_eps,
        "add_rope_freq_base": config.rope_theta,
        "add_sliding_window": config.sliding_window,
    }
    for call, value in (shape | changed).items():
        if value is not None:
            getattr(writer, call)(value)
    if tokenizer:
        tokens, merges = byte_level_vocabulary(config.vocab)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in ("<|start|>", "<|end|>") else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template(CHAT_TEMPLATE)
    for call, *values in extra:
        getattr(writer, call)(*values)
    for name, tensor in (weights or tensors(config)).items():
        stem, _, ending = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            prefix = f"blk.{index}."
        values = tensor.numpy()
        if reordered and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.q_heads if "q_proj" in stem else config.kv_heads
            values = values.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        chosen = kind(name) if callable(kind) else kind
        stored = gguf.GGMLQuantizationType[chosen if values.ndim == 2 else "F32"]
        writer.add_tensor(
            f"{prefix}{(GGUF_NAMES | names)[stem]}.{ending}", quantised(values, stored), raw_dtype=stored
        )
    if config.rope_scaling:
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The blocks of a type; of Q4_K and Q6_K, which the package gguf cannot write, any codes with small
    scales."""
    scales = {"Q4_K": (0, [2e-5, 1.5e-4]), "Q6_K": (208, [1e-5])}  # where they are in a block
    if kind.name not in scales:
        return gguf.quants.quantize(values, kind)
    size, (at, numbers) = gguf.GGML_QUANT_SIZES[kind][1], scales[kind.name]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // 256, size), np.uint8)
    blocks[:, at : at + 2 * len(numbers)] = np.frombuffer(np.float16(numbers).tobytes(), np.uint8)
    return blocks.reshape(values.shape[0], -1)


def llama3_divisors(config: ModelConfig) -> np.ndarray:
    """Piecewise, as Meta's reference code writes it."""
    s, out = config.rope_scaling, []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < s.original_context / s.high_freq_factor:
            out.append(1.0)
        elif wavelength > s.original_context / s.low_freq_factor:
            out.append(s.factor)
        else:
            smooth = (s.original_context / wavelength - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            out.append(1 / ((1 - smooth) / s.factor + smooth))
    return np.array(out)


def reference_logits(config: ModelConfig, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """float64 [len(ids), vocab]: the whole model over all ids at once, in the plainest torch, from unpacked
    weights."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    dim, group = config.head_dim, config.q_heads // config.kv_heads

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_eps).sqrt() * w[name]

    def project(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(1, dtype=torch.float64))

    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if config.rope_scaling:
        scaling = config.rope_scaling
        frequency = frequency / (
            scaling.factor
            if isinstance(scaling, LinearScaling)
            else torch.from_numpy(llama3_divisors(config))
        )
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(len(ids))[:, None] * frequency)

    def heads(x, norm_name, rotate):
        x = x.view(len(ids), -1, dim).transpose(0, 1)
        if config.qk_norm and norm_name:
            x = norm(x, norm_name)
        if rotate:
            turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
            x = torch.cat([turned.real, turned.imag], -1)
        return x

    h = w["model.embed_tokens.weight"][ids]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for index in range(config.layers):
        at, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        x = norm(h, f"model.layers.{index}.input_layernorm.weight")
        q = heads(project(x, at + "q_proj"), at + "q_norm.weight", True)
        k = heads(project(x, at + "k_proj"), at + "k_norm.weight", True).repeat_interleave(group, 0)
        v = heads(project(x, at + "v_proj"), None, False).repeat_interleave(group, 0)
        scores = (q @ k.mT / dim**0.5).masked_fill(future, -torch.inf)
        h = h + project((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), at + "o_proj")
        x = norm(h, f"model.layers.{index}.post_attention_layernorm.weight")
        gate = project(x, mlp + "gate_proj")
        h = h + project(gate * gate.sigmoid() * project(x, mlp + "up_proj"), mlp + "down_proj")
    head = w["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return norm(h, "model.norm.weight") @ head.T
