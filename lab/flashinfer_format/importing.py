"""`lab import DIR|FILE`: judges solutions of flashinfer-bench by our contracts, and says what does not map.

FILE is a Definition, a Solution or a file of Traces; DIR is a dataset with any of them. A solution needs its
definition: it is looked for in DIR, or in the dataset in which FILE lies, or is the one that `lab export`
would write. The reference of a definition is run in a process of its own, and compared with our contract.
That settles where values are rounded; what is right is then said by our contract alone, in float64.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lab.arguments import numbers
from lab.check import check_case
from lab.contract import DTYPES, Op, Rand
from lab.errors import LabError, Unavailable, named, one_line, shown
from lab.flashinfer_format import racing, traces, written
from lab.flashinfer_format.building import COMPILED, build
from lab.flashinfer_format.families import cases_of, dtype_of, family_of, ops_of, require_family
from lab.flashinfer_format.schema import Definition, Solution, Source, Trace, read, to_json
from lab.judge.cases import RANDOM, judge_again, judge_cases
from lab.judge.verdict import Judge
from lab.worker import Worker

SHOWN = 20  # traces that are shown of one definition
LANGUAGES = ("python", "triton", "cuda")
LOOSE = 16


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
                if any((one.author, one.name) == (other.author, other.name) for other in self.solutions):
                    raise LabError(f"{path}: the solution {named(one.name)} stands in two files")
                self.solutions.append(one)
            elif one.is_workload:
                self.workloads.setdefault(one.definition, []).append(one.workload)
            else:
                self.traces.append(one)


def main(args) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    args.batches, args.contexts = numbers(args.batch), numbers(args.context)
    dataset = opened(Path(args.path))
    if args.solution:
        wanted = [solution for solution in dataset.solutions if solution.name in args.solution]
        if missing := set(args.solution) - {solution.name for solution in wanted}:
            raise LabError(f"{args.path} has no solution {', '.join(map(named, sorted(missing)))}")
        dataset.solutions = wanted
    show_traces(dataset.traces)
    mapped = show_definitions(dataset)
    failed = judged = 0
    with tempfile.TemporaryDirectory(prefix="lab-import-") as folder:
        found = Readings(device, args, Path(folder))
        racing_too = device == "cuda" and not args.check_only
        for solution in dataset.solutions:
            definition = mapped.get(solution.definition)
            workloads = dataset.workloads.get(solution.definition, [])
            problem = unfit(solution, definition)
            op, problem = (None, problem) if problem else found.of(definition, workloads)
            if problem:
                print(f"{named(solution.name)}: not judged: {problem}")
                continue
            try:
                failed += judge(solution, definition, op, found, racing_too)
                judged += 1
            except Unavailable as missing:
                print(f"{named(solution.name)}: not judged: {one_line(str(missing))}")
    if dataset.workloads and not (dataset.definitions or dataset.traces):
        raise LabError(f"{args.path} holds workloads alone: give the folder with their definitions")
    if not judged and (dataset.solutions or not (mapped or dataset.traces)):
        raise LabError(f"{args.path}: nothing in it can be judged; the lines above say why")
    if judged:
        raced = "" if racing_too else "; not raced" + ", for emulated times say nothing" * (device == "cpu")
        print(f"{judged} solutions judged, {failed} refused{raced}")
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
        if folder.is_dir():
            for file in sorted(folder.rglob("*.json")):
                one = read(file)[0] if file.stem == name else None
                if isinstance(one, Definition) and one.name == name:
                    return one
    family = family_of(name)
    if family is None:
        return None
    sizes = {axis: int(text) for axis, text in re.fullmatch(family.pattern, name).groupdict().items()}
    print(f"{name}: its definition is not here; that of `lab export` is taken, in bf16")
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
        if own := [text for text in definition.constraints if text not in family.constraints]:
            print(f"    constraints that our inputs may not meet: {', '.join(map(shown, own))}")
        _, left_out = cases_of(family, definition, dataset.workloads.get(name, []))
        if left_out:
            print(f"    {len(left_out)} workloads are left out; the first: {one_line(left_out[0])}")
    return mapped


def unfit(solution: Solution, definition: Definition | None) -> str | None:
    """Why a solution cannot be judged."""
    if definition is None:
        return f"its definition {named(solution.definition)} is not here or does not map"
    spec, file = solution.spec, solution.entry[0]
    if spec.language not in LANGUAGES:
        return f"language {spec.language}: taken are {', '.join(LANGUAGES)}"
    if spec.language == "cuda" and spec.binding != "torch":
        default = "" if spec.binding else " (the default)"
        return f"binding tvm-ffi{default}: its headers are not part of this lab; taken is the binding torch"
    suffixes = COMPILED if spec.language == "cuda" else (".py",)
    if not file.endswith(suffixes):
        return f"its entry point is in {named(file)}, which is no {' or '.join(suffixes)} file"
    return None


class Readings:
    """Which Op each definition means: see lab/flashinfer_format/families.py. Keeps what it has found."""

    def __init__(self, device: str, args, folder: Path):
        self.device, self.args, self.folder, self.known = device, args, folder, {}

    def seed(self) -> int:
        """Of one solution's contents: a new one for each, unless the user has chosen it."""
        return RANDOM.getrandbits(63) if self.args.seed is None else self.args.seed

    def of(self, definition: Definition, workloads) -> tuple[Op | None, str | None]:
        """(the Op whose results the definition's reference gives, None), or (None, why there is none)."""
        if definition.name not in self.known:
            self.known[definition.name] = self.found(definition, ops_of(definition, workloads))
        return self.known[definition.name]

    def found(self, definition: Definition, ops) -> tuple[Op | None, str | None]:
        what, errors = f"the reference of {definition.name}", []
        sources = [Source("main.py", definition.reference)]
        with self.worker(definition, what, sources, ("main.py", "run")) as worker:
            try:
                worker.start()
            except LabError as error:
                return None, one_line(str(error))
            shares = {}
            for reading, op in ops.items():
                rand = Rand("cpu", DTYPES[dtype_of(definition)], self.seed())
                function, sizes = worker.function(op.name), op.cases[1].sizes
                outcome = check_case(loosened(op), function, rand, sizes, calls=1)
                shares[reading] = outcome.used
                errors.append(f"{reading}: {outcome.error}")
        nearest = min(shares, key=shares.get)
        if shares[nearest] <= 1:
            return ops[nearest], None
        return None, f"{what} computes something else than our op; {one_line(errors[0])}"

    def write(self, sources) -> str:
        """Writes sources as a package of their own in the folder; returns its name."""
        package = f"sources_{RANDOM.getrandbits(64):x}"
        for source in sources:
            path = self.folder / package / source.path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(source.content, encoding="utf-8")
            except (OSError, ValueError) as error:
                raise LabError(f"the source {named(source.path)} cannot be written: {error}") from None
        return package

    def worker(
        self,
        definition: Definition,
        what: str,
        sources,
        entry,
        language="python",
        returns=True,
        solution=None,
    ) -> Worker:
        """A process that loads sources, once it is started. solution: one in CUDA, which is built first."""
        package, built, memory = self.write(sources), None, int(self.args.memory * 2**30)
        if solution:
            built = str(build(solution, self.folder / package, self.device, self.args.timeout, memory))
        spec = {
            "module": "lab.flashinfer_format.child",
            "what": what,
            "device": self.device,
            "definition": to_json(definition),
            "folder": str(self.folder),
            "package": package,
            "file": entry[0],
            "function": entry[1],
            "language": language,
            "returns": returns,
            "built": built,
        }
        return Worker(spec, self.args.timeout, memory)


