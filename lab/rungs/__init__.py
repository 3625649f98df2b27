"""The ladders: what each rung changes, what it should gain, where it is absent. No import of torch.

A ladder goes from a naive kernel to the op's own kernel; each rung adds one idea. A rung is a kernel in
cuda_src/ladder/<name>.cu and triton_kernels/ladder/<name>.py; the last one, called Product, is the op's own
kernel. A ladder is called like its op, or has a name of its own: quantised_linear is linear with packed
weights. What a rung should gain is argued for one H100: 132 multiprocessors (SMs), 3.35 TB/s, and a DRAM
latency of about 600 ns, so about 2 MB must be in flight to keep the memory busy.

A ladder is one file here and its name in NAMES. lab/ladder.py runs the rungs.
"""

from __future__ import annotations

from importlib import import_module

from lab.errors import LabError
from lab.rungs.rung import Ladder, Rung

BACKENDS = ("cuda", "triton")  # the languages that ladders are written in
NAMES = ("linear", "quantised_linear", "rmsnorm", "decode_attention")
LADDERS: dict[str, Ladder] = {name: import_module(f"lab.rungs.{name}").LADDER for name in NAMES}
RUNGS = tuple(rung for ladder in LADDERS.values() for rung in ladder.rungs)


def ladder_of(name: str) -> Ladder:
    """The ladder of a name; raises LabError for an op that has none."""
    if name not in LADDERS:
        raise LabError(f"{name} has no ladder: choose from {', '.join(NAMES)}")
    return LADDERS[name]


def rungs(name: str) -> tuple[Rung, ...]:
    """The rungs of a ladder, the lowest first; raises LabError for an op without a ladder."""
    return ladder_of(name).rungs


def name_of(op: str, format: str | None) -> str:
    """The name of the ladder of an op with weights of a format, by which a record's rungs find theirs; op
    itself, if there is none."""
    return next((name for name, one in LADDERS.items() if (one.op, one.format) == (op, format)), op)
