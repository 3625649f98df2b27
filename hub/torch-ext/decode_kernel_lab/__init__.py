"""Kernels of LLM decoding in Triton: one function for each op, as rmsnorm(x, w, eps).

OPS lists them, and help() of a function says what it means, its shapes and dtypes. With out= a function
writes there and returns it. The device is that of the tensors. LEFT_OUT says which op is missing, and why.
"""

import inspect
import sys

import torch

from .lab.errors import LabError
from .lab.ops import OPS as _CONTRACTS
from .lab.torch_ops import LEFT_OUT, NAMESPACE, use

use("triton")
OPS = tuple(op.name for op in _CONTRACTS if op.name not in LEFT_OUT)


def _function(op):
    packet = getattr(getattr(torch.ops, NAMESPACE), op.name)

    def call(*args, out=None, **options):
        if out is None:
            return packet(*args, **options)
        packet.out(*args, out=out, **options)
        return out

    call.__name__ = call.__qualname__ = op.name
    call.__doc__ = sys.modules[op.validate.__module__].__doc__
    call.__signature__ = inspect.signature(op.validate)
    return call


globals().update({op.name: _function(op) for op in _CONTRACTS if op.name in OPS})

from . import layers  # noqa: E402  it uses the functions above

__all__ = ["LEFT_OUT", "LabError", "OPS", "layers", *OPS]
