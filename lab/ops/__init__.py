"""Every op. Adding one to its plan's list adds it to checks, benchmarks and reports."""
from lab.ops import (decode_attention, embedding, kv_append, linear, linear_add, norm_linear, norm_linear_argmax,
                     norm_linear_silu_mul, rmsnorm, rope, rope_append_attention, sample, silu_mul)

# One op per textbook step, in the order a decode step runs them.
BASIC = (embedding.op, rmsnorm.op, linear.op, rope.op, kv_append.op, decode_attention.op, silu_mul.op, sample.op)
# What takes their place in the fused plan.
FUSED = (norm_linear.op, rope_append_attention.op, linear_add.op, norm_linear_silu_mul.op, norm_linear_argmax.op)
OPS = BASIC + FUSED


def find(name: str):
    """The op called `name`; raises LabError with the list of ops for any other name."""
    from lab.dispatch import known
    names = [op.name for op in OPS]
    return OPS[names.index(known(name, names, "op"))]
