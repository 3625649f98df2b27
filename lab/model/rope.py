"""Rotary position embedding: inverse frequencies, their scalings, and the cos/sin table the kernels read.

Pair i of a head (elements i and i + head_dim/2) turns by position * inv_freq[i], inv_freq[i] =
theta^(-2i/head_dim) (Su et al., RoFormer, 2021). Every scaling here divides inv_freq[i] by some divisor[i].
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): every frequency divided by `factor`."""

    factor: float

    def divisors(self, inv_freq: torch.Tensor) -> torch.Tensor:
        return torch.full_like(inv_freq, self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between
    interpolated.

    With wavelength w = 2 pi / inv_freq and s = (original/w - low) / (high - low) clamped to [0, 1],
    the scaled frequency is inv_freq * (s + (1 - s) / factor).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def divisors(self, inv_freq: torch.Tensor) -> torch.Tensor:
        turns = self.original_context * inv_freq / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return 1 / (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class DivisorScaling:
    """Divisors given one by one, as a GGUF file stores them in `rope_freqs.weight` (head_dim/2 values)."""

    values: tuple[float, ...]

    def divisors(self, inv_freq: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.values, dtype=inv_freq.dtype)


Scaling = LinearScaling | Llama3Scaling | DivisorScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> torch.Tensor:
    """float64 [head_dim/2], radians per position."""
    inv_freq = float(theta) ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return inv_freq if scaling is None else inv_freq / scaling.divisors(inv_freq)


def cos_sin_table(
    head_dim: int, theta: float, scaling: Scaling | None, positions: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """float32 [positions, head_dim]: cos in the first half of a row, sin in the second.

    Angles are computed in float64: in float32, position 100,000 times a frequency near 1 is off by up to 4e-3
    radians.
    """
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float64), inverse_frequencies(head_dim, theta, scaling)
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)
