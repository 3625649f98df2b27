"""`lab check` and `lab ops`: every op of a backend against its reference, at sizes chosen to be awkward.

A case runs on outputs poisoned with NaN and on fresh random inputs, and every element must lie within the contract's
tolerance of a float64 reference. So zeros, NaN, an output left unwritten and a dropped tail all fail
(tests/test_check.py plants each and sees it caught). Inputs that an op may not change must come back unchanged.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from lab.dispatch import BACKENDS, DTYPES, Op, Rand, known, select
from lab.errors import LabError, Unavailable

POISON = -77777777          # for integer outputs, which have no NaN


@dataclass(frozen=True)
class Outcome:
    """What a case showed: `error` says what is wrong, or is None; `used` is the largest share of the tolerance used."""
    error: str | None
    used: float


def check_case(op: Op, function, rand: Rand, sizes) -> Outcome:
    """Runs `function` (ops.<name>, or any callable with the op's arguments and `out=`) on one random case of `op`."""
    args = op.inputs(rand, **sizes)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    want = op.reference(*before)
    limits = op.tolerance(*before)
    out = op.outputs(*args)
    if out is None:
        function(*args)
    else:
        out.fill_(torch.nan if out.is_floating_point() else POISON)
        if function(*args, out=out) is not out:
            return Outcome("did not return the tensor given as out=", torch.inf)
    for i, (now, then) in enumerate(zip(args, before, strict=True)):
        if isinstance(now, torch.Tensor) and i not in op.mutates and not same_bits(now, then):
            return Outcome(f"argument {i} was changed, which the contract does not allow", torch.inf)
    changed = [args[i] for i in op.mutates if i < len(args) and args[i] is not None]
    got = ([] if out is None else [out]) + changed
    outcomes = []
    if op.verify is not None:
        error = op.verify(out, *before)
        outcomes, got, want = [Outcome(error, 0.0 if error is None else torch.inf)], got[1:], want[1:]
    outcomes += [compare(g, w, *limits) for g, w in zip(got, want)]   # what has no reference (scratch) is not compared
    return max(outcomes, key=lambda outcome: outcome.used)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def compare(got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> Outcome:
    """Every element of `got` within rtol * |want| + atol of `want`; NaN only where `want` is NaN."""
    if got.shape != want.shape:
        return Outcome(f"shape {list(got.shape)}, not {list(want.shape)}", torch.inf)
    info = torch.finfo(got.dtype if got.is_floating_point() else torch.float64)
    subnormal = info.smallest_normal * info.eps                  # below the normal range a rounding step is absolute
    got, want = got.double(), want.double()
    limit = rtol * want.abs() + atol + (subnormal if rtol else 0.0)
    off = (got - want).abs()
    off = torch.where(got.isnan() & want.isnan() | (got == want), 0.0, off)
    bad = ~(off <= limit)                                        # also true where off is NaN
    if not bad.any():
        return Outcome(None, float((off / limit.clamp(min=1e-300)).max()) if off.numel() else 0.0)
    first = tuple(int(i) for i in bad.nonzero()[0])
    return Outcome(f"{int(bad.sum())} of {got.numel()} elements are off, first at {list(first)}: {float(got[first]):.6g}, "
                   f"not {float(want[first]):.6g} within {float(limit[first]):.1e}", torch.inf)


def check_cases(op, name, function, dtype_name, cases, device, seed) -> int:
    """Checks the cases, prints a line about them and one about each that failed; returns how many did."""
    outcomes = [(c, check_case(op, function, Rand(device, DTYPES[dtype_name], seed), c.sizes)) for c in cases]
    wrong = [(c, outcome) for c, outcome in outcomes if outcome.error]
    used = max(outcome.used for _, outcome in outcomes)
    say = "FAILED" if wrong else "exact" if used == 0 else f"{used:.0%} of the tolerance used"
    print(f"{op.name:21} {dtype_name} {name:6} {len(cases) - len(wrong)}/{len(cases)} cases  {say}", flush=True)
    for c, outcome in wrong:
        print(f"    {c.why} {dict(c.sizes)}: {outcome.error}")
    return len(wrong)


def main(args) -> int:
    from lab.ops import OPS, find
    if args.exercise:
        from lab import exercises
        return exercises.main(args.exercise)
    chosen = [find(name) for name in args.op] if args.op else OPS
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise LabError(f"unknown device {device!r}: choose cuda or cpu")
    names = [known(name, BACKENDS, "backend") for name in args.backend.split(",")] if args.backend is not None else None
    wanted = ([known(name, list(DTYPES), "dtype") for name in args.dtype.split(",")] if args.dtype is not None
              else list(DTYPES))
    backends = {}
    for name in names or BACKENDS:
        try:
            backends[name] = select(name, device, {op.name: name for op in OPS})
        except Unavailable as missing:
            if names:
                raise
            print(f"{name}: not checked: {missing}", file=sys.stderr)
    if args.ladder:
        from lab import ladder
        halves = [name for name in backends if name in ladder.BACKENDS]
        if not halves:
            raise LabError(f"nothing to check: ladders exist in {' and '.join(ladder.BACKENDS)}")
        return 1 if ladder.check(args.op or ladder.OPS, halves, wanted, device, args.seed, args.quick) else 0
    failed = ran = 0
    for op in chosen:
        cases = op.cases[:2] if args.quick else op.cases
        for dtype_name in wanted:
            if DTYPES[dtype_name] not in op.dtypes:
                continue
            for name, ops in backends.items():
                failed += check_cases(op, name, getattr(ops, op.name), dtype_name, cases, device, args.seed)
                ran += len(cases)
    if not ran:
        raise LabError("nothing to check: the ops chosen take none of the dtypes chosen")
    print(f"{ran} cases on {device}, {failed} failed")
    return 1 if failed else 0
