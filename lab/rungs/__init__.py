"""The ladders: what each rung changes, what it should gain, where it is absent. No import of torch.

A ladder goes from a naive kernel to the op's own kernel; each rung adds one idea. A rung is a kernel in
cuda_src/ladder/<op>.cu and triton_kernels/ladder/<op>.py; the last one, called Product, is the op's own
kernel. What a rung should gain is argued for one H100: 132 multiprocessors (SMs), 3.35 TB/s, and a DRAM
latency of about 600 ns, so about 2 MB must be in flight to keep the memory busy.

A ladder is one file here and its name in OPS. lab/ladder.py runs the rungs.
"""

from __future__ import annotations

from importlib import import_module

from lab.errors import LabError
from lab.rungs.rung import Ladder, Rung

BACKENDS = ("cuda", "triton")  # the languages that ladders are written in
OPS = ("linear", "rmsnorm", "decode_attention")
LADDERS: dict[str, Ladder] = {op: import_module(f"lab.rungs.{op}").LADDER for op in OPS}
RUNGS = tuple(rung for ladder in LADDERS.values() for rung in ladder.rungs)


def ladder_of(op: str) -> Ladder:
    """The ladder of an op; raises LabError for an op that has none."""
    if op not in LADDERS:
        raise LabError(f"{op} has no ladder: choose from {', '.join(OPS)}")
    return LADDERS[op]


def rungs(op: str) -> tuple[Rung, ...]:
    """The rungs of an op, the lowest first; raises LabError for an op without a ladder."""
    return ladder_of(op).rungs
