"""The Triton kernels: compiled for tensors on a GPU, interpreted for tensors on the CPU."""

from importlib.metadata import version

import torch

from lab.errors import Unavailable


class Backend:
    name = "triton"

    def __init__(self, device: torch.device):
        try:
            from triton_kernels import common
        except ImportError as error:
            raise Unavailable(f"backend triton: {error}; install it with `pip install triton`") from None
        from triton_kernels import settings

        self.set_trace, self.take_trace = common.set_trace, common.take_trace
        self.forced, self.use, self.forget = settings.forced, settings.use, settings.forget
        self.compiler = version("triton")

    def launcher(self, op):
        return op.launchers[self.name]
