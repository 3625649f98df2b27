"""In which weight format each matrix of a model is kept in memory. It is decided before anything is loaded,
so that the bytes are known by then."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from lab.contract import DTYPES, dtype_name
from lab.errors import LabError
from lab.formats import FORMATS
from lab.model.description import ModelConfig, Part
from lab.names import known

DEFAULT_HEAD = "int8"  # of --quantise-head: what fewer bits cost in accuracy, the output head costs most


@dataclass(frozen=True)
class Storage:
    """What the user asks for.

    stored: matrices keep the format of the file, where lab/formats has one that holds it exactly; otherwise
    they are expanded to the model's dtype. quantise: the format that matrices are rounded to, the output head
    (and with it a tied embedding) to `head` instead, None for none. An embedding that is not the output head
    stays plain: a step reads one row of it.
    """

    stored: bool = True
    quantise: str | None = None
    head: str | None = None


AS_STORED = Storage()
EXPANDED = Storage(stored=False)


def storage_of(
    weights_as: str | None = None, quantise: str | None = None, head: str | None = None, device: str = "cuda"
) -> Storage:
    """The options --weights-as, --quantise and --quantise-head. Raises LabError for a name that is unknown,
    and for a head without quantised weights.

    Quantised weights are kept as stored unless something else is asked for, but not on a CPU: there a token
    takes longer with packed weights (2 times as long emulated, 6 times interpreted).
    """
    default = "fp32" if device == "cpu" and quantise is None else "stored"
    weights_as = known(weights_as or default, ("stored", *DTYPES), "weights")
    if quantise is None:
        if head is not None:
            raise LabError("--quantise-head needs --quantise, which says the format of the other matrices")
        return Storage(weights_as == "stored")
    head = known(head or DEFAULT_HEAD, (*FORMATS, "none"), "format")
    return Storage(
        weights_as == "stored", known(quantise, tuple(FORMATS), "format"), None if head == "none" else head
    )


def dtype_of(weights_as: str | None, dtype: str | None) -> str | None:
    """The dtype that --weights-as and --dtype ask for together, None for none. Raises LabError where they
    differ."""
    if weights_as in (None, "stored"):
        return dtype
    known(weights_as, ("stored", *DTYPES), "weights")
    if dtype is not None and known(dtype, tuple(DTYPES), "dtype") != weights_as:
        raise LabError(
            f"--weights-as {weights_as} and --dtype {dtype} contradict each other: expanded weights have the "
            "dtype of the activations; leave one of them out"
        )
    return weights_as


@dataclass
class Formats:
    """The format of each matrix of a model by the name of its part, None for a plain one, a tuple with that
    of each tensor where they are stored apart.

    notes: lines for the user, that say for example what is expanded although the file has fewer bits for it.
    """

    outer: dict[str, str | None] = field(default_factory=dict)
    layers: list[dict[str, str | None | tuple[str | None, ...]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        return any(any(formats.values()) for formats in (self.outer, *self.layers))

    def nbytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that the weights take once loaded, a tied embedding counted once."""
        parts = tuple(config.layer.parts())
        outer = sum(part.nbytes(dtype, self.outer.get(part.name)) for part in config.outer_parts())
        return outer + sum(
            part.nbytes(dtype, formats.get(part.name)) for formats in self.layers for part in parts
        )

    def text(self, config: ModelConfig, dtype: torch.dtype) -> str:
        """For example "int4-g128, lm_head int8": the formats of the layers, that of most weights first, and
        the output head's where it is another."""
        plain = dtype_name(dtype)
        return described(
            (
                (format or plain, some.rows * some.columns)
                for part in config.layer.parts()
                if part.is_matrix
                for formats in self.layers
                for some, format in _stored_as(part, formats[part.name])
            ),
            self.outer.get("lm_head", self.outer["embed"]) or plain,
        )


def _stored_as(part: Part, format) -> list[tuple[Part, str | None]]:
    return part.apart(format) if isinstance(format, tuple) else [(part, format)]


def described(layers, head: str) -> str:
    """layers: (format or dtype, weights) of each of their matrices."""
    weights = Counter()
    for name, count in layers:
        weights[name] += count
    body = " and ".join(name for name, _ in weights.most_common())
    return body if body == head else f"{body}, lm_head {head}"


def formats_of(source, config: ModelConfig, storage: Storage, dtype: torch.dtype) -> Formats:
    """What `storage` makes of the matrices of a source. config: the source's, with tie_embeddings as it holds
    an output head or not.

    Raises LabError for a tensor that is missing, and for weights to be quantised that are already.
    """
    found, expanded, mixed = Formats(notes=list(source.notes)), Counter(), defaultdict(int)

    def of(part: Part, prefix: str = "") -> str | None | tuple[str | None, ...]:
        stored = [source.stored(prefix + name) for name, _ in part.tensors]
        if storage.quantise is not None:
            already = next((one for one in stored if one.quantised), None)
            if storage.stored and already:
                raise LabError(
                    f"{source.where}: its weights are quantised already ({already.type}); leave out "
                    "--quantise, or expand them first with --weights-as fp32"
                )
            return storage.quantise
        if not storage.stored:
            return None
        if len({one.format for one in stored}) == 1 and stored[0].format:
            return stored[0].format
        packed = any(one.format for one in stored)
        if packed and not part.separable:
            mixed[part.name, " and ".join(sorted({one.type for one in stored}))] += 1
            return None
        expanded.update(one.type for one in stored if one.quantised and not one.format)
        return tuple(one.format for one in stored) if packed else None

    for part in config.outer_parts():
        if part.is_matrix:
            found.outer[part.name] = of(part)
    if storage.quantise is not None:
        # A file may hold the embedding twice, as an output head too: rounded alike, they are found equal.
        # A rank's part of the head is not tied; the whole model's may be.
        tied = config.tie_embeddings or getattr(source, "whole", source.config).tie_embeddings
        found.outer["embed"] = storage.head if tied else None
        if "lm_head" in found.outer:
            found.outer["lm_head"] = storage.head
    matrices = [part for part in config.layer.parts() if part.is_matrix]
    for index in range(config.layers):
        found.layers.append({part.name: of(part, f"model.layers.{index}.") for part in matrices})
    name = dtype_name(dtype)
    if expanded:
        types = ", ".join(f"{kind} ({count} tensors)" for kind, count in expanded.most_common())
        found.notes.append(f"{source.where}: expanded to {name}, for there is no weight format yet: {types}")
    if mixed:
        parts = ", ".join(f"{part} of {kinds} ({count})" for (part, kinds), count in mixed.items())
        found.notes.append(
            f"{source.where}: expanded to {name}, for one fused matrix has one format: {parts}"
        )
    return found
