"""`lab check --ladder`: every rung of the ladders against the reference of its op."""

from __future__ import annotations

import torch

from lab.check import check_case
from lab.contract import DTYPES, Rand, case
from lab.errors import LabError
from lab.ladder import bind
from lab.ops import find
from lab.rungs import fits, rungs

CASES = {
    "linear": (
        case("tails of a tile in n and k", batch=1, n=37, k=136),
        case("several steps of four warps", batch=2, n=5, k=1096),
        case("a k of no whole vectors, with bias", batch=1, n=11, k=101, bias=True),
        case("more rows than 8, float32 out", batch=9, n=7, k=264, bias=True, out_dtype=torch.float32),
    ),
    "rmsnorm": (
        case("one row", rows=1, cols=576),
        case("more rows than a warp has lanes", rows=33, cols=64),
        case("several steps of 256 vectors", rows=2, cols=2056),
        case("no whole vectors", rows=3, cols=101),
    ),
    "decode_attention": (
        case(
            "context 1, around a page's end, an idle row; a group of 3",
            lengths=(1, 15, 17, 0, 130),
            q_heads=6,
            kv_heads=2,
            head_dim=64,
            splits=2,
        ),
        case("empty splits, a group of 5", lengths=(5, 70), q_heads=5, kv_heads=1, head_dim=128, splits=7),
        case("one split, a larger page", lengths=(100,), q_heads=2, kv_heads=2, head_dim=128, page_size=64),
    ),
}


def check(ops, functions, dtypes, device, seed, quick=False) -> int:
    """`lab check --ladder`: every rung against the op's reference; returns the number of failed cases.

    quick: the first two cases alone.
    functions: for each of BACKENDS that this machine can run, what gives the function of a rung's name, as
    "linear 3" (lab.worker.Worker.function). A case that a rung says it does not take must be refused.
    """
    failed = ran = 0
    for op in ops:
        cases = CASES[op][:2] if quick else CASES[op]
        for rung in rungs(op):
            needs = f"; needs {rung.needs}" if rung.needs else ""
            print(f"{op} {rung.title}: {rung.idea}\n    should gain: {rung.gain}{needs}")
            for backend in functions:
                if backend in rung.absent:
                    print(f"    {backend:6} absent: {rung.absent[backend]}")
                    continue
                here, function, said = (
                    bind(rung, backend, device),
                    functions[backend](f"{op} {rung.number}"),
                    [],
                )
                for dtype in dtypes:
                    right = refused = 0
                    for c in cases:
                        rand = Rand(device, DTYPES[dtype], seed)
                        if not fits(rung, find(op).inputs(rand, **c.sizes)):
                            refused += _is_refused(here, find(op).inputs(rand, **c.sizes))
                            continue
                        outcome = check_case(find(op), function, Rand("cpu", DTYPES[dtype], seed), c.sizes)
                        ran += 1
                        right += outcome.error is None
                        if outcome.error:
                            failed += 1
                            said.append(f"\n        {dtype} {c.why} {dict(c.sizes)}: {outcome.error}")
                    said.append(
                        f" {dtype} {right}/{len(cases) - refused}"
                        + (f" ({refused} refused)" if refused else "")
                    )
                print(f"    {backend:6}{''.join(said)}", flush=True)
    print(f"{ran} cases of rungs on {device}, {failed} failed")
    return failed


def _is_refused(function, args) -> bool:
    """True; raises if arguments that a rung does not take are taken."""
    try:
        function(*args)
    except LabError:
        return True
    raise AssertionError("the rung took arguments that it says it does not take")
