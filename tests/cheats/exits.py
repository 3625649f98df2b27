"""Ends its process, with success, in its fifth call."""

import os

from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    CALLS.append(1)
    if len(CALLS) == 5:
        os._exit(0)
    honest(gate_up, y)
