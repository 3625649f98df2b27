"""`lab import DIR|FILE`: judges solutions of flashinfer-bench by our contracts, and says what does not map.

FILE is a Definition, a Solution or a file of Traces; DIR is a dataset with any of them. A solution needs its
definition: it is looked for in DIR, or in the dataset in which FILE lies, or is the one that `lab export` would
write. The reference of a definition is run once, in the process of the solution, and compared with our
contract. That settles where values are rounded; what is right is then said by our contract alone, in float64.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lab.check import check_case
from lab.contract import DTYPES, Op, Rand
from lab.errors import LabError, Unavailable, named, one_line
from lab.flashinfer_format import traces, written
from lab.flashinfer_format.families import cases_of, dtype_of, family_of, ops_of, require_family
from lab.flashinfer_format.schema import Definition, Solution, Source, Trace, read, to_json
from lab.judge.cases import RANDOM, judge_again, judge_cases
from lab.judge.verdict import Judge
from lab.worker import Worker

SHOWN = 20  # traces that are shown of one definition
LANGUAGES = ("python", "triton")


@dataclass
class Dataset:
    definitions: dict[str, Definition] = field(default_factory=dict)
    solutions: list[Solution] = field(default_factory=list)
    workloads: dict[str, list] = field(default_factory=dict)  # by definition
    traces: list[Trace] = field(default_factory=list)

    def add(self, path: Path) -> None:
        for one in read(path):
            if isinstance(one, Definition):
                if one.name in self.definitions:
                    raise LabError(f"{path}: the definition {named(one.name)} stands in two files")
                self.definitions[one.name] = one
            elif isinstance(one, Solution):
                self.solutions.append(one)
            elif one.is_workload:
                self.workloads.setdefault(one.definition, []).append(one.workload)
            else:
                self.traces.append(one)


def main(args) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    dataset = opened(Path(args.path))
    if args.solution:
        wanted = [solution for solution in dataset.solutions if solution.name in args.solution]
        if missing := set(args.solution) - {solution.name for solution in wanted}:
            raise LabError(f"{args.path} has no solution {', '.join(map(named, sorted(missing)))}")
        dataset.solutions = wanted
    show_traces(dataset.traces)
    mapped = show_definitions(dataset)
    failed = judged = 0
    for solution in dataset.solutions:
        if problem := unfit(solution, mapped):
            print(f"{named(solution.name)}: not judged: {problem}")
            continue
        definition = mapped[solution.definition]
        judged += 1
        failed += judge(solution, definition, dataset.workloads.get(definition.name, []), device, args)
    if not judged and (dataset.solutions or not (mapped or dataset.traces)):
        raise LabError(
            f"{args.path}: nothing in it can be judged{' (why: above)' if dataset.definitions else ''}"
        )
    if judged:
        print(f"{judged} solutions judged, {failed} refused; not raced")
    return 1 if failed else 0


def opened(path: Path) -> Dataset:
    """What a folder holds, or a file with the definition that it needs."""
    dataset = Dataset()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))
        if not files:
            raise LabError(f"{path}: no .json or .jsonl file in it")
        for file in files:
            dataset.add(file)
    else:
        if path.suffix not in (".json", ".jsonl"):
            raise LabError(f"{path}: give a .json or .jsonl file of flashinfer-bench, or a folder of them")
        dataset.add(path)
    for solution in dataset.solutions:
        if solution.definition not in dataset.definitions:
            if found := definition_elsewhere(path, solution.definition):
                dataset.definitions[solution.definition] = found
    return dataset


def definition_elsewhere(path: Path, name: str) -> Definition | None:
    """The definition that a solution's file needs: of the dataset in whose folder it lies, or the one that we
    would export, in bf16."""
    for parent in path.resolve().parents:
        folder = parent / "definitions"
        if folder.is_dir() and not re.search(r"[/\\\0]", name):
            for file in sorted(folder.rglob(f"{name}.json")):
                return next(one for one in read(file) if isinstance(one, Definition))
    family = family_of(name)
    if family is None:
        return None
    sizes = {axis: int(text) for axis, text in re.fullmatch(family.pattern, name).groupdict().items()}
    return written.definition_of(written.Subject(family, name, sizes), "bf16")


def show_traces(found: list[Trace]) -> None:
    counts: dict = {}
    for trace in found:
        counts[trace.definition] = counts.get(trace.definition, 0) + 1
        if counts[trace.definition] <= SHOWN:
            print(traces.line_of(trace))
    for name, count in counts.items():
        if count > SHOWN:
            print(f"{named(name)}: {count - SHOWN} more traces")


def show_definitions(dataset: Dataset) -> dict[str, Definition]:
    """Says what maps onto which contract, and why others do not; returns those that do, by name."""
    mapped = {}
    for name, definition in dataset.definitions.items():
        try:
            family = require_family(definition)
            ops_of(definition)
        except LabError as error:
            print(one_line(str(error)))
            continue
        mapped[name] = definition
        print(f"{name}: maps onto {family.op}, {dtype_of(definition)}")
        for line in cases_of(family, definition, dataset.workloads.get(name, []))[1]:
            print(f"    left out: {one_line(line)}")
    return mapped


def unfit(solution: Solution, mapped) -> str | None:
    """Why a solution cannot be judged."""
    if solution.definition not in mapped:
        return f"its definition {named(solution.definition)} is not here or does not map"
    if solution.spec.language not in LANGUAGES:
        return (
            f"language {solution.spec.language}: its binding needs a build of flashinfer-bench; taken are "
            f"{' and '.join(LANGUAGES)}, and CUDA by `lab try`"
        )
    if not solution.entry[0].endswith(".py"):
        return f"its entry point is in {named(solution.entry[0])}, which is no .py file"
    return None


def judge(solution: Solution, definition: Definition, workloads, device: str, args) -> int:
    """Judges a solution in a process of its own; returns 1 if it is refused."""
    ops, name = ops_of(definition, workloads), named(solution.name)
    with tempfile.TemporaryDirectory(prefix="lab-import-") as folder:
        spec = {
            "module": "lab.flashinfer_format.child",
            "what": name,
            "device": device,
            "definition": to_json(definition),
            "reference": packed(
                Path(folder), "reference_", [Source("main.py", definition.reference)], ("main.py", "run")
            ),
            "solution": None,
        }
        seed = RANDOM.getrandbits(63) if args.seed is None else args.seed
        op = reading(ops, definition, spec, seed, args)
        spec["solution"] = packed(
            Path(folder), "solution_", solution.sources, solution.entry, solution.spec.language
        )
        spec["solution"]["returns"] = not solution.spec.destination_passing_style
        with Worker(spec, args.timeout, int(args.memory * 2**30)) as worker:
            try:
                worker.start()
            except Unavailable:
                raise
            except LabError as error:
                print(f"{name}: refused: it cannot be loaded: {one_line(str(error))}")
                return 1
            judged = Judge(op, worker, seed)
            failed = judge_cases(judged, name, dtype_of(definition))
            failed = failed or judge_again(judged, [dtype_of(definition)])
    if failed:
        print(f"{name}: refused (--seed {seed})")
        return 1
    print(f"{name}: right in every case")
    return 0


def reading(ops: dict[str, Op], definition: Definition, spec: dict, seed: int, args) -> Op:
    """The Op whose results the definition's reference gives. Raises LabError where it gives none's."""
    errors = []
    with Worker(spec, args.timeout, int(args.memory * 2**30)) as worker:
        worker.start()
        for op in ops.values():
            outcome = check_case(
                op,
                worker.function("reference"),
                Rand("cpu", DTYPES[dtype_of(definition)], seed),
                op.cases[-1 if "lengths" not in op.cases[0].sizes else 0].sizes,
                calls=1,
            )
            if outcome.error is None:
                return op
            errors.append(outcome.error)
    raise LabError(
        f"{named(definition.name)}: its reference computes something else than {' or '.join(ops)}: "
        f"{one_line(errors[0])}"
    )


def packed(folder: Path, prefix: str, sources: list[Source], entry, language: str = "python") -> dict:
    """Writes sources as a package into a folder; returns what lab/flashinfer_format/child.py must know."""
    package = f"{prefix}{RANDOM.getrandbits(64):x}"
    for source in sources:
        path = folder / package / source.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source.content, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise LabError(f"the source {named(source.path)} cannot be written: {error}") from None
    return {
        "folder": str(folder),
        "package": package,
        "file": entry[0],
        "function": entry[1],
        "language": language,
        "returns": True,
        "what": package,
    }
