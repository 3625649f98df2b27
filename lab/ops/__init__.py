"""Every op by name. A name in one of the four lists is in checks, tests, benchmarks and reports."""
from importlib import import_module


def _ops(*names):
    """The contracts lab/ops/<name>.py."""
    return tuple(import_module(f"lab.ops.{name}").op for name in names)


# One op per textbook step, in the order a decode step runs them.
BASIC = _ops("embedding", "rmsnorm", "linear", "rope", "kv_append", "decode_attention", "silu_mul", "sample")
# What takes their place in the fused plan.
FUSED = _ops("norm_linear", "rope_append_attention", "linear_add", "norm_linear_silu_mul", "norm_linear_argmax")
# The persistent plan: all of a step in one launch.
PERSISTENT = _ops("decode_step")
# In no plan of the decoder: called by name, as select(...).<name>.
OTHERS = _ops()
OPS = BASIC + FUSED + PERSISTENT + OTHERS


def find(name: str):
    """The op called `name`; raises LabError with the list of ops for any other name."""
    from lab.names import known
    names = [op.name for op in OPS]
    return OPS[names.index(known(name, names, "op"))]
