"""Layers for kernels.kernelize: each gives its forward to a layer of a model that has the same attributes."""

import torch

from . import rmsnorm, silu_mul


class RMSNorm(torch.nn.Module):
    """For layers like Hugging Face's LlamaRMSNorm."""

    can_torch_compile = True
    has_backward = False
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rmsnorm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)


class SiluAndMul(torch.nn.Module):
    """silu(gate) * up of a last dimension that holds the gate, then up."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return silu_mul(rows).view(*x.shape[:-1], x.shape[-1] // 2)
