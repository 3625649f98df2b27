"""Writes the first half of the output, when it has been called a few times."""

from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    CALLS.append(1)
    rows = y.shape[0]
    if len(CALLS) > 2 and rows > 1:
        honest(gate_up[: rows // 2], y[: rows // 2])
    else:
        honest(gate_up, y)
