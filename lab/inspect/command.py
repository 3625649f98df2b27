"""`lab inspect OP`: what the compilers made of both kernels for one call of an op, side by side. Needs no
GPU.

Instructions are counted in the code, not in a run: one in a loop counts once. Occupancy is theoretical: the
share of a multiprocessor's warps that can be resident.
"""

import json
import sys
from pathlib import Path

from lab.contract import DTYPES
from lab.errors import LabError
from lab.inspect import call, cuda_code, listing, triton_code
from lab.inspect import gpu as gpus
from lab.names import known

COMPILED = {"cuda": cuda_code, "triton": triton_code}


def main(args) -> int:
    from lab.ops import OPS, find, require_formats

    gpu = gpus.find(args.arch)
    if args.all != bool(args.out) or args.all == bool(args.op):
        raise LabError(
            "name an op, as in `lab inspect linear`, or ask for every fairness card with --all --out DIR"
            + ("" if args.op else f"; ops: {', '.join(op.name for op in OPS)}")
        )
    if args.all:
        return write_cards(OPS, args, gpu)
    op = find(args.op)
    if args.weight_format:
        require_formats(op)
    backends = [known(args.backend, list(COMPILED), "backend")] if args.backend else list(COMPILED)
    dtype, sizes = args.dtype or default_dtype(op), sizes_of(op, args)
    if args.listing == "ttgir" and not args.backend:
        backends = ["triton"]
    found, errors = look(op, dtype, sizes, gpu, backends)
    if not found:
        raise LabError("; ".join(errors.values()))
    if args.json:
        print(json.dumps(as_json(op, dtype, sizes, gpu, found, errors), indent=1))
    elif args.listing:
        for kernels in found.values():
            for kernel in kernels:
                for line in listing.lines(kernel, args.listing):
                    print(line)
    else:
        print("\n".join(table(op, dtype, sizes, gpu, found)))
    for backend, error in errors.items():
        print(f"lab: {backend}: {error}", file=sys.stderr)
    return 0


def default_dtype(op):
    names = [name for name, dtype in DTYPES.items() if dtype in op.dtypes]
    return "bf16" if "bf16" in names else names[0]


def sizes_of(op, args):
    if args.case is not None and args.sizes:
        raise LabError("give --case or --sizes, not both")
    format = {"format": args.weight_format} if args.weight_format else {}
    if args.case is None:  # sizes that were not given keep their defaults
        return {**op.default_sizes(), **call.parse(args.sizes or []), **format}
    if not 0 <= args.case < len(op.cases):
        raise LabError(
            f"{op.name} has no case {args.case}; choose from "
            + ", ".join(f"{i} ({c.why})" for i, c in enumerate(op.cases))
        )
    return {**op.cases[args.case].sizes, **format}


def look(op, dtype, sizes, gpu, backends=tuple(COMPILED)):
    """({backend: its list of Kernels}, {backend: why it has none}) for a call of these sizes."""
    arguments = call.arguments(op, dtype, sizes)
    found, errors = {}, {}
    for backend in backends:
        try:
            found[backend] = COMPILED[backend].kernels(op, arguments, gpu)
            if not found[backend]:
                raise LabError(f"{op.name} launches nothing for {call.words(sizes)}")
        except LabError as error:
            found.pop(backend, None)
            errors[backend] = str(error)
    return found, errors


def as_json(op, dtype, sizes, gpu, found, errors):
    return {
        "op": op.name,
        "dtype": dtype,
        "arch": gpu.arch,
        "sizes": call.as_json(sizes),
        "kernels": [kernel.facts() for kernels in found.values() for kernel in kernels],
        "errors": errors,
    }


def table(op, dtype, sizes, gpu, found):
    """The lines of the comparison: one column for each kernel that the call launches."""
    kernels = [kernel for one in found.values() for kernel in one]
    launch = [
        ("", [k.backend for k in kernels]),
        ("kernel", [k.name for k in kernels]),
        ("grid", [" x ".join(map(str, k.grid)) for k in kernels]),
        ("threads of a block", [k.threads for k in kernels]),
        ("registers of a thread", [k.registers for k in kernels]),
        ("spilled bytes of a thread", [k.spills for k in kernels]),
        ("shared memory, static", [k.shared_static for k in kernels]),
        ("shared memory, dynamic", [k.shared_dynamic for k in kernels]),
        ("blocks on a multiprocessor", [k.blocks for k in kernels]),
        ("occupancy", [f"{k.occupancy:.0%}" for k in kernels]),
        ("limited by", [k.limit for k in kernels]),
    ]
    counts = [
        (name, [k.mix[name] for k in kernels]) for name in kernels[0].mix if any(k.mix[name] for k in kernels)
    ]
    first = max(len(name) for name, _ in launch + counts)
    widths = [max(len(str(values[i])) for _, values in launch + counts) for i in range(len(kernels))]
    yield f"{op.name} {dtype} for {gpu.arch} ({gpu.card}): {call.words(sizes)}"
    for title, rows in ("", launch), ("instructions, each counted once", counts):
        if title:
            yield title
        for name, values in rows:
            yield "  ".join(
                [f"{name:{first}}", *(f"{value!s:>{width}}" for value, width in zip(values, widths))]
            )
    for kernel in kernels:
        yield f"{kernel.backend}: {kernel.instance}"


def write_cards(ops, args, gpu):
    from lab.inspect.fairness import fairness, new_run
    from lab.records import schema

    path, failed = Path(args.out), 0
    try:
        run = str(schema.read(path).runs()[-1])  # the cards belong to the run that was measured last
    except LabError:
        if schema.path_of(path).exists():
            raise
        run = new_run()
    with schema.Writer(path) as writer:
        for op in ops:
            for dtype in [name for name, value in DTYPES.items() if value in op.dtypes]:
                if args.dtype and args.dtype != dtype:
                    continue
                rows, errors = fairness(op, dtype, op.default_sizes(), gpu.arch, run)
                writer.append(*rows)
                for row in rows:
                    width = max(len(o.name) for o in ops)
                    print(
                        f"{row.op:{width}} {row.dtype} {row.backend:6} {row.kernel}: "
                        f"{row.registers} registers, {row.occupancy:.0%} occupancy, "
                        f"{row.configurations} configurations, {row.code_lines} lines",
                        flush=True,
                    )
                for error in errors:
                    failed += 1
                    print(f"lab: {error}", file=sys.stderr)
    print(f"fairness cards of run {run} in {schema.path_of(path)}")
    return 1 if failed else 0
