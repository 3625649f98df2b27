"""Decode plans: how the step of one token is cut into kernels. A plan is one function in a file of its own.

It is called as step(buffers, sampling): it reads buffers.ids and buffers.positions, and leaves the logits in
buffers.logits and the sampled token in buffers.ids.
"""

from __future__ import annotations

import torch

from lab.contract import DTYPES
from lab.errors import LabError
from lab.model.plans.basic import basic_step
from lab.model.plans.fused import fused_step
from lab.model.plans.persistent import persistent_step
from lab.names import known

PLANS = {"basic": basic_step, "fused": fused_step, "persistent": persistent_step}


def refusal(plan: str, batch: int, dtype: torch.dtype) -> str | None:
    """Why a plan does not decode a batch of this size, or a model of this dtype; None where it does."""
    from lab.ops.decode_step import op

    if plan != "persistent":
        return None
    if batch != 1:
        return f"plan persistent decodes one sequence, not a batch of {batch}: use --batch 1, or --plan fused"
    if dtype not in op.dtypes:
        names = " or ".join(name for name, one in DTYPES.items() if one in op.dtypes)
        return f"plan persistent takes models in {names} alone: use --dtype bf16, or --plan fused"
    return None


def find_plan(name: str, batch: int, dtype: torch.dtype):
    """The plan's step. Raises LabError for an unknown plan and for one that takes no such batch or dtype."""
    known(name, tuple(PLANS), "plan")
    if why := refusal(name, batch, dtype):
        raise LabError(why)
    return PLANS[name]
