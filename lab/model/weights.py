"""The weights of a model in memory, in the layout that the kernels read, loaded from a source
(lab/model/sources)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import torch

from lab.errors import LabError, named
from lab.model.description import ModelConfig, Part
from lab.model.matrix import Matrix
from lab.model.memory import require_memory


@dataclass
class Layer:
    """One layer: the parts of LayerDescription by name, None for those that the model lacks.

    The matrices are `Matrix` in Weights.layers, and what the ops take in those of Weights.operands().
    """

    attn_norm: torch.Tensor  # [hidden]
    wqkv: Matrix  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    bqkv: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    wo: Matrix  # [hidden, q_heads * head_dim]
    bo: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    w_gate_up: Matrix  # [2 * intermediate, hidden]: gate, then up
    w_down: Matrix  # [hidden, intermediate]


@dataclass
class Weights:
    config: ModelConfig
    embed: Matrix  # [vocab, hidden]
    layers: list[Layer]
    final_norm: torch.Tensor  # [hidden]
    lm_head: Matrix  # [vocab, hidden]; the same object as embed when tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def operands(self) -> Weights:
        """The same weights with each Matrix replaced by its operand, as plans and ops take them."""
        return replace(_operands(self), layers=[_operands(layer) for layer in self.layers])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the model once, a tied embedding's too."""
        found = {}
        for holder in (self, *self.layers):
            for value in vars(holder).values():
                if isinstance(value, Matrix):
                    found |= {id(t): t for t in value.tensors()}
                elif isinstance(value, torch.Tensor):
                    found[id(value)] = value
        return list(found.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the model takes in memory."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def step_nbytes(self) -> int:
        """Bytes that a decode step reads at least: all but an embedding that is not the output head too, of
        which it reads one row for each sequence."""
        return self.nbytes - (0 if self.lm_head is self.embed else self.embed.nbytes)


def _operands(holder: Layer | Weights) -> Layer | Weights:
    matrices = {name: value for name, value in vars(holder).items() if isinstance(value, Matrix)}
    return replace(holder, **{name: matrix.operand for name, matrix in matrices.items()})


def load(source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Weights:
    """Reads every tensor of `source` once and packs it. Shows a progress bar where stderr is a terminal.

    An output head that the file holds is used even where the metadata call the embeddings tied, as
    transformers 5 and llama.cpp do. Raises LabError where the model does not fit into memory, for a tensor
    that is missing or of the wrong shape, and for one that was not read: the model would be another one
    without it.
    """
    config = source.config
    if config.tie_embeddings and source.holds("lm_head.weight"):
        config = replace(config, tie_embeddings=False)
    require_memory(
        config.nbytes(dtype), device, f"model {source.name} in {dtype}", "use a smaller model or dtype"
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


def _pack(source, config: ModelConfig, dtype: torch.dtype, device: torch.device, advance) -> Weights:
    """config: source.config, with tie_embeddings as the source holds an output head or not."""

    def read(part: Part, prefix: str = "") -> Matrix | torch.Tensor:
        out = torch.empty(part.shape, dtype=dtype, device=device)
        for (name, _), rows in zip(part.tensors, out.split([rows for _, rows in part.tensors])):
            if name.endswith(".bias") and not source.holds(prefix + name):
                rows.zero_()  # other layers or projections have one; the source has checked those that must
            else:
                source.fill(prefix + name, rows)
        return Matrix(out) if part.is_matrix else out

    def layer(index: int) -> Layer:
        loaded = {part.name: read(part, f"model.layers.{index}.") for part in config.layer.parts()}
        advance()
        return Layer(**{field.name: loaded.get(field.name) for field in fields(Layer)})

    outer = {part.name: part for part in config.outer_parts()}
    embed = read(outer["embed"])
    advance()
    layers = [layer(index) for index in range(config.layers)]
    final_norm = read(outer["final_norm"])
    lm_head = read(outer["lm_head"]) if "lm_head" in outer else embed
    if lm_head is not embed and torch.equal(lm_head.data, embed.data):
        lm_head = embed  # kept once
    if config.tie_embeddings != (lm_head is embed):
        config = replace(config, tie_embeddings=lm_head is embed)
    advance()
    return Weights(config, embed, layers, final_norm, lm_head)


class _progress:
    """`with _progress(title, steps) as advance`: a bar on stderr that advance() moves by one step; nothing
    where stderr is not a terminal."""

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
