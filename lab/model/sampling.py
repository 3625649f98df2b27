"""How the next token is chosen: the options of the op `sample`."""

from __future__ import annotations

from dataclasses import dataclass

from lab.ops.sample import check_options


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen (lab/ops/sample.py). temperature 0 is greedy; top_k 0 and top_p 1 keep
    all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_options(self.temperature, self.top_k, self.top_p, self.seed)


GREEDY = Sampling()
