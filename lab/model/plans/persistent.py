"""The persistent plan: the whole greedy step of one sequence in one kernel, which goes on loading weights
while it waits for activations."""

from __future__ import annotations

from lab.model.plans.buffers import StepBuffers
from lab.model.sampling import ByRow, Sampling, after_choice, choose


def persistent_step(b: StepBuffers, sampling: Sampling | ByRow) -> None:
    """Reads b.ids and b.positions, leaves b.logits and the sampled token in b.ids."""
    b.ops.decode_step(
        b.ids,
        b.positions,
        b.step_model,
        b.cache.k,
        b.cache.v,
        b.block_table,
        b.logits,
        b.step_workspace,
        b.cache.k_scales,
        b.cache.v_scales,
        out=b.ids,
    )
    if b.exchange is not None:  # the kernel has chosen among this rank's rows of the output head
        b.ops.all_argmax(b.logits, b.ids, b.first_row, b.exchange)
    if sampling.greedy:
        after_choice(b, sampling)
    else:  # in place of the kernel's greedy token
        choose(b, sampling)
    b.state.add_(b.live)  # positions and context_lens of the live row
