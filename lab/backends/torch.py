"""Torch's own kernels (on a GPU those of cuBLAS, SDPA ...): the reference, and the vendor's side of a
comparison.

Torch picks its device kernels itself, so the trace names the op's function in torch, not a device kernel.
"""

import torch


class Backend:
    name = "torch"

    def __init__(self, device: torch.device):
        self.tracing, self.launched = False, []
        # The contracts ask for float32 accumulation: without this cuBLAS may add the parts of a split k in
        # half precision.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def launcher(self, op):
        launch, label = op.launchers[self.name], f"torch:{op.name}"

        def run(*args, **options):
            launch(*args, **options)
            if self.tracing:
                self.launched.append(label)

        return run

    def set_trace(self, on: bool) -> None:
        self.tracing = on

    def take_trace(self) -> list[str]:
        names, self.launched = self.launched, []
        return names
