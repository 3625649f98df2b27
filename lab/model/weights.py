"""Weights packed for decoding: what a source (lab/model/sources) holds, in the layout that the kernels
read."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import torch

from lab.errors import LabError, named
from lab.model.description import ModelConfig, Part
from lab.model.memory import require_memory


@dataclass
class Layer:
    """One layer: the parts of LayerDescription by name, None for those that the model lacks.

    Matrices are [out, in], row-major, as `linear` reads them.
    """

    attn_norm: torch.Tensor  # [hidden]
    wqkv: torch.Tensor  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    bqkv: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    wo: torch.Tensor  # [hidden, q_heads * head_dim]
    bo: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    w_gate_up: torch.Tensor  # [2 * intermediate, hidden]: gate, then up
    w_down: torch.Tensor  # [hidden, intermediate]


@dataclass
class Weights:
    config: ModelConfig
    embed: torch.Tensor  # [vocab, hidden]
    layers: list[Layer]
    final_norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]; the same tensor as embed when tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


def load(source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Weights:
    """Reads every tensor of `source` once and packs it. Shows a progress bar where stderr is a terminal.

    An output head that the file holds is used even where the metadata call the embeddings tied, as
    transformers 5 and llama.cpp do. Raises LabError for a tensor that is missing or of the wrong shape, and
    for one that was not
    read: the model would be another one without it.
    """
    config = source.config
    own_head = config.tie_embeddings and source.holds("lm_head.weight")
    parameters = config.parameters + own_head * config.vocab * config.hidden
    require_memory(
        parameters * dtype.itemsize, device, f"model {source.name} in {dtype}", "use a smaller model or dtype"
    )
    with _progress(f"loading {source.name}", 2 + config.layers) as advance:
        loaded = _pack(source, config, dtype, torch.device(device), advance)
    if unread := source.unread():
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise LabError(
            f"{source.where}: tensor {', '.join(map(named, unread[:3]))}{more} in it belongs to no part "
            f"of a {config.architecture} model of {config.layers} layers as it is built here; without it "
            "the model's text would be wrong"
        )
    return loaded


def _pack(source, config: ModelConfig, dtype, device, advance) -> Weights:
    def fill(name: str, out: torch.Tensor) -> None:
        if name.endswith(".bias") and not source.holds(name):
            out.zero_()  # some layers or projections have one, this has not; the source knows which must
        else:
            source.fill(name, out)

    def read(name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        fill(name, out)
        return out

    def read_part(prefix: str, part: Part) -> torch.Tensor:
        out = torch.empty(part.shape, dtype=dtype, device=device)
        for (name, _), rows in zip(part.tensors, out.split([rows for _, rows in part.tensors])):
            fill(prefix + name, rows)
        return out

    def layer(index: int) -> Layer:
        loaded = {part.name: read_part(f"model.layers.{index}.", part) for part in config.layer.parts()}
        advance()
        return Layer(**{field.name: loaded.get(field.name) for field in fields(Layer)})

    embed = read("model.embed_tokens.weight", config.vocab, config.hidden)
    advance()
    layers = [layer(index) for index in range(config.layers)]
    final_norm = read("model.norm.weight", config.hidden)
    lm_head = embed
    if source.holds("lm_head.weight") or not config.tie_embeddings:
        lm_head = read("lm_head.weight", config.vocab, config.hidden)
        if torch.equal(lm_head, embed):
            lm_head = embed  # kept once
    if config.tie_embeddings != (lm_head is embed):
        config = replace(config, tie_embeddings=lm_head is embed)
    advance()
    return Weights(config, embed, layers, final_norm, lm_head)


class _progress:
    """`with _progress(title, steps) as advance`: a bar on stderr, or nothing where stderr is not a
    terminal."""

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
