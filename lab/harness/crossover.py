"""Which backend to take: the fastest whole token at every batch and context, from model records; the faster
backend for every op, from op records; and the latter as a table for `lab run`.

An op that a model uses at several shapes (linear) is judged by the sum of its times in one decode step. A
cell is ambiguous where the spreads overlap; there the table keeps the backend with the smaller median and
says so.
"""

import json
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

from lab.contract import BACKENDS, DTYPES
from lab.errors import LabError
from lab.files import write_whole
from lab.harness import untuned
from lab.harness.shapes import preset
from lab.names import known
from lab.ops import OPS
from lab.records import compare
from lab.text import columns


@dataclass
class Cell:
    """One op at one batch and context. us: backend -> microseconds a decode step spends in the op."""

    op: str
    batch: int
    context: int | None
    us: dict
    winner: str
    verdict: str  # what the winner is next to the runner-up: faster, same or ambiguous; "alone" with no other
    untuned: tuple = ()  # backends of `us` that ran with settings nobody raced: see lab/harness/untuned.py


CONTRACTS = {op.name: op for op in OPS}


def calls(op, config, role):
    """How often one decode step of a model makes this use of an op; a record may name an op that is no
    more."""
    return CONTRACTS[op].calls(config, role) if op in CONTRACTS else config.layers


def of_dtype(row, dtype):
    """Does the row belong to a model of this dtype? An op may take another one whatever the model's is:
    sample takes float32 logits."""
    op = CONTRACTS.get(row.op)
    return row.dtype == dtype or (op is not None and DTYPES[dtype] not in op.dtypes)


def cells(rows, model, dtype="bf16", cache=None):
    """The cells of one run's op rows for a model's shapes, device times only (wall times where there are no
    others)."""
    config, cards = preset(model), untuned.by_cards([r for r in rows if r.kind == "fairness"])
    mine = [
        r
        for r in rows
        if r.kind == "op"
        and r.us
        and r.weight_format is None
        and model in r.models
        and r.backend in BACKENDS
        and r.timer in ("graph", "wall")
        and of_dtype(r, dtype)
    ]
    wished = [cache] if cache else ["in_model", "cold", "warm"]
    found = defaultdict(dict)  # (op, batch, context) -> role -> backend -> row
    for wish in reversed(wished):  # the most wished for comes last and replaces the others
        for r in mine:
            if r.cache == wish:
                found[r.op, r.batch, r.context].setdefault(r.role, {})[r.backend] = r
    result = []
    for (op, batch, context), roles in found.items():
        common = [b for b in BACKENDS if all(b in by_backend for by_backend in roles.values())]
        if not common:
            continue
        sums = {b: total([(calls(op, config, role), by[b]) for role, by in roles.items()]) for b in common}
        order = sorted(common, key=lambda b: sums[b].us)
        said = compare.verdict(sums[order[1]], sums[order[0]]) if len(order) > 1 else "alone"
        left = tuple(b for b in common if any(untuned.is_untuned(by[b], cards) for by in roles.values()))
        result.append(Cell(op, batch, context, {b: sums[b].us for b in common}, order[0], said, left))
    return sorted(result, key=lambda c: (c.op, c.batch, c.context or 0))


def total(parts):
    """Times of several shapes as one: medians and spreads add up (the spread so errs on the wide side). What
    a part does not know the sum does not know either."""

    def combined(field, by):
        known = [(n, getattr(r, field)) for n, r in parts]
        return None if any(value is None for _, value in known) else by(known)

    return SimpleNamespace(
        **{
            f: combined(f, lambda known: sum(n * value for n, value in known))
            for f in ("us", "us_p10", "us_p90")
        },
        n=combined("n", lambda known: min(value for _, value in known)),
    )


