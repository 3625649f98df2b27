"""Barriers, fences and waits left out one at a time; a list of (file, old, new, why).

The CUDA ones are found in the sources, so that a new one is on the list by itself. What notices each is asked
by `python tests/mutants/run.py --planted` (notice.py). REASONS explains those that nothing need notice, or
that nothing on a CPU can.
"""

from mutants.planted import Mutant, removals, sources

CUDA = [mutant for path in sources() for mutant in removals(path)]
CUDA += [
    Mutant(
        "cuda_src/common.cuh", "__ATOMIC_ACQ_REL", f"__ATOMIC_{left}", f"take_ticket: {left.lower()} alone"
    )
    for left in ("RELAXED", "ACQUIRE", "RELEASE")
]

ARRIVALS = {
    "core/step_product": "tl.debug_barrier()  # every thread's stores come before the arrival",
    "core/split_attention": "tl.debug_barrier()",
    "norm_linear_argmax": "tl.debug_barrier()",
}
NO_ORDER = [
    ("decode_step", "acq_rel"),
    ("core/step_product", "release"),
    ("core/step_product", "acquire"),
    ("core/split_attention", "acq_rel"),
    ("norm_linear_argmax", "acq_rel"),
]
TRITON = [
    Mutant(f"triton_kernels/{name}.py", barrier, "pass", "an arrival without a barrier")
    for name, barrier in ARRIVALS.items()
]
TRITON += [
    Mutant(f"triton_kernels/{name}.py", f'sem="{order}"', 'sem="relaxed"', f"an atomic without {order}")
    for name, order in NO_ORDER
]

MUTANTS = CUDA + TRITON

# (file, description) of what a test plants by itself: the words for pytest.
TESTS = {
    ("cuda_src/common.cuh", f"take_ticket: {left} alone"): (
        "tests/test_host.py",
        "-k",
        f"fence and {left.upper()}",
    )
    for left in ("relaxed", "acquire", "release")
}

COPIES_LANDED = (
    "every copy that is not empty has landed: the last round of the loop before has waited for it, and what "
    "was issued since are empty groups"
)
AFTER_THE_KERNEL_BEFORE = (
    "it is launched after the kernel before it has ended (tests/test_synchronisation.py); the wait is for "
    "whoever launches it otherwise"
)
# (file, description): why nothing notices it, and nothing need.
REASONS = {
    ("cuda_src/core/mma_rows.cuh", "reduce: without cp_async_wait"): COPIES_LANDED,
    ("cuda_src/core/mma_attention.cuh", "publish: without cp_async_wait"): COPIES_LANDED,
    ("cuda_src/core/packed_wgmma.cuh", "copy_x: without __syncwarp"): (
        "it orders nothing that is shared; after one lane has copied, all go on together, as wgmma wants them"
    ),
    ("cuda_src/core/step_attention.cuh", "add_tokens: without __syncwarp"): (
        "it orders nothing that is shared; for time it keeps nvcc from loading V only after the scores"
    ),
    ("cuda_src/kv_append.cu", "kv_append_kernel: without pdl_wait"): AFTER_THE_KERNEL_BEFORE,
    ("cuda_src/kv_append.cu", "kv_append_codes_kernel: without pdl_wait"): AFTER_THE_KERNEL_BEFORE,
    ("cuda_src/rope.cu", "load_floats: without pdl_wait"): AFTER_THE_KERNEL_BEFORE,
    ("cuda_src/silu_mul.cu", "silu_mul_kernel: without pdl_wait"): AFTER_THE_KERNEL_BEFORE,
}


def of(file: str, why: str) -> Mutant:
    """The mutant of a file that is described so."""
    found = [mutant for mutant in MUTANTS if (mutant.file, mutant.why) == (file, why)]
    assert len(found) == 1, f"{file}: {why}: {[m.why for m in MUTANTS if m.file == file]}"
    return found[0]
