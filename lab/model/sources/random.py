"""Weights of any shape from a seed."""

from __future__ import annotations

import math
import zlib

import torch

from lab.model.description import ModelConfig
from lab.model.sources.store import Stored


class RandomSource:
    """Weights of any shape from a seed, generated on the device (a CPU and a GPU give different values).

    Each tensor has a generator of its own, seeded by the tensor's name, so layers differ. Matrices are
    drawn from N(0, 1/columns); the two of a layer that add to the residual stream are divided by sqrt(2 *
    layers), which keeps activations near 1 at any depth.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.name, self.config, self.seed = config.name, config, seed
        self.where, self.notes = f"model {self.name}", ()

    def holds(self, name: str) -> bool:
        return not (self.config.tie_embeddings and name == "lm_head.weight")

    def stored(self, name: str) -> Stored:
        return Stored("random numbers")

    def fill(self, name: str, out: torch.Tensor) -> None:
        seed = zlib.crc32(f"{self.seed} {name}".encode())  # 32 bits: all that torch's CPU generator takes
        generator = torch.Generator(out.device).manual_seed(seed)
        if "norm" in name:
            out.normal_(1.0, 0.1, generator=generator)
        elif name.endswith("bias"):
            out.normal_(0.0, 0.1, generator=generator)
        else:
            adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 1 / math.sqrt(2 * self.config.layers) if adds_to_residual else 1.0
            out.normal_(0.0, scale / math.sqrt(out.shape[1]), generator=generator)

    def unread(self) -> list[str]:
        return []

    def tokenizer(self):
        return None
