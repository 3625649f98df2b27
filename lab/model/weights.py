"""The weights of a model in memory, in the layout that the kernels read, loaded from a source
(lab/model/sources)."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, fields, replace

import torch

from lab.contract import dtype_name
from lab.errors import LabError, named, warn
from lab.formats import FORMATS, PackedMatrix
from lab.model.description import ModelConfig, Part
from lab.model.kv_cache import token_bytes
from lab.model.matrix import Matrix
from lab.model.memory import device_bytes, require_memory
from lab.model.parallel import RankSource
from lab.model.ranks import Group
from lab.model.sources.store import kv_scales_of
from lab.model.weight_formats import AS_STORED, Formats, Storage, described, formats_of


@dataclass
class Layer:
    """One layer: the parts of LayerDescription by name, None for those that the model lacks.

    The matrices are `Matrix` in Weights.layers, and what the ops take in those of Weights.operands().
    """

    attn_norm: torch.Tensor  # [hidden]
    wqkv: Matrix  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v; they may be stored apart
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
    lm_head: Matrix  # [vocab, hidden]; the same object as embed when tied; of a rank its share of the rows
    group: Group | None = None  # the ranks among which the model is divided: these weights are one's part
    kv_scales: list[tuple[float, float]] | None = None  # (of K, of V) of each layer, for a KV cache in fp8

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def matrices(self) -> list[Matrix]:
        """The matrices of the layers, as they are stored."""
        return [
            one
            for layer in self.layers
            for value in vars(layer).values()
            if isinstance(value, Matrix)
            for one in value.apart()
        ]

    @property
    def packed(self) -> bool:
        """Whether any matrix is packed in a weight format."""
        return any(matrix.format for matrix in (self.embed, self.lm_head, *self.matrices()))

    @property
    def formats(self) -> str:
        """For example "int4-g128, lm_head int8", or "bf16" where all are plain."""
        plain = dtype_name(self.dtype)
        return described(
            ((matrix.format or plain, matrix.rows * matrix.cols) for matrix in self.matrices()),
            self.lm_head.format or plain,
        )

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


def load(
    source,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    storage: Storage = AS_STORED,
    group: Group | None = None,
) -> Weights:
    """Reads every tensor of `source` once and packs it. Shows a progress bar where stderr is a terminal.

    dtype: of activations and of all that is not packed. storage: which matrices are packed in a weight
    format. group: of the ranks, where `source` has one rank's part (lab/model/parallel.py). What is expanded
    although the file stores it in fewer bits is said on standard error.

    An output head that the file holds is used even where the metadata call the embeddings tied, as
    transformers 5 and llama.cpp do. Raises LabError where the model does not fit into memory, for a tensor
    that is missing, of the wrong shape or beyond dtype, and for one that was not read: the model would be
    another one without it.
    """
    config, formats = planned(source, dtype, storage)
    require_memory(
        formats.nbytes(config, dtype),
        device,
        f"model {source.name} in {formats.text(config, dtype)}",
        "use a smaller model or dtype, or --quantise",
    )
    with _progress(f"loading {source.name}", 2 + config.layers) as advance:
        loaded = _pack(source, config, formats, storage, dtype, torch.device(device), advance)
    loaded.group = group
    loaded.kv_scales = kv_scales_of(source)
    if unread := source.unread():
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise LabError(
            f"{source.where}: tensor {', '.join(map(named, unread[:3]))}{more} in it belongs to no part "
            f"of a {config.architecture} model of {config.layers} layers as it is built here; without it "
            "the model's text would be wrong"
        )
    for note in formats.notes:  # only of what could be loaded: a refusal stands alone
        warn(note)
    return loaded


def planned(source, dtype: torch.dtype, storage: Storage) -> tuple[ModelConfig, Formats]:
    """(config, formats) of what load() would make of a source: its configuration, with tie_embeddings as it
    holds an output head or not, and the format of each matrix. Raises LabError as formats_of() does."""
    config = source.config
    if config.tie_embeddings and source.holds("lm_head.weight"):
        config = replace(config, tie_embeddings=False)
    return config, formats_of(source, config, storage, dtype)


def require_parts(
    source,
    ranks: int,
    dtype: torch.dtype,
    device: str,
    storage: Storage = AS_STORED,
    tokens: int = 0,
    kv_dtype: str | None = None,
) -> None:
    """Raises LabError where a rank's part of a source's model and a KV cache of so many tokens are more than
    its GPU has, or those of all ranks more than is free on a CPU. Reads no weights and takes no memory."""
    config, formats = planned(RankSource(source, 0, ranks), dtype, storage)
    of_weights, of_cache = formats.nbytes(config, dtype), tokens * token_bytes(config, dtype, kv_dtype)
    need, apart = of_weights + of_cache, device == "cuda"
    for index in range(ranks) if apart else (0,):
        there = device_bytes(device, index)
        if there is None or need * (1 if apart else ranks) <= there:
            continue
        has = f"GPU {index} has" if apart else "the memory that they share has"
        remedy = "more ranks, a smaller model" if apart else "a smaller model"
        raise LabError(
            f"model {source.name} in {formats.text(config, dtype)} needs {need / 2**30:.1f} GiB on each "
            f"of {ranks} ranks, {of_weights / 2**30:.1f} of them for weights, the rest for a KV cache of "
            f"{tokens} tokens; {has} {there / 2**30:.1f} GiB: use {remedy} or dtype, or --quantise"
        )


def _pack(
    source,
    config: ModelConfig,
    formats: Formats,
    storage: Storage,
    dtype: torch.dtype,
    device: torch.device,
    advance,
) -> Weights:
    """config, formats: see planned()."""

    def packed(name: str, shape: tuple[int, int], format: str) -> PackedMatrix:
        matrix = as_packed(name, shape, format)
        # Prefill expands it to dtype. The bound hardly costs anything, the largest weight an expansion.
        if matrix.bound() > torch.finfo(dtype).max and matrix.largest() > torch.finfo(dtype).max:
            raise LabError(
                f"{source.where}: tensor {name} in {format} has weights beyond {torch.finfo(dtype).max:g}, "
                f"which are not finite in {dtype_name(dtype)}; use --dtype bf16 or fp32"
            )
        return matrix

    def as_packed(name: str, shape: tuple[int, int], format: str) -> PackedMatrix:
        if storage.quantise is None:
            return source.packed(name, shape, device)
        rounded_to = functools.partial(rounded, format=format)
        if isinstance(source, RankSource):
            return source.quantised(name, shape, FORMATS[format], rounded_to)
        return rounded_to(source, name, shape)

    def rounded(source, name: str, shape: tuple[int, int], format: str) -> PackedMatrix:
        values = torch.empty(shape, device=device)
        source.fill(name, values)
        try:
            return FORMATS[format].quantise(values)
        except LabError as error:
            raise LabError(f"{source.where}: tensor {name}: {error}") from None

    def read(
        part: Part, prefix: str = "", format: str | None | tuple[str | None, ...] = None
    ) -> Matrix | torch.Tensor:
        if isinstance(format, tuple):
            return Matrix(tuple(read(some, prefix, one).data for some, one in part.apart(format)), dtype)
        if format is not None:
            shapes = ((prefix + name, (rows, part.columns)) for name, rows in part.tensors)
            return Matrix(PackedMatrix.stacked([packed(*one, format) for one in shapes]), dtype)
        out = torch.empty(part.shape, dtype=dtype, device=device)
        for (name, _), rows in zip(part.tensors, out.split([rows for _, rows in part.tensors])):
            if name.endswith(".bias") and not source.holds(prefix + name):
                rows.zero_()  # other layers or projections have one; the source has checked those that must
            else:
                source.fill(prefix + name, rows)
        return Matrix(out) if part.is_matrix else out

    def layer(index: int) -> Layer:
        chosen, prefix = formats.layers[index], f"model.layers.{index}."
        loaded = {part.name: read(part, prefix, chosen.get(part.name)) for part in config.layer.parts()}
        advance()
        return Layer(**{field.name: loaded.get(field.name) for field in fields(Layer)})

    outer = {part.name: part for part in config.outer_parts()}
    embed = read(outer["embed"], format=formats.outer["embed"])
    advance()
    layers = [layer(index) for index in range(config.layers)]
    final_norm = read(outer["final_norm"])
    lm_head = read(outer["lm_head"], format=formats.outer["lm_head"]) if "lm_head" in outer else embed
    if lm_head is not embed and lm_head.same(embed):
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
