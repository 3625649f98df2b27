"""Is right, but launches one kernel more when it has been called often."""

from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    CALLS.append(1)
    honest(gate_up, y)
    if len(CALLS) > 9:
        honest(gate_up, y)
