"""The persistent plan: the whole greedy step of one sequence in one kernel, which never lets the stream of weights stop."""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.model.decoder import Decoder, Sampling


def persistent_step(d: Decoder, sampling: Sampling) -> None:
    """Reads d.ids and d.positions, leaves d.logits and the sampled token in d.ids."""
    d.ops.decode_step(d.ids, d.positions, d.step_model, d.cache.k, d.cache.v, d.cache.block_table, d.logits,
                      d.step_workspace, out=d.ids)
    if sampling.temperature > 0:                                            # in place of the kernel's greedy token
        d.ops.sample(d.logits, d.positions, sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed,
                     out=d.ids)
    d.state.add_(d.live)                                                    # positions and context_lens of the live row