def fastest_tokens(rows, model, dtype):
    """The cells of a table: for each batch and context the fastest plan of each backend, the fastest first;
    steps in which no op is overridden, with plain weights, replayed as graphs where there are such."""
    sizes = defaultdict(dict)  # (batch, context) -> backend -> the fastest row
    modes = ("graph", "compile") if any(r.kind == "model" and r.mode == "graph" for r in rows) else ("eager",)
    for r in rows:
        if r.kind != "model" or r.model != model or r.dtype != dtype or not r.us or r.overrides:
            continue
        if r.weight_format is not None or r.kv_dtype is not None or r.ranks > 1 or r.mode not in modes:
            continue
        best = sizes[r.batch, r.context].get(r.backend)
        if best is None or r.us < best.us:
            sizes[r.batch, r.context][r.backend] = r
    return [
        (
            f"b{batch}",
            context,
            *(
                f"{r.backend} {r.plan if r.mode != 'compile' else 'compiled'} {r.us / 1e3:.3f} ms"
                for r in sorted(found.values(), key=lambda r: r.us)
            ),
        )
        for (batch, context), found in sorted(sizes.items())
    ]


def table(found):
    """{"op": [{"batch", "context", "backend"}]}: what `lab run --dispatch` takes. context: null fits any."""
    out = defaultdict(list)
    for c in found:
        out[c.op].append(
            {
                "batch": c.batch,
                "context": c.context,
                "backend": c.winner,
                "ambiguous": c.verdict in (compare.AMBIGUOUS, compare.SAME),
            }
        )
    return dict(out)


MEASURING = (  # options of `lab bench` that say what to measure
    *("model", "backend", "batch", "context", "device", "plan", "weights_as", "quantise", "quantise_head"),
    *("weight_format", "kv_dtype", "tensor_parallel", "quick", "seconds", "budget_minutes", "fresh"),
    *("no_vendor", "no_compile", "swap", "ladder"),
)


def main(args):
    """`lab bench crossover [MODEL ...] --out DIR [--export FILE]`: prints the cells of the last run in
    DIR."""
    for option in MEASURING:
        if getattr(args, option):
            raise LabError(
                f"lab bench crossover measures nothing: it takes MODEL, --out, --dtype and --export, not "
                f"--{option.replace('_', '-')}"
            )
    if args.dtype:
        known(args.dtype, list(DTYPES), "dtype")
    rows, env, notices, _ = compare.open_run(args.out)
    for line in notices:
        print(line, file=sys.stderr)
    models = args.names or sorted({m for r in rows if r.kind == "op" for m in r.models})
    if not models:
        raise LabError(f"{args.out} has no op records of a model: run `lab bench ops` first")
    if args.export and len(models) != 1:
        raise LabError(f"--export writes the table of one model: name it ({', '.join(models)})")
    dtypes = {r.dtype for r in rows if r.kind == "op"}
    dtype = args.dtype or next((d for d in ("bf16", "fp16", "fp32") if d in dtypes), "bf16")
    if env.device != "cuda":
        print("emulated: these winners are a CPU's and say nothing about a GPU")
    for model in models:
        found = cells(rows, model, dtype)
        if not found:
            raise LabError(
                f"{args.out} has no op records of {model} in {dtype}: "
                f"run `lab bench ops --model {model}` first"
            )
        tokens = fastest_tokens(rows, model, dtype)
        if tokens:
            print(f"{model} {dtype}, a whole token: take the first one")
            print("\n".join(columns(tokens, right=(1,), indent="  ")))
        print(f"{model} {dtype}, us of one decode step by op")
        print(
            "\n".join(
                columns(
                    [
                        (
                            c.op,
                            f"b{c.batch}",
                            c.context or "-",
                            c.winner,
                            c.verdict,
                            "  ".join(
                                f"{b} {us:.1f}" + f" ({untuned.WORD})" * (b in c.untuned)
                                for b, us in c.us.items()
                            ),
                        )
                        for c in found
                    ],
                    right=(2,),
                    indent="  ",
                )
            )
        )
        if args.export:
            write_whole(args.export, json.dumps(table(found), indent=1) + "\n")
            print(f"next: lab run MODEL --dispatch {shlex.quote(args.export)} --prompt TEXT")
    return 0
