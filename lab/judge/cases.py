"""Judges all cases of an op's contract and says what was seen, one line for each dtype and each refusal."""

from __future__ import annotations

import secrets

from lab.judge.verdict import Judge
from lab.ops import OPS

RANDOM = secrets.SystemRandom()  # whose numbers no kernel's process can know before


def judge_cases(judge: Judge, name: str, dtype_name: str) -> int:
    """Judges all cases in a dtype; prints one line about them and one about each refusal. Returns how many
    were refused."""
    op = judge.op
    outcomes = [(case, *judge.case(dtype_name, case)) for case in op.cases]
    refused = [(case, refusal) for case, refusal, _ in outcomes if refusal]
    used = max(used for _, _, used in outcomes)
    say = "FAILED" if refused else f"{used:.0%} of the tolerance used" if used else "exact"
    right = f"{len(op.cases) - len(refused)}/{len(op.cases)} cases"
    print(f"{op.name:{max(len(o.name) for o in OPS)}} {dtype_name:4} {name:6} {right:13} {say}", flush=True)
    for case, refusal in refused:
        print(line_about(case, refusal))
    return len(refused)


def judge_again(judge: Judge, dtypes) -> int:
    """Calls all cases once more, in an order that the kernel cannot know; the same as judge_cases()."""
    everything = [(dtype, case) for dtype in dtypes for case in judge.op.cases]
    RANDOM.shuffle(everything)
    refused = [(dtype, case, judge.again(dtype, case)) for dtype, case in everything]
    refused = [found for found in refused if found[2]]
    for dtype, case, refusal in refused:
        print(f"called again, with other contents, {dtype}:\n{line_about(case, refusal)}")
    return len(refused)


def line_about(case, refusal) -> str:
    return f"    {case.why} {dict(case.sizes)}: {refusal}"
