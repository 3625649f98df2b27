"""The peer of our exchange within a decode step: the same kernels under the same plan, whose sums over ranks
are made by torch.distributed's all_reduce. That is NCCL on GPUs, where a step's graph holds its calls, and
gloo on a CPU.

It is all_reduce_add on the torch backend, so the model knows nothing of it. The argmax over the vocabulary,
one call a token, stays ours, as does every other kernel.
"""

from lab.dispatch import Ops, Trace, environment_overrides, parse_overrides, select
from lab.harness.request import Settings
from lab.ops.all_reduce_add import op

LIBRARIES = {"cuda": "nccl", "cpu": "gloo"}
PLAN = "fused"
MARK = "+"  # between a backend and the library: cuda+nccl


def sides(settings: Settings) -> list[tuple[str, str]]:
    """(backend as rows name it, plan) of all that is measured: each peer follows its backend. Backend torch
    has the library's sums anyway, and --no-vendor leaves the peers out."""
    found = []
    for backend in settings.backends:
        for plan in settings.plans:
            found.append((backend, plan))
            if plan == PLAN and backend != "torch" and settings.vendor:
                found.append((backend + MARK + LIBRARIES[settings.device], plan))
    return found


def select_side(name: str, device: str, trace: Trace | None = None) -> Ops:
    """The ops of a backend as sides() names it."""
    backend, with_library, _ = name.partition(MARK)
    overrides = parse_overrides(environment_overrides()) | ({op.name: "torch"} if with_library else {})
    return select(backend, device, overrides, trace)


def note_of(name: str) -> str | None:
    """What a row says of a peer."""
    backend, _, library = name.partition(MARK)
    return (
        f"{backend}'s kernels, sums over ranks by torch.distributed's all_reduce ({library})"
        if library
        else None
    )
