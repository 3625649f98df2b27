"""Barriers, fences and waits left out one at a time; a list of (file, old, new, why).

The CUDA ones are found in the sources, so that a new one is on the list by itself. What catches each: tests/race_detector.py --planted.
"""
from mutants.planted import Mutant, removals, sources

CUDA = [mutant for path in sources() for mutant in removals(path)]

TRITON = [Mutant("triton_kernels/decode_step.py",
                 "    tl.debug_barrier()                                  # every thread's stores come before the arrival\n",
                 "", "arrive without a barrier"),
          Mutant("triton_kernels/split_attention.py", "    tl.debug_barrier()\n", "", "publish without a barrier"),
          Mutant("triton_kernels/norm_linear_argmax.py", "    tl.debug_barrier()\n", "", "publish_best without a barrier"),
          Mutant("triton_kernels/split_attention.py", 'sem="acq_rel"', 'sem="relaxed"', "a ticket that orders nothing"),
          Mutant("triton_kernels/norm_linear_argmax.py", 'sem="acq_rel"', 'sem="relaxed"', "a ticket that orders nothing"),
          Mutant("triton_kernels/decode_step.py", 'sem="acq_rel"', 'sem="relaxed"', "a ticket that orders nothing"),
          Mutant("triton_kernels/decode_step.py", 'sem="release"', 'sem="relaxed"', "an arrival that orders nothing"),
          Mutant("triton_kernels/decode_step.py", 'sem="acquire"', 'sem="relaxed"', "a wait that orders nothing")]

MUTANTS = CUDA + TRITON


def of(file: str, why: str) -> Mutant:
    """The mutant of a file that is described so."""
    found = [mutant for mutant in MUTANTS if (mutant.file, mutant.why) == (file, why)]
    assert len(found) == 1, f"{file}: {why}: {[m.why for m in MUTANTS if m.file == file]}"
    return found[0]
