"""Which sizes of every op to measure: those that one decode step of the model presets asks of it.

A contract says where models use the op (Op.uses); an op that no model uses is measured at the cases of its
contract.
"""

import inspect
import itertools
from dataclasses import dataclass, field, replace

import torch

from lab.contract import dtype_name
from lab.model.families import PRESETS
from lab.names import known
from lab.ops import OPS, find
from lab.records import schema

MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
MOST_TOKENS = 1 << 19  # batch * context of an attention point: two sets of an 8B layer's KV are then 4 GiB


@dataclass(frozen=True)
class Point:
    """One op at one size. `shape` is what a record says of it beside op, batch and context; its values are
    JSON."""

    op: str
    role: str | None
    batch: int
    context: int | None
    shape: dict = field(hash=False)
    models: tuple = ()
    case: dict | None = field(
        default=None, hash=False
    )  # the contract's own sizes, for an op that no model uses
    format: str | None = None  # of the weights; None: plain

    @property
    def identity(self):
        return self.op, self.batch, self.context, schema.freeze(self.shape), self.format


def preset(name):
    """The configuration of a preset; raises LabError for an unknown name."""
    return PRESETS[known(name, list(PRESETS), "model")]


def uses(config, plan="basic"):
    """(op, role, sizes) of every distinct use in one decode step of a model under a plan, in the order of
    OPS."""
    for op in OPS:
        if plan in op.plans:
            yield from ((op.name, role, sizes) for role, sizes in op.uses(config))


def points(models=MODELS, batches=(1,), contexts=(1024,), ops=None, kv_dtype=None):
    """Every distinct point of the models, in the order of OPS; equal shapes of two models are one point of
    both. kv_dtype: the format of the KV cache, of ops that have one.

    A whole step is no point: at sizes of its own it would be a model that nobody has. Nor is what ranks pass
    to each other.
    """
    found = {}
    alone = [op for op in OPS if not op.whole_step and not op.between_ranks]
    chosen = [op for op in alone if ops is None or op.name in ops]
    for name, op in itertools.product(models, chosen):
        for role, sizes in op.uses(preset(name)) if op.uses else ():
            if kv_dtype is not None and takes_kv_dtype(op):
                sizes = {**sizes, "kv_dtype": kv_dtype}
            for batch, context in itertools.product(batches, contexts if op.has_context else (None,)):
                if context and (context > preset(name).max_positions or batch * context > MOST_TOKENS):
                    continue
                point = Point(op.name, role, batch, context, sizes, (name,))
                same = found.setdefault(point.identity, point)
                if name not in same.models:
                    found[point.identity] = replace(same, models=(*same.models, name))
    for op in chosen:
        for case in () if op.uses else op.cases:
            sizes = {k: v for k, v in case.sizes.items() if k not in ("batch", "rows")}
            batch = case.sizes.get("batch", case.sizes.get("rows", 1))
            shape = {k: plain(v) for k, v in sizes.items()}
            point = Point(op.name, None, batch, None, shape, case=dict(case.sizes))
            found[point.identity] = point
    order = {op.name: i for i, op in enumerate(OPS)}
    return sorted(found.values(), key=lambda p: order[p.op])


def in_formats(points, formats):
    """The points of the ops that take packed weights, once with weights of each format (None: plain)."""
    return [
        replace(point, format=format)
        for point in points
        if find(point.op).takes_formats and point.case is None
        for format in formats
    ]


def takes_kv_dtype(op):
    """Whether an op's KV cache may be quantised."""
    return "kv_dtype" in inspect.signature(op.inputs).parameters


def plain(value):
    """A contract's size as JSON: dtypes by name, tuples as lists."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return list(value) if isinstance(value, tuple) else value


def arguments(op, point, rand, multiprocessors):
    """(args, config): the op's random arguments at a point, and the launch configuration that was chosen for
    them."""
    if point.case is not None:
        return op.inputs(rand, **point.case), {}
    sizes, config = op.sizes_at(point.shape, point.batch, point.context, multiprocessors)
    if point.format is not None:
        sizes["format"] = point.format
    return op.with_workspace(*op.inputs(rand, **sizes)), config


def key_shape(point):
    """What a point's settings are looked up by, beside the number of rows."""
    return {name: point.shape[name] for name in find(point.op).tuned_by}
