"""`lab check --ladder`: every rung of the ladders against the reference of its op."""

from __future__ import annotations

from lab.check import check_case
from lab.contract import DTYPES, Case, Rand, with_dtypes
from lab.errors import LabError
from lab.ladder import bind
from lab.ops import find
from lab.rungs import Rung, ladder_of


def cases_of(name: str) -> list[Case]:
    """Those of a ladder."""
    ladder = ladder_of(name)
    more = dict(format=ladder.format) if ladder.format else {}
    return [Case(why, with_dtypes({**sizes, **more})) for why, sizes in ladder.cases]


def check(names, functions, dtypes, device, seed, quick=False) -> int:
    """`lab check --ladder`: every rung against the op's reference; returns the number of failed cases.

    quick: the first two cases alone.
    functions: for each of BACKENDS that this machine can run, what gives the function of a rung's name, as
    "linear 3" (lab.worker.Worker.function). A case that a rung says it does not take must be refused.
    """
    failed = ran = 0
    for name in names:
        cases = cases_of(name)[: 2 if quick else None]
        for rung in ladder_of(name).rungs:
            needs = f"; needs {rung.needs}" if rung.needs else ""
            print(f"{name} {rung.title}: {rung.idea}\n    should gain: {rung.gain}{needs}")
            for backend in functions:
                if backend in rung.absent:
                    print(f"    {backend:6} absent: {rung.absent[backend]}")
                    continue
                function, here, said = (
                    functions[backend](f"{name} {rung.number}"),
                    bind(rung, backend, device),
                    "",
                )
                for dtype in dtypes:
                    taken = [c for c in cases if takes(rung, c, device, dtype, seed)]
                    for c in cases:
                        if c not in taken:
                            require_refusal(
                                here, find(rung.op).inputs(Rand(device, DTYPES[dtype], seed), **c.sizes)
                            )
                    wrong = wrong_cases(rung.op, function, taken, dtype, seed)
                    ran, failed, refused = ran + len(taken), failed + len(wrong), len(cases) - len(taken)
                    said += "".join(f"\n        {line}" for line in wrong)
                    said += f" {dtype} {len(taken) - len(wrong)}/{len(taken)}"
                    said += f" ({refused} refused)" if refused else ""
                print(f"    {backend:6}{said}", flush=True)
    print(f"{ran} cases of rungs on {device}, {failed} failed")
    return failed


def takes(rung: Rung, case: Case, device: str, dtype: str, seed: int) -> bool:
    op = find(rung.op)
    return rung.takes(op.bound(*op.inputs(Rand(device, DTYPES[dtype], seed), **case.sizes)))


def wrong_cases(op: str, function, cases, dtype: str, seed: int) -> list[str]:
    """A line for each case in which the function of a rung does not agree with the reference."""
    found = []
    for c in cases:
        outcome = check_case(find(op), function, Rand("cpu", DTYPES[dtype], seed), c.sizes)
        if outcome.error:
            found.append(f"{dtype} {c.why} {dict(c.sizes)}: {outcome.error}")
    return found


def require_refusal(function, args) -> None:
    """Raises AssertionError if a rung takes arguments that it says it does not take."""
    try:
        function(*args)
    except LabError:
        return
    raise AssertionError("the rung took arguments that it says it does not take")
