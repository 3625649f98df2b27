"""The persistent plan: the whole greedy step of one sequence in one kernel, which goes on loading weights
while it waits for activations."""

from __future__ import annotations

from lab.model.plans.buffers import StepBuffers
from lab.model.sampling import Sampling


def persistent_step(b: StepBuffers, sampling: Sampling) -> None:
    """Reads b.ids and b.positions, leaves b.logits and the sampled token in b.ids."""
    b.ops.decode_step(
        b.ids,
        b.positions,
        b.step_model,
        b.cache.k,
        b.cache.v,
        b.cache.block_table,
        b.logits,
        b.step_workspace,
        out=b.ids,
    )
    if sampling.temperature > 0:  # in place of the kernel's greedy token
        b.ops.sample(
            b.logits,
            b.positions,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.seed,
            out=b.ids,
        )
    b.state.add_(b.live)  # positions and context_lens of the live row
