"""Tensor parallelism: what each rank has of a model whose matrices are divided among several.

Every rank has the rows of q, k, v, gate and up for its share of the heads and of the intermediate width, and
the columns of o and down for the same share, so that what it computes in between needs nothing of others.
Only the results of o and down are sums over all ranks: the op all_reduce_add. The output head is divided by
rows, its argmax found by all_argmax. Norms and the embedding are whole on every rank. Where there are fewer
KV heads than ranks, several ranks have the same one. Packed weights are divided like plain ones, where no
group of columns that share a scale would be cut. Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lab.errors import LabError
from lab.formats import FORMATS, Format, PackedMatrix
from lab.model.description import ModelConfig
from lab.model.sources.store import Stored, kv_scales_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
BY_COLUMNS = ("o_proj", "down_proj")


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raises LabError for a model that cannot be divided among so many ranks."""
    counts = {
        "query heads": config.q_heads,
        "elements of the intermediate width": config.intermediate,
        "rows of the output head": config.vocab,
    }
    for what, count in counts.items():
        if count % ranks:
            raise LabError(
                f"model {config.name}: {count} {what} do not divide over {ranks} ranks; "
                f"--tensor-parallel may be {', '.join(map(str, possible(config)))}"
            )
    if config.kv_heads % ranks and ranks % config.kv_heads:
        raise LabError(
            f"model {config.name}: {config.kv_heads} KV heads neither divide over {ranks} ranks nor can each "
            f"be held by the same number of them; --tensor-parallel may be "
            f"{', '.join(map(str, possible(config)))}"
        )


def possible(config: ModelConfig) -> list[int]:
    """The numbers of ranks, up to 8, among which a model can be divided."""
    return [
        ranks
        for ranks in range(1, 9)
        if not (config.q_heads % ranks or config.intermediate % ranks or config.vocab % ranks)
        and (config.kv_heads % ranks == 0 or ranks % config.kv_heads == 0)
    ]


def part_of(config: ModelConfig, ranks: int) -> ModelConfig:
    """The description of what one rank has. All ranks have the same sizes."""
    check_ranks(config, ranks)
    return replace(
        config,
        q_heads=config.q_heads // ranks,
        kv_heads=max(1, config.kv_heads // ranks),
        intermediate=config.intermediate // ranks,
        head_rows=config.vocab // ranks,
        tie_embeddings=False,
    )


class RankSource:
    """A source (lab/model/sources) of one rank's part of another source's model."""

    def __init__(self, source, rank: int, ranks: int):
        self.source, self.rank, self.ranks, self.whole = source, rank, ranks, source.config
        self.name, self.where, self.notes = source.name, source.where, source.notes
        self.config = part_of(source.config, ranks)

    def _stored_as(self, name: str) -> str:
        """The name under which the source has a tensor: a tied output head is the embedding."""
        return EMBEDDING if name == HEAD and not self.source.holds(HEAD) else name

    def holds(self, name: str) -> bool:
        return name == HEAD or self.source.holds(name)

    def stored(self, name: str) -> Stored:
        return self.source.stored(self._stored_as(name))

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Of a tensor of which this rank has `shape`: (the whole shape, the dimension that is divided, where
        this rank's part begins in it)."""
        module = name.split(".")[-2]
        if module in BY_COLUMNS and len(shape) == 2:
            return (shape[0], shape[1] * self.ranks), 1, shape[1] * self.rank
        if module in ("k_proj", "v_proj"):
            first = self.rank * self.whole.kv_heads // self.ranks * self.whole.head_dim
            return (self.whole.kv_width, *shape[1:]), 0, first
        if module in BY_ROWS:
            return (shape[0] * self.ranks, *shape[1:]), 0, shape[0] * self.rank
        return tuple(shape), 0, 0

    def fill(self, name: str, out: torch.Tensor) -> None:
        shape, dim, first = self.place(name, tuple(out.shape))
        stored = self._stored_as(name)
        if shape == tuple(out.shape):
            self.source.fill(stored, out)
        elif hasattr(self.source, "fill_part") and not self.source.stored(stored).quantised:
            self.source.fill_part(stored, out, shape, dim, first)
        else:
            whole = torch.empty(shape, dtype=out.dtype, device=out.device)
            self.source.fill(stored, whole)
            out.copy_(whole.narrow(dim, first, out.shape[dim]))
        if name.endswith("o_proj.bias") and self.rank:
            out.zero_()  # rank 0 adds it to the sum

    def packed(self, name: str, shape: tuple[int, int], device: torch.device) -> PackedMatrix:
        """The rank's part of a matrix that the source stores in a weight format, with the same numbers."""

        def whole(stored, whole_shape):
            return self.source.packed(stored, whole_shape, device)

        return self._part(name, shape, FORMATS[self.stored(name).format], whole)

    def quantised(self, name: str, shape: tuple[int, int], format: Format, rounded) -> PackedMatrix:
        """The rank's part of a matrix that is rounded to a format, with the numbers that one GPU would have.
        rounded(source, name, shape): the PackedMatrix of a source's matrix."""
        if self.place(name, shape)[1] == 0:
            return rounded(self, name, shape)  # each row is rounded by itself

        def whole(stored, whole_shape):
            return rounded(self.source, stored, whole_shape)

        return self._part(name, shape, format, whole)

    def _part(self, name: str, shape: tuple[int, int], format: Format, whole) -> PackedMatrix:
        """Of what whole(stored name, whole shape) gives. Raises LabError where a group would be cut."""
        whole_shape, dim, first = self.place(name, shape)
        width = format.piece_columns
        if dim == 1 and width is not None and shape[1] % width:
            raise LabError(
                f"{self.where}: {name} in {format.name}: {whole_shape[1]} columns over {self.ranks} ranks "
                f"are {shape[1]} each, which would cut a group of {width}; use fewer ranks, another format, "
                "or plain weights (--weights-as bf16)"
            )
        matrix = whole(self._stored_as(name), whole_shape)
        return matrix if tuple(shape) == whole_shape else matrix.part(dim, first, shape[dim])

    def kv_scales(self) -> list[tuple[float, float]] | None:
        return kv_scales_of(self.source)  # of whole layers, so the same on each rank

    def unread(self) -> list[str]:
        return self.source.unread()

    def tokenizer(self):
        return self.source.tokenizer()
