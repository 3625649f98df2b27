"""`lab export OP...`: our ops as a dataset of flashinfer-bench: definitions, workloads, solutions, and traces
of measured rows.

The folder is laid out as flashinfer-bench's own dataset: definitions/TYPE/NAME.json,
workloads/TYPE/NAME.jsonl, solutions/AUTHOR/TYPE/NAME/SOLUTION.json, traces/AUTHOR/TYPE/NAME.jsonl.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lab.arguments import names, numbers
from lab.errors import LabError
from lab.files import write_whole
from lab.flashinfer_format import traces, written, written_cuda
from lab.flashinfer_format.families import OPS_WITH_FAMILY, ops_of
from lab.flashinfer_format.schema import Trace, to_json
from lab.harness.shapes import preset
from lab.names import known
from lab.ops import OPS

MOST_TOKENS = 1 << 27  # in all sequences of a workload
NONE_OF = {
    "sample": "their sampling takes probabilities, ours takes logits",
    "rope_append_attention": "it also rotates and appends; decode_attention maps",
}


def main(args) -> int:
    chosen = [known(name, [op.name for op in OPS], "op") for name in args.op] or [op.name for op in OPS]
    models = [preset(name) for name in names(args.model)]
    batches, contexts = numbers(args.batch), numbers(args.context)
    if max(batches) * max(contexts) > MOST_TOKENS:
        raise LabError(f"{max(batches)} x {max(contexts)} tokens: a workload has at most {MOST_TOKENS}")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"{out} exists and is not an empty folder: choose another")
    measured = traces.measured_rows(args.records) if args.records else None
    found = {}
    for op in OPS:
        if op.name not in chosen:
            continue
        if op.name not in OPS_WITH_FAMILY:
            print(f"{op.name}: not exported: {reason(op)}")
            continue
        for config in models:
            for subject in written.subjects(op, config):
                found[subject.name] = subject
        if op.name == "linear":
            print("linear: the output head is not exported: its logits are float32, their C is like A")
    if not found:
        raise LabError(f"nothing to export: what maps is {', '.join(OPS_WITH_FAMILY)}")
    target = out.resolve()  # "." has no name, and no folder around it
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        new = Path(folder) / "dataset"
        counts = [write(one, args.dtype, batches, contexts, measured, new) for one in found.values()]
        target.mkdir(exist_ok=True)
        for part in new.iterdir():  # an empty folder stays the same one: it may be somebody's current folder
            part.rename(target / part.name)
    print(
        f"{out}: {len(found)} definitions, {sum(n for n, *_ in counts)} workloads, "
        f"{sum(n for *_, n in counts)} solutions"
        + f", {sum(n for _, n, _ in counts)} traces"
        * (measured is not None)
    )
    return 0


def reason(op) -> str:
    """Why an op is not exported."""
    if op.whole_step:
        return "it is a whole step of a model"
    if op.between_ranks:
        return "it is no operation of one GPU alone"
    return NONE_OF.get(op.name, "flashinfer-bench's dataset has no definition that says the same")


def write(subject, dtype: str, batches, contexts, measured, out: Path) -> tuple[int, int, int]:
    """Writes a definition and what belongs to it; returns the numbers of workloads, of traces and of
    solutions."""
    definition = written.definition_of(subject, dtype)
    ops_of(definition)  # raises LabError for sizes that no contract of ours takes
    kind, name = subject.family.op_type, subject.name
    put(out / "definitions" / kind / f"{name}.json", [definition], indent=2)
    lines = []
    for batch in batches:
        for context in contexts if subject.family.op == "decode_attention" else (None,):
            workload, tensors = written.workload_of(subject, batch, context)
            lines.append(Trace(name, workload))
            if tensors:
                store(out / written.blob_path(subject, workload.uuid), tensors)
    put(out / "workloads" / kind / f"{name}.jsonl", lines)
    solutions = [module.solution_of(subject, definition) for module in (written, written_cuda)]
    for solution in solutions:
        put(out / "solutions" / written.AUTHOR / kind / name / f"{solution.name}.json", [solution], indent=2)
    rows = traces.of_rows(subject, dtype, measured) if measured else []
    if rows:
        put(out / "traces" / written.AUTHOR / kind / f"{name}.jsonl", [trace for trace, _ in rows])
        for trace, tensors in rows:
            if tensors:
                store(out / written.blob_path(subject, trace.workload.uuid), tensors)
    return len(lines), len(rows), len(solutions)


def put(path: Path, made: list, indent: int | None = None) -> None:
    """Writes objects of the schema, one on each line or, with `indent`, one alone."""
    write_whole(path, "".join(json.dumps(to_json(one), indent=indent) + "\n" for one in made))


def store(path: Path, tensors: dict) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise LabError(f"writing workloads of attention needs safetensors ({error})") from None
    write_whole(path, save(tensors))
