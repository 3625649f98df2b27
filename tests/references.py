"""References that are computed once for arguments that hold the same bits: all backends are given the same
ones, and a reference in float64 often takes longer than the kernel."""

import dataclasses

import pytest
import torch

from lab.check import same_bits
from lab.ops import decode_step

KEPT = 4  # of the last results: of two calls of a case, and of their inputs without NaN, for the tolerance
_seen = []  # (function, its arguments, its result)


def same(a, b) -> bool:
    """Whether two arguments are equal, bit for bit; of a model's table of addresses only what lies there."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.device == b.device and same_bits(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        names = {field.name for field in dataclasses.fields(a)} - (
            {"table"} if hasattr(a, "readdress") else set()
        )
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    return a == b


def remembered(function):
    def call(*args, **named):
        args = [*args, *named.values()]
        for known, given, result in _seen:
            if known is function and same(given, args):
                return result
        result = function(*args)
        _seen.insert(0, (function, args, result))
        del _seen[KEPT:]
        return result

    return call


def with_remembered_reference(op):
    return dataclasses.replace(op, reference=remembered(op.reference))


@pytest.fixture
def decode_step_is_remembered(monkeypatch):
    """Where decode_step's tolerance() and verify() call its reference, too."""
    monkeypatch.setattr(decode_step, "reference", _DECODE_STEP)


_DECODE_STEP = remembered(decode_step.reference)
