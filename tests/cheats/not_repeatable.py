"""Changes the last bit of the first element in every other call."""

import torch

from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    honest(gate_up, y)
    CALLS.append(1)
    if y.dtype == torch.float32:
        y.view(torch.int32)[0, 0] ^= len(CALLS) & 1
