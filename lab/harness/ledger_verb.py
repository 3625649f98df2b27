"""`lab ledger MODEL`: a bench of one model's ledger (lab/harness/ledger.py), and its account on the
terminal."""

import torch

from lab.arguments import names, numbers
from lab.contract import BACKENDS
from lab.errors import LabError, one_line, shown
from lab.harness import bench, inside, parallel_bench, parallel_ledger, shapes
from lab.harness.inside_text import inside_text
from lab.harness.request import Request
from lab.model.weight_formats import dtype_of
from lab.names import known
from lab.records import compare
from lab.text import columns


def main(args):
    """Measures (ceilings first) into a new run of --out and prints the account. Raises LabError without a
    GPU, unless several processes divide the model."""
    if args.inside:
        args.plan = args.plan or inside.PLAN
        args.backend = args.backend or ",".join(inside.BACKENDS)
        check_inside(args)
    request = Request(
        "ledger",
        args.out,
        models=(args.model,),
        backends=tuple(names(args.backend or "cuda,triton,torch")),
        dtypes=(dtype_of(args.weights_as, args.dtype) or "bf16",),
        batches=tuple(numbers(str(args.batch))),
        contexts=tuple(numbers(str(args.context))),
        plans=tuple(names(args.plan)) if args.plan else None,
        weights=args.weights,
        weights_as=args.weights_as,
        quantise=args.quantise,
        quantise_head=args.quantise_head,
        kv_dtype=args.kv_dtype,
        quick=True,
        fresh=True,
        swap=args.swap,
        inside=args.inside,
    )
    shapes.preset(args.model)
    for name in request.backends:
        known(name, BACKENDS, "backend")
    if args.tensor_parallel < 1:
        raise LabError(f"--tensor-parallel {args.tensor_parallel}: it must be at least 1")
    if args.tensor_parallel > 1:
        if args.inside:
            raise LabError("--inside does not go with --tensor-parallel")
        if args.swap:
            raise LabError("--swap does not go with --tensor-parallel")
        return parallel_bench.main(args, request, [args.tensor_parallel], parallel_ledger.measure, text_of)
    if not torch.cuda.is_available() and not args.inside:
        raise LabError(
            "a ledger needs an NVIDIA GPU: its rows are device time stamps (lab bench works on a CPU)"
        )
    status = bench.measure(request)
    rows = compare.open_run(args.out).rows
    if args.inside:
        print(inside_text([r for r in rows if r.kind == "inside"]))
        return max(status, int(any(r.kind == "inside" and (r.flag or r.error) for r in rows)))
    print(text_of([r for r in rows if r.kind == "ledger"]))
    return status


def check_inside(args):
    """Raises LabError for options that --inside cannot meet."""
    if other := [plan for plan in names(args.plan) if plan != inside.PLAN]:
        raise LabError(f"--inside is of the persistent plan's one kernel: leave out --plan {','.join(other)}")
    if other := [name for name in names(args.backend) if name in BACKENDS and name not in inside.BACKENDS]:
        raise LabError(
            f"--inside: {','.join(other)} has no kernel of a whole step; use --backend cuda,triton"
        )
    if args.batch != 1:
        raise LabError("--inside is of the persistent plan, which takes one sequence: leave out --batch")
    if args.swap:
        raise LabError("--inside and --swap are two measurements: leave one of them out")


def text_of(rows):
    """The ledgers of a run as text."""
    lines = []
    for backend, plan in dict.fromkeys((r.backend, r.plan) for r in rows if r.row != "swap"):
        mine = [r for r in rows if (r.backend, r.plan) == (backend, plan) and r.row != "swap"]
        one = mine[0]
        stored = f" {one.weight_format}" if one.weight_format else ""
        stored += f" KV {one.kv_dtype}" if one.kv_dtype else ""
        stored += f" on {one.ranks} ranks" if one.ranks > 1 else ""
        lines.append(
            f"\n{one.model} {backend} {plan} {one.dtype}{stored} batch {one.batch} context {one.context}"
        )
        if any(r.row == "chain" for r in mine):
            lines.append(
                "  kernels overlap: each row is what the chain of rows above it grew by, not an isolated "
                "kernel"
            )
        cells = [("op", "kernel", "calls", "us", "MB", "GB/s", "ceiling", "token", "")]
        for r in sorted(mine, key=lambda r: r.order):
            name = " ".join(w for w in (r.op, r.role) if w) if r.row in ("kernel", "chain") else r.row
            if r.error:
                lines.append("  " + one_line(f"{name} failed: {r.error}"))
                continue
            cells.append(
                (
                    name,
                    shown(r.kernel or "", quotes=False),
                    r.calls or "",
                    f"{r.us:.1f}",
                    "" if r.bytes is None else f"{r.bytes / 1e6:.1f}",
                    "" if r.gbps is None else f"{r.gbps:.0f}",
                    "" if r.of_ceiling is None else f"{r.of_ceiling:.1%}",
                    "" if r.of_token is None else f"{r.of_token:.1%}",
                    r.flag or "",
                )
            )
        lines += columns(cells, right=range(2, 8), indent="  ")
    for plan in dict.fromkeys(r.plan for r in rows if r.row == "swap"):
        lines.append(f"\nswap, plan {plan}: one token, us, and the change from all triton")
        swaps = sorted((r for r in rows if r.row == "swap" and r.plan == plan), key=lambda r: r.order)
        start = next((r.us for r in swaps if r.backend == "triton" and not r.op), None)
        cells = []
        for r in swaps:
            what = f"{r.backend}, {r.op} by {r.overrides[r.op]}" if r.op else f"all {r.backend}"
            change = f"{r.us - start:+.1f}" if r.us and start else ""
            cells.append((what, "", f"failed: {r.error}") if r.error else (what, f"{r.us:.1f}", change))
        lines += columns(cells, right=(1,), indent="  ")
    return "\n".join(lines)
