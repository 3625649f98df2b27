"""Which sizes of every op to measure: the ops of one decode step of the model presets, in one place.

A new op gets a line in `uses` (and in COLD and DIRECTION where the defaults do not fit); until then it is measured at
the cases of its own contract.
"""
from dataclasses import dataclass, field, replace

import torch

from lab.contract import DTYPES
from lab.model.config import PRESETS
from lab.model.plans import PLANS
from lab.names import known
from lab.ops import OPS, PERSISTENT
from lab.ops.decode_attention import Workspace, choose_splits
from lab.records import schema

MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
PAGE_SIZE = 16
MOST_TOKENS = 1 << 19           # batch * context of an attention point: two sets of an 8B layer's KV are then 4 GiB
# What a model reads from DRAM when it runs the op, by argument position: weights and the KV cache. Everything else is
# an activation that the kernel before has just written. Ops that are not named here work on activations alone.
COLD = {"embedding": (1,), "linear": (1, 2), "kv_append": (2, 3), "decode_attention": (1, 2),
        "norm_linear": (3, 4), "rope_append_attention": (8, 9), "linear_add": (1, 3), "norm_linear_silu_mul": (3,),
        "norm_linear_argmax": (3,), "decode_step": (2, 3, 4)}
ATTENTION = ("decode_attention", "rope_append_attention")       # the ops that have a context
STEPS = tuple(op.name for op in PERSISTENT)                     # a whole step each: measured as a token, by model_bench
# The stream an op is held to; ops that are not named here mostly read.
DIRECTION = {"embedding": "copy", "rmsnorm": "copy", "rope": "copy", "kv_append": "copy", "silu_mul": "copy"}


@dataclass(frozen=True)
class Point:
    """One op at one size. `shape` is what a record says of it beside op, batch and context; its values are JSON."""
    op: str
    role: str | None
    batch: int
    context: int | None
    shape: dict = field(hash=False)
    models: tuple = ()
    case: dict | None = field(default=None, hash=False)     # the contract's own sizes, for an op that `uses` lacks

    @property
    def identity(self):
        return self.op, self.batch, self.context, schema.freeze(self.shape)


def preset(name):
    """The configuration of a preset; raises LabError for an unknown name."""
    return PRESETS[known(name, list(PRESETS), "model")]


def uses(c, plan="basic"):
    """(op, role, shape) of every distinct use in one decode step of model config c."""
    if plan == "persistent":
        yield "decode_step", None, {"layers": c.layers, "hidden": c.hidden, "vocab": c.vocab}
        return
    heads = {"q_heads": c.q_heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
    yield "embedding", None, {"vocab": c.vocab, "hidden": c.hidden}
    if plan == "fused":
        yield "norm_linear", "qkv", {"n": c.q_width + 2 * c.kv_width, "k": c.hidden}
        yield "rope_append_attention", None, heads | {"page_size": PAGE_SIZE, "qk_norm": c.qk_norm}
        yield "linear_add", "o", {"n": c.hidden, "k": c.q_width}
        yield "norm_linear_silu_mul", "gate_up", {"n": c.intermediate, "k": c.hidden}
        yield "linear_add", "down", {"n": c.hidden, "k": c.intermediate}
        yield "norm_linear_argmax", "lm_head", {"n": c.vocab, "k": c.hidden}
        return
    yield "rmsnorm", "hidden", {"cols": c.hidden, "residual": True}
    if c.qk_norm:
        yield "rmsnorm", "q_head", {"cols": c.head_dim, "groups": c.q_heads}
        yield "rmsnorm", "k_head", {"cols": c.head_dim, "groups": c.kv_heads}
    yield "linear", "qkv", {"n": c.q_width + 2 * c.kv_width, "k": c.hidden}
    yield "linear", "o", {"n": c.hidden, "k": c.q_width}
    yield "linear", "gate_up", {"n": 2 * c.intermediate, "k": c.hidden}
    yield "linear", "down", {"n": c.hidden, "k": c.intermediate}
    yield "linear", "lm_head", {"n": c.vocab, "k": c.hidden, "out_dtype": "fp32"}
    yield "rope", None, heads
    yield "kv_append", None, heads | {"page_size": PAGE_SIZE}
    yield "decode_attention", None, heads | {"page_size": PAGE_SIZE}
    yield "silu_mul", None, {"cols": c.intermediate}
    yield "sample", "greedy", {"vocab": c.vocab}


def points(models=MODELS, batches=(1,), contexts=(1024,), ops=None):
    """Every distinct point of the models, in the order of OPS; equal shapes of two models are one point of both.

    A whole step is no point: at sizes of its own it would be a model that nobody has.
    """
    found = {}
    for name in models:
        config = preset(name)
        for op, role, shape in (use for plan in PLANS for use in uses(config, plan)):
            if op in STEPS or ops is not None and op not in ops:
                continue
            for batch in batches:
                for context in contexts if op in ATTENTION else (None,):
                    if context and (context > config.max_positions or batch * context > MOST_TOKENS):
                        continue
                    point = Point(op, role, batch, context, shape, (name,))
                    same = found.setdefault(point.identity, point)
                    if name not in same.models:
                        found[point.identity] = replace(same, models=(*same.models, name))
    covered = {op for plan in PLANS for op, _, _ in uses(preset(models[0]), plan)}
    for op in OPS:
        if op.name not in covered and (ops is None or op.name in ops):
            for case in op.cases:
                sizes = {k: v for k, v in case.sizes.items() if k not in ("batch", "rows")}
                batch = case.sizes.get("batch", case.sizes.get("rows", 1))
                shape = {k: plain(v) for k, v in sizes.items()}
                point = Point(op.name, None, batch, None, shape, case=dict(case.sizes))
                found[point.identity] = point
    order = {op.name: i for i, op in enumerate(OPS)}
    return sorted(found.values(), key=lambda p: order[p.op])


def plain(value):
    """A contract's size as JSON: dtypes by name, tuples as lists."""
    if isinstance(value, torch.dtype):
        return next(name for name, dtype in DTYPES.items() if dtype == value)
    return list(value) if isinstance(value, tuple) else value


def arguments(op, point, rand, multiprocessors):
    """(args, config): the op's random arguments at a point, and the launch configuration that was chosen for them."""
    shape, batch = dict(point.shape), point.batch
    if point.case is not None:
        return op.inputs(rand, **point.case), {}
    if op.name in ("rmsnorm", "silu_mul"):
        return op.inputs(rand, rows=batch, **shape), {}
    if op.name == "kv_append":      # the last slot of a page; the rest of a long cache would only take memory
        return op.inputs(rand, positions=(PAGE_SIZE - 1,) * batch, **shape), {}
    if op.name in ATTENTION:
        splits = choose_splits(batch, shape["kv_heads"], point.context, multiprocessors)
        sizes = ({"lengths": (point.context,) * batch} if op.name == "decode_attention" else
                 {"positions": (point.context - 1,) * batch})
        args = op.inputs(rand, splits=splits, **sizes, **shape)
        workspace = Workspace.empty(batch, shape["q_heads"], shape["kv_heads"], shape["head_dim"], splits, rand.device)
        return (*args, workspace), {"splits": splits}
    if "out_dtype" in shape:
        shape["out_dtype"] = DTYPES[shape["out_dtype"]]
    return op.inputs(rand, batch=batch, **shape), {}


def key_shape(point):
    """What a point's settings are looked up by, beside the number of rows."""
    names = ("n", "k") if "n" in point.shape else ("q_heads", "kv_heads", "head_dim", "page_size")
    return {name: point.shape[name] for name in names}
