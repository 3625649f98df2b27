"""`lab check`: every op of a backend against its reference, at sizes chosen to be awkward.

A case is two calls on the same tensors, and on the same workspace if the op takes one, with new random
contents for each call. Before each call the outputs are filled with NaN. Afterwards every element must lie
within the contract's tolerance of a float64 reference. So zeros, NaN, an output left unwritten, a dropped
tail, a counter that was not reset and a remembered answer all fail (tests/test_check.py plants each of these
faults). Every tensor lies between guard zones (lab/arena.py). These, and the inputs that an op may not
change, must be unchanged. `lab check` runs the kernels in processes of their own (lab/worker.py), so that a
crash is a failed case.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch

from lab.arena import INTEGERS, Arena, tensors_in
from lab.contract import BACKENDS, DTYPES, Op, Rand
from lab.dispatch import select
from lab.errors import LabError, Unavailable, error_text, one_line
from lab.names import known
from lab.worker import Worker

POISON = -77777777  # for integer outputs, which have no NaN
LONGEST = 500  # characters of the message about a case


@dataclass(frozen=True)
class Outcome:
    """The result of a case: `error` says what is wrong, or is None; `used` is the largest share of the
    tolerance that an element took; `kind` of an error: wrong, raised, overrun (a write outside of a tensor)
    or changed (one to an input)."""

    error: str | None
    used: float
    kind: str = "wrong"


def check_case(op: Op, function, rand: Rand, sizes, calls: int = 2) -> Outcome:
    """Runs `function` (ops.<name>, or any callable with the op's arguments and `out=`) on random inputs of
    these sizes.

    All calls use the same tensors, with new contents each time; only the arguments named in Op.state keep
    what the call before left in them. A function with a method run(arena), such as lab.worker.Function, is
    called through that method. Raises Unavailable if this machine cannot run the function; any other error of
    it is the outcome.
    """
    values = values_of(op, op.with_workspace(*op.inputs(rand, **sizes)))
    arena = Arena(values, rand.device, getattr(function, "file", None))
    worst = Outcome(None, 0.0)
    for call in range(calls):
        if call:
            arena.fill(values_of(op, op.with_workspace(*op.inputs(rand, **sizes))), keep=op.state)
        outcome = check_call(op, function, arena, {"out", *op.state})
        if outcome.error and call:
            outcome = Outcome(
                f"in call {call + 1}, with new contents in the same tensors: {outcome.error}", outcome.used
            )
        worst = max(worst, outcome, key=lambda o: o.used)
        if worst.error:
            break
    return worst


def values_of(op: Op, args) -> dict:
    """The arguments by name and the output, {"x": ..., "out": ...}. The output is filled with NaN, or POISON
    if it has integers."""
    values = dict(zip(op.names, args))
    out = op.outputs(*args)
    if out is not None:
        values["out"] = out.fill_(torch.nan if out.is_floating_point() else POISON)
    for name in op.state:
        for _, t in tensors_in("", values[name]):
            if t.is_floating_point():  # scratch memory, whose first contents do not matter
                t.fill_(torch.nan)
    return values


def check_call(op: Op, function, arena: Arena, may_change: set[str], errors=None) -> Outcome:
    """Calls the function once on the arena's values and judges the result by a copy of its inputs in the
    arena.

    errors: counts the errors of all elements (lab.judge.precision.Errors).
    """
    before = arena.remember()
    before.pop("out", None)
    a = op.bound(**before)
    if op.contents is not None:  # a kernel is never given integers that could lead it outside a tensor
        try:
            op.contents(a)
        except LabError as error:  # in the second call: the first left something wrong in `state`
            return Outcome(str(error), torch.inf)
    error = function.run(arena) if hasattr(function, "run") else run_here(function, arena)
    if error is not None:
        return Outcome(error, torch.inf, "raised")
    if damage := arena.damage(may_change | set(op.mutates)):
        return Outcome(damage, torch.inf, "overrun" if arena.overran else "changed")
    want = op.reference(**before)
    limits = op.tolerance(op.bound(**{name: finite(value) for name, value in before.items()}))
    after = arena.values()
    out = after.pop("out", None)
    got = [] if out is None else [out]
    got += [after[name] for name in op.mutates if after.get(name) is not None]
    outcomes = []
    if op.verify is not None:
        error = op.verify(out, a)
        outcomes, got, want = [Outcome(error, 0.0 if error is None else torch.inf)], got[1:], want[1:]
    # What has no reference (scratch) is not compared.
    each = limits if isinstance(limits, list) else [limits] * len(got)
    for g, w, limit in zip(got, want, each):
        outcomes.append(compare(g, w, *limit))
        if errors is not None:
            errors.add(g, w, *limit, shared=op.shared_rounding(a) if g is out else 0.0)
    return max(outcomes, key=lambda outcome: outcome.used)


def run_here(function, arena: Arena) -> str | None:
    """Calls the function on the arena's tensors in this process; returns what went wrong, or None."""
    values = arena.values()
    out = values.pop("out", None)
    try:
        returned = function(*values.values()) if out is None else function(*values.values(), out=out)
        if out is not None and out.is_cuda:
            torch.cuda.synchronize(out.device)
    except Unavailable:
        raise
    except Exception as error:
        return error_text(error)
    return None if out is None or returned is out else "did not return the tensor given as out="


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


def finite(a):
    """`a` with 0 for NaN and inf if it is a float tensor, so that the tolerance follows from the finite
    values.

    Otherwise one NaN or inf among an op's inputs would make the tolerance of every element NaN or inf, though
    most elements do not depend on it.
    """
    if not (isinstance(a, torch.Tensor) and a.is_floating_point()) or bool(a.isfinite().all()):
        return a
    return a.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def compare(got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> Outcome:
    """Every element of `got` within rtol * |want| + atol of `want`.

    NaN is right exactly where `want` is NaN; an infinity where `want` is the same infinity, or is finite but
    so large that a value within the tolerance rounds to that infinity in the dtype of `got`.
    """
    if got.shape != want.shape:
        return Outcome(f"shape {list(got.shape)}, not {list(want.shape)}", torch.inf)
    dtype = got.dtype if got.is_floating_point() else torch.float64
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps  # below the normal range a rounding step is absolute
    got, want = got.double(), want.double()
    limit = torch.where(want.isfinite(), rtol * want.abs() + atol + (subnormal if rtol else 0.0), 0.0)
    overflows = got.isinf() & (got.sign() == want.sign()) & (want.abs() + limit).to(dtype).isinf()
    same = (got == want) | got.isnan() & want.isnan() | overflows
    off = torch.where(same, 0.0, (got - want).abs())
    bad = ~(same | (off <= limit))  # also true where off is NaN
    if not bad.any():
        return Outcome(None, float((off / limit.clamp(min=1e-300)).max()) if off.numel() else 0.0)
    first = tuple(int(i) for i in bad.nonzero()[0])
    return Outcome(
        f"{int(bad.sum())} of {got.numel()} elements are off, first at {list(first)}: "
        f"{float(got[first]):.6g}, not {float(want[first]):.6g} within {float(limit[first]):.1e}",
        torch.inf,
    )


def check_cases(op, name, function, dtype_name, cases, device, seed) -> int:
    """Checks the cases and prints one line about them and one about each failure. Returns the number of
    failures."""
    outcomes = [(c, check_case(op, function, Rand(device, DTYPES[dtype_name], seed), c.sizes)) for c in cases]
    wrong = [(c, outcome) for c, outcome in outcomes if outcome.error]
    used = max(outcome.used for _, outcome in outcomes)
    from lab.ops import OPS

    if wrong:
        say = "FAILED"
    else:
        say = f"{used:.0%} of the tolerance used" if used else "exact"
    right = f"{len(cases) - len(wrong)}/{len(cases)} cases"
    print(f"{op.name:{max(len(o.name) for o in OPS)}} {dtype_name:4} {name:6} {right:13} {say}", flush=True)
    for c, outcome in wrong:
        print(f"    {c.why} {dict(c.sizes)}: {one_line(outcome.error)[:LONGEST]}")
    return len(wrong)


def in_worker(spec: dict):
    """In a worker's process: returns a function that gives the op of a name in spec["backend"]."""
    from lab.ops import OPS

    name = spec["backend"]
    ops = select(name, spec["device"], {op.name: name for op in OPS}, check_contents=True, partial=True)
    return lambda name: getattr(ops, name)


def main(args) -> int:
    from lab.ops import OPS, find

    if args.ladder:
        from lab import rungs

        for name in args.op or ():
            rungs.ladder_of(name)
    chosen = [find(name) for name in args.op] if args.op and not args.ladder else OPS
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise LabError(f"unknown device {device!r}: choose cuda or cpu")
    names = (
        [known(name, BACKENDS, "backend") for name in args.backend.split(",")]
        if args.backend is not None
        else None
    )
    wanted = (
        [known(name, list(DTYPES), "dtype") for name in args.dtype.split(",")]
        if args.dtype is not None
        else list(DTYPES)
    )
    backends = {}
    for name in names or BACKENDS:
        try:
            backends[name] = select(
                name, device, {op.name: name for op in OPS}, check_contents=True, partial=True
            )
        except Unavailable as missing:
            if names:
                raise
            print(f"{name}: not checked: {missing}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        return check_all(args, chosen, backends, wanted, device, stack)


def quick_cases(op: Op) -> list:
    """The first two cases of an op, and the first with each format of weights and of a KV cache, whose
    kernels are others."""
    cases, seen = list(op.cases[:2]), set()
    for case in op.cases:
        kinds = {(name, case.sizes.get(name)) for name in ("format", "kv_dtype")} - seen
        if any(kind for _, kind in kinds) and case not in cases:
            cases.append(case)
        seen |= kinds
    return cases


def check_all(args, chosen, backends, wanted, device, stack) -> int:
    """Runs all cases, each backend in a process of its own, which ends with `stack`. Returns the exit
    status."""

    def functions_of(name, **spec):
        return stack.enter_context(
            Worker({"module": __name__, "device": device, "what": name, **spec}, args.timeout)
        ).function

    if args.ladder:
        from lab import rungs
        from lab.learn import ladder_check

        languages = [name for name in backends if name in rungs.BACKENDS]
        if not languages:
            raise LabError(f"nothing to check: ladders exist in {' and '.join(rungs.BACKENDS)}")
        functions = {name: functions_of(name, module="lab.ladder", backend=name) for name in languages}
        failed = ladder_check.check(args.op or rungs.NAMES, functions, wanted, device, args.seed, args.quick)
        return 1 if failed else 0
    functions = {name: functions_of(name, backend=name) for name in backends}
    failed = ran = 0
    for op in chosen:
        cases = quick_cases(op) if args.quick else op.cases
        for dtype_name in wanted:
            if DTYPES[dtype_name] not in op.dtypes:
                continue
            for name, function in functions.items():
                if name not in op.launchers:
                    continue
                failed += check_cases(op, name, function(op.name), dtype_name, cases, "cpu", args.seed)
                ran += len(cases)
    if not ran:
        raise LabError("nothing to check: none of the chosen backends has a chosen op in a chosen dtype")
    print(f"{ran} cases on {device}, {failed} failed")
    return 1 if failed else 0
