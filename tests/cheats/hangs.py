"""Never comes back from its fifth call."""

from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    CALLS.append(1)
    while len(CALLS) == 5:
        pass
    honest(gate_up, y)
