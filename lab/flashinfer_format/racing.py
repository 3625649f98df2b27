"""Races a solution that was judged right: the race of `lab try`, at sizes of the definition, beside our
kernels of the op and the vendor's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lab.flashinfer_format.families import dtype_of, family_of
from lab.flashinfer_format.schema import Definition, Solution
from lab.harness.request import Request
from lab.harness.shapes import Point
from lab.judge import results
from lab.judge.race import RacedFile, RaceTimed
from lab.ops import find


def backend_name(solution: Solution) -> str:
    """What the records call a solution. The slash keeps it apart from the names of backends and peers."""
    return f"{solution.author}/{solution.name}"


def points_of(definition: Definition, batches, contexts) -> list[Point]:
    """The points of our op that are as large as the definition, at each batch and number of tokens."""
    sizes = definition.constants
    op = find(family_of(definition.name).op)
    if op.name == "linear":
        shape = {"n": sizes["N"], "k": sizes["K"]}
    elif op.name == "rmsnorm":
        shape = {"cols": sizes["hidden_size"]}
        shape |= {"residual": True} if "residual" in definition.inputs else {}
    else:
        names = {"q_heads": "num_qo_heads", "kv_heads": "num_kv_heads"}
        shape = {name: sizes[names.get(name, name)] for name in (*names, "head_dim", "page_size")}
    return [
        Point(op.name, None, batch, context, shape)
        for batch in batches
        for context in (contexts if op.has_context else (None,))
    ]


class RacedSolution(RacedFile):
    """A solution as a backend of the bench, which asks for sizes of our op `ours`. The same sizes in the
    definition's arguments are those of `op`."""

    def __init__(self, op, ours: str, worker):
        super().__init__(op, worker)
        setattr(self, ours, None)  # the bench asks which ops a backend has

    def timed(self, point: Point, dtype_name: str, rig, sets: int) -> RaceTimed:
        if point.context is None:
            case = {"batch": point.batch}
        else:
            case = {"lengths": (point.context,) * point.batch}
        point = dataclasses.replace(point, op=self.op.name, case=case)
        return RaceTimed(self.op, self.worker, point, dtype_name, rig, sets)


def race(solution: Solution, definition: Definition, op, worker, args, backends=None) -> int:
    """Races a solution that `worker` has loaded; returns the exit status.

    op: the definition's Op. args.batches, args.contexts: the sizes; args.out: the folder in which a folder of
    this solution gets the records and the report. backends: ours beside it; None: all that can run.
    """
    name, ours = backend_name(solution), family_of(definition.name).op
    request = Request(
        "ops",
        str(Path(args.out, re.sub(r"[^\w.-]+", "_", name))),
        ops=(ours,),
        dtypes=(dtype_of(definition),),
        backends=backends,
        points=tuple(points_of(definition, args.batches, args.contexts)),
        fresh=True,
    )
    status = results.race(name, RacedSolution(op, ours, worker), request)
    return results.draw(name, request.out) if status == 0 else 1
