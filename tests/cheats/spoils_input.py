"""Leaves a zero in its input."""

from triton_kernels.silu_mul import silu_mul as honest


def silu_mul(gate_up, y):
    honest(gate_up, y)
    gate_up[0, 0] = 0
