"""`python tests/mutants/run.py --planted`: what notices that a barrier, a fence or a wait is missing?

    text   what is checked of the order in the text (order.py): fences that have no effect on a CPU, and all
           of Triton's, whose interpreter runs one program after another
    test   a test that plants the fault itself
    race   the host build of up to three kernels that have the fault, under ThreadSanitizer
           (race_detector.py): a race; or a wrong number, a deadlock or an error that the kernel does not have
           without the fault, built in the same way

Of those that cannot be noticed, or change nothing, synchronisation.py says why. What is neither noticed nor
explained is reported as UNJUDGED.
"""

import functools
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import race_detector

from mutants import planted, synchronisation
from mutants.mutant import Mutant, mutate
from mutants.order import missing_fences, unordered_arrivals

ROOT = Path(__file__).resolve().parents[2]


def by_text(mutant: Mutant) -> str | None:
    text = mutate((ROOT / mutant.file).read_text(), mutant)
    wrong = unordered_arrivals(text) if mutant.file.endswith(".py") else missing_fences(text)
    return f"text: {wrong[0]}" if wrong else None


def by_test(mutant: Mutant) -> str | None:
    words = synchronisation.TESTS.get((mutant.file, mutant.why))
    if words is None:
        return None
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *words], cwd=ROOT, capture_output=True)
    return f"test: {' '.join(words)}" if done.returncode == 0 else None


# The sanitizer keeps a few of the threads that accessed an address, so one schedule may show no race, and the
# next one does.
SEEDS = (1, 2, 3)


def raced(mutant: Mutant | None, kernel: str) -> tuple[int, str]:
    """(exit code, what was printed) of a kernel with a fault, or none, under the race detector: of the first
    schedule that shows one, or else of the last."""
    with tempfile.TemporaryDirectory(prefix="lab-planted-") as folder:
        extension = planted.build(mutant, kernel, Path(folder), race_detector.INSTRUMENTED)
        for seed in SEEDS:
            code, said = race_detector.run_inside(extension, [kernel], seed=seed)
            if code:
                break
        return code, said


@functools.cache
def succeeds(kernel: str) -> bool:
    """Without a fault. If it did not, it would call every fault noticed."""
    return raced(None, kernel)[0] == 0


def by_race(mutant: Mutant) -> str | None:
    if mutant.file.endswith(".py"):
        return None
    for kernel in planted.kernels_with(mutant)[:3]:
        code, said = raced(mutant, kernel)
        if "WARNING: ThreadSanitizer: data race" in said:
            return f"race in {kernel}: {race_detector.places(said)}"
        if code and succeeds(kernel):
            told = re.compile("WRONG|Error|deadlock|pdl_wait|not done")
            lines = [line for line in said.splitlines() if told.search(line)]
            return f"race: {kernel}: {(lines or said.splitlines() or ['died'])[-1][:150]}"
    return None


def judged(mutant: Mutant, ends: float) -> tuple[str, str]:
    """(what becomes of a planted fault, by what or why)."""
    if reason := synchronisation.REASONS.get((mutant.file, mutant.why)):
        return "explained", reason
    if by := by_text(mutant) or by_test(mutant):
        return "noticed", by
    if time.monotonic() > ends:
        return "not tried", "time is up"
    by = by_race(mutant)
    return ("noticed", by) if by else ("UNJUDGED", "")


def main(only: str, minutes: float, jobs: int) -> int:
    """Judges those whose file and description hold `only`. 0 if each is noticed or explained."""
    chosen = [m for m in synchronisation.MUTANTS if only in f"{m.file}: {m.why}"]
    if not chosen:
        print(f"mutants: error: nothing planted has {only!r} in its name", file=sys.stderr)
        return 2
    ends, counts = time.monotonic() + minutes * 60, Counter()
    race_detector.build()  # so that what is not planted is compiled once
    with ThreadPoolExecutor(jobs) as pool:  # each waits for compilers and kernels in processes of their own
        for mutant, (says, by) in zip(chosen, pool.map(lambda m: judged(m, ends), chosen)):
            counts[says] += 1
            print(f"{says:9} {mutant.file}: {mutant.why}  {by}", flush=True)
    print(", ".join(f"{n} {says}" for says, n in counts.most_common()))
    return 1 if counts["UNJUDGED"] or counts["not tried"] else 0
