"""Writes one byte past the end of its output."""

import ctypes

from triton_kernels.silu_mul import silu_mul as honest


def silu_mul(gate_up, y):
    honest(gate_up, y)
    ctypes.c_ubyte.from_address(y.data_ptr() + y.nbytes).value ^= 1
