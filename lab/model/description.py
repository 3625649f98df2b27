"""The description of a model: its sizes, and what one of its layers consists of.

`ModelConfig` is the whole model, `LayerDescription` one of its layers. Both list their tensors as `Part`s;
nothing else states the names and shapes of a model's weights. The parts are read by
  - the loader and the check that a model fits into memory (lab/model/weights.py),
  - the buffers of the decode plans (lab/model/plans/buffers.py),
  - prefill and the torch.compile peer (lab/model/torch_layer.py),
  - the sizes at which ops are measured (`uses` in the contracts, lab/ops).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from lab.errors import LabError, warn
from lab.formats import FORMATS
from lab.model.rope import Scaling

HEAD_DIMS = (64, 96, 128)  # what the attention kernels are instantiated for


@dataclass(frozen=True)
class Part:
    """One tensor of a loaded model: one or more tensors of the file, stacked by rows.

    tensors: of each its name, as Hugging Face names it, in a layer without "model.layers.N.", and its rows.
    columns: None for a vector. separable: of a matrix, whether its tensors may be stored apart, as several
    matrices, where they have different weight formats.
    """

    name: str  # a field of lab.model.weights.Layer or Weights
    tensors: tuple[tuple[str, int], ...]
    columns: int | None = None
    separable: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.tensors)

    @property
    def is_matrix(self) -> bool:
        return self.columns is not None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns) if self.is_matrix else (self.rows,)

    def nbytes(self, dtype: torch.dtype, format: str | None | tuple[str | None, ...] = None) -> int:
        """Bytes that it takes once loaded; a matrix the same as Matrix.nbytes says then.

        format: of a matrix, a name of lab.formats.FORMATS; None: plain, in dtype; a tuple: one for each
        tensor.
        """
        if isinstance(format, tuple):
            return sum(part.nbytes(dtype, one) for part, one in self.apart(format))
        if format is not None:
            return FORMATS[format].bytes_of(*self.shape)
        return math.prod(self.shape) * dtype.itemsize

    def apart(self, formats: tuple[str | None, ...]) -> list[tuple[Part, str | None]]:
        """The matrices as which a separable one is stored whose tensors have these formats: neighbours of one
        format stay together."""
        found, tensors = [], iter(self.tensors)
        for format, same in itertools.groupby(formats):
            some = tuple(itertools.islice(tensors, len(list(same))))
            found.append((replace(self, tensors=some), format))
        return found


@dataclass(frozen=True)
class LayerDescription:
    """One layer: RMSNorm, attention with RoPE, RMSNorm, SwiGLU; attention and SwiGLU each add to the residual
    stream.

    Sizes in elements; the fields are those of the same names in ModelConfig.
    """

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

    @property
    def q_width(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def parts(self) -> Iterator[Part]:
        """The tensors that a layer of this model has, in the order in which they are loaded."""
        heads = ("q", self.q_width), ("k", self.kv_width), ("v", self.kv_width)
        yield Part("attn_norm", (("input_layernorm.weight", self.hidden),))
        qkv = tuple((f"self_attn.{x}_proj.weight", rows) for x, rows in heads)
        yield Part("wqkv", qkv, self.hidden, separable=True)
        if self.qkv_bias:
            yield Part("bqkv", tuple((f"self_attn.{x}_proj.bias", rows) for x, rows in heads))
        if self.qk_norm:
            yield Part("q_norm", (("self_attn.q_norm.weight", self.head_dim),))
            yield Part("k_norm", (("self_attn.k_norm.weight", self.head_dim),))
        yield Part("wo", (("self_attn.o_proj.weight", self.hidden),), self.q_width)
        if self.o_bias:
            yield Part("bo", (("self_attn.o_proj.bias", self.hidden),))
        yield Part("mlp_norm", (("post_attention_layernorm.weight", self.hidden),))
        gate_up = tuple((f"mlp.{x}_proj.weight", self.intermediate) for x in ("gate", "up"))
        yield Part("w_gate_up", gate_up, self.hidden)
        yield Part("w_down", (("mlp.down_proj.weight", self.hidden),), self.intermediate)

    @property
    def parameters(self) -> int:
        """Number of weights of one layer."""
        return sum(math.prod(part.shape) for part in self.parts())


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements; `layers` blocks of attention and SwiGLU, RMSNorm before each, RoPE on q and k."""

    name: str
    architecture: str  # the name of its family: one of lab.model.families.FAMILIES
    layers: int
    hidden: int
    intermediate: int  # width of gate and of up
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int  # the longest context the model was made for
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False  # of q, k and v together; zeros where the file has it for some of them alone
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of each q and k head, before RoPE
    tie_embeddings: bool = False
    sliding_window: int | None = None
    head_rows: int | None = None  # of lm_head, where ranks divide it (lab/model/parallel.py); None: vocab
    stated_positions: int | None = None  # the file's, where max_positions may scale it once too often

    def __post_init__(self):
        for field in (
            "layers",
            "hidden",
            "intermediate",
            "q_heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "max_positions",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise LabError(f"model {self.name}: {field} is {value!r}; it must be a positive integer")
        if not (math.isfinite(self.rms_eps) and self.rms_eps >= 0):
            raise LabError(f"model {self.name}: rms_eps is {self.rms_eps}; it must be a number of at least 0")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise LabError(f"model {self.name}: rope_theta is {self.rope_theta}; it must be a number above 0")
        if self.q_heads % self.kv_heads:
            raise LabError(
                f"model {self.name}: {self.q_heads} query heads do not divide over {self.kv_heads} KV heads"
            )
        if self.head_dim not in HEAD_DIMS:
            raise LabError(
                f"model {self.name}: head_dim {self.head_dim} is not built; the kernels take "
                f"{', '.join(map(str, HEAD_DIMS))}"
            )

    @cached_property
    def layer(self) -> LayerDescription:
        """What every layer of this model consists of."""
        names = [field.name for field in fields(LayerDescription)]
        return LayerDescription(**{name: getattr(self, name) for name in names})

    @property
    def q_width(self) -> int:
        return self.layer.q_width

    @property
    def kv_width(self) -> int:
        return self.layer.kv_width

    def outer_parts(self) -> Iterator[Part]:
        """The tensors outside the layers."""
        yield Part("embed", (("model.embed_tokens.weight", self.vocab),), self.hidden)
        yield Part("final_norm", (("model.norm.weight", self.hidden),))
        if not self.tie_embeddings:
            yield Part("lm_head", (("lm_head.weight", self.head_rows or self.vocab),), self.hidden)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The parts of one layer and those outside the layers, by name; a tied lm_head is embed's part."""
        found = {part.name: part for part in (*self.outer_parts(), *self.layer.parts())}
        return {"lm_head": found["embed"], **found}

    @property
    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        outer = sum(math.prod(part.shape) for part in self.outer_parts())
        return self.layers * self.layer.parameters + outer

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that plain weights take once loaded in `dtype`, a tied embedding counted once."""
        layer = sum(part.nbytes(dtype) for part in self.layer.parts())
        return self.layers * layer + sum(part.nbytes(dtype) for part in self.outer_parts())

    def check_context(self, tokens: int) -> None:
        """Raises LabError where this model cannot attend to `tokens` tokens at once.

        Warns on standard error, once for a model, where the tokens may be more than it was made for.
        """
        if tokens > self.max_positions:
            raise LabError(
                f"a context of {tokens} tokens is longer than the {self.max_positions} that model "
                f"{self.name} was made for"
            )
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise LabError(
                f"a context of {tokens} tokens exceeds the sliding window of {self.sliding_window} of model "
                f"{self.name}; sliding-window attention is not built: use a shorter context"
            )
        stated = self.stated_positions
        if stated is not None and tokens > stated and "said" not in self.__dict__:
            self.__dict__["said"] = True  # not a field: it takes no part in comparisons
            warn(
                f"model {self.name} states a context of {stated} tokens and a linear RoPE scaling that "
                f"makes {self.max_positions} of it; where its context is already the scaled one, text "
                f"beyond {stated} tokens gets worse"
            )