def loosened(op: Op) -> Op:
    """With LOOSE times the tolerance: a reference need not be as precise as a kernel, for it decides nothing
    but which reading is the nearest."""

    def tolerance(a):
        limits = op.tolerance(a)
        each = limits if isinstance(limits, list) else [limits]
        return [(LOOSE * rtol, LOOSE * atol) for rtol, atol in each]

    return replace(op, tolerance=tolerance)


def judge(solution: Solution, definition: Definition, op: Op, found: Readings, racing_too: bool) -> int:
    """Judges a solution in a process of its own, and races it if it is right; returns 1 if it is refused or
    has no time. Raises Unavailable for one that this machine cannot run."""
    name, spec = named(solution.name), solution.spec
    returns, in_cuda = not spec.destination_passing_style, spec.language == "cuda"
    try:
        worker = found.worker(
            definition,
            name,
            solution.sources,
            solution.entry,
            spec.language,
            returns,
            solution if in_cuda else None,
        )
    except Unavailable:
        raise
    except LabError as error:
        print(f"{name}: refused: it cannot be built: {one_line(str(error))}")
        return 1
    with worker:
        try:
            worker.start()
        except Unavailable:
            raise
        except LabError as error:
            print(f"{name}: refused: it cannot be loaded: {one_line(str(error))}")
            return 1
        judged = Judge(op, worker, found.seed())
        failed = judge_cases(judged, name, dtype_of(definition))
        failed = failed or judge_again(judged, [dtype_of(definition)])
        print(f"{name}: refused (--seed {judged.seed})" if failed else f"{name}: right in every case")
        if not failed and racing_too:
            failed = racing.race(solution, definition, op, worker, found.args)
    return 1 if failed else 0
