"""flashinfer-bench's JSON: what is written can be read, what is no such JSON is one line, and solutions of
each family are right or wrong by our contracts. Sources are loaded into this process; the judge's are in
tests/test_exchange_judge.py."""

import copy
import importlib.util
import json
import sys
import types
import uuid
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab import cli
from lab.check import check_case
from lab.contract import DTYPES, Rand
from lab.flashinfer_format import attention, exporting, families, importing, schema, traces, written
from lab.flashinfer_format.child import Solved
from lab.flashinfer_format.schema import Definition, Solution, Trace, from_json, read, to_json
from lab.judge.precision import ErrorsByWidth
from lab.ops import OPS

GEMM = written.subject_of("gemm_n{N}_k{K}", N=48, K=40)
NORM = written.subject_of("rmsnorm_h{hidden_size}", hidden_size=64)
ADDED = written.subject_of("fused_add_rmsnorm_h{hidden_size}", hidden_size=64)
NHD = written.attention(4, 2, 64, 16)
HND = written.Subject(NHD.family, NHD.name, NHD.sizes, layout=tuple(attention.HND))
SUBJECTS = {"gemm": GEMM, "norm": NORM, "added": ADDED, "NHD": NHD, "HND": HND}

# As flashinfer's own definitions round: once, at the end.
ROUNDED_ONCE = """
import torch

def run(ARGUMENTS):
    EPS = 1e-6
    total = SUM
    return (total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.float()).to(weight.dtype)
"""
ONCE = {
    "norm": ROUNDED_ONCE.replace("ARGUMENTS", "hidden_states, weight").replace(
        "SUM", "hidden_states.float()"
    ),
    "added": ROUNDED_ONCE.replace("ARGUMENTS", "hidden_states, residual, weight").replace(
        "SUM", "hidden_states.float() + residual.float()"
    ),
}


def loaded(op, folder, sources, entry=("main.py", "run"), language="python", returns=True):
    """An entry point as the function of an Op, in this process."""
    package = f"sources_{uuid.uuid4().hex}"
    for source in sources:
        path = folder / package / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.content)
    args = op.inputs(Rand("cpu", torch.float32), **op.cases[0].sizes)
    shape = {"inputs": range(len(args) - len(op.mutates)), "outputs": range(1 + len(op.mutates))}
    spec = dict(
        definition=shape,
        folder=str(folder),
        package=package,
        file=entry[0],
        function=entry[1],
        language=language,
    )
    return Solved(op, {**spec, "returns": returns, "device": "cpu", "what": package})


def outcome(op, function, sizes, dtype="bf16"):
    return check_case(op, function, Rand("cpu", DTYPES[dtype], 3), sizes)


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for the device and read a number of it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.name() in ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense")
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("kind", SUBJECTS)
def test_our_reference_and_our_solution_are_right_by_our_contract(kind, tmp_path):
    subject = SUBJECTS[kind]
    definition = from_json(Definition, to_json(written.definition_of(subject, "bf16")), "there and back")
    solution = written.solution_of(subject, definition)
    assert to_json(solution)["spec"]["destination_passing_style"] is True
    solution = from_json(Solution, to_json(solution), "there and back")
    op = list(families.ops_of(definition).values())[-1]
    reference = loaded(op, tmp_path, [schema.Source("main.py", definition.reference)])
    ours = loaded(op, tmp_path, solution.sources, solution.entry, "triton", returns=False)
    cases = {case.why: case.sizes for case in op.cases}
    cases.pop("one long sequence", None)  # takes the interpreter long; the other cases have splits, too
    if subject.family.op == "decode_attention":
        cases["no page at all"] = {"lengths": (0, 0)}
    for why, sizes in cases.items():
        assert outcome(op, reference, sizes).error is None
        assert outcome(op, ours, sizes).error is None, why
    args = op.inputs(Rand("cpu", torch.bfloat16, 1), **op.cases[0].sizes)
    with HostReads() as reads:
        ours.function(*args)
    assert reads.count == 0, "a call that reads on the host cannot be captured in a graph, and has no race"
    assert ours.launched(lambda: outcome(op, ours, op.cases[0].sizes))  # the copy's kernels are seen


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_a_reference_says_where_values_are_rounded(kind, dtype, tmp_path):
    definition = written.definition_of(SUBJECTS[kind], dtype)
    sizes = {"batch": 32}
    for reference, right in (
        (definition.reference, "rounded before the weight"),
        (ONCE[kind], "rounded once"),
    ):
        definition.reference = reference
        for reading, op in families.ops_of(definition).items():
            function = loaded(op, tmp_path, [schema.Source("main.py", reference)])
            assert (outcome(op, function, sizes, dtype).error is None) == (reading == right), reading


def test_what_rounds_once_is_as_precise_as_the_judge_asks(tmp_path):
    definition = written.definition_of(NORM, "bf16")
    definition.reference = ONCE["norm"]
    op, other = families.ops_of(definition).values()
    args = op.inputs(Rand("cpu", torch.bfloat16, 1), 64)
    ours, once = other.reference(*args)[0].to(torch.bfloat16), op.reference(*args)[0]
    for got, refused in ((once.to(torch.bfloat16), False), (ours, True)):
        errors = ErrorsByWidth()
        errors.add(got, once, *op.tolerance(op.bound(*args)))
        assert (errors.refusal() is not None) == refused


WRONG = {
    "natural logarithm": ("/ math.log(2)", ""),
    "last page read whole": ("- 16 + int(kv_last_page_len[b])", ""),
    "scale left out": ("* sm_scale", ""),
    "heads of another group": ("repeat_interleave(heads // t.shape[1], dim=1)", "repeat(1, 2, 1)"),
    "a sequence without a token": ("-math.inf", "0.0"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_attention_is_wrong(fault, tmp_path):
    definition = written.definition_of(NHD, "fp32")
    (op,) = families.ops_of(definition).values()
    assert definition.reference.count(WRONG[fault][0]) == 1
    source = schema.Source("main.py", definition.reference.replace(*WRONG[fault]))
    function = loaded(op, tmp_path, [source])
    assert any(outcome(op, function, case.sizes, "fp32").error for case in op.cases)


def test_lists_of_pages_become_a_table_and_back():
    table = torch.tensor([[5, 2, 7], [1, 0, 0], [6, 9, 0], [3, 4, 8]], dtype=torch.int32)
    lengths = torch.tensor([48, 1, 17, 0], dtype=torch.int32)
    indptr, indices, last = attention.to_ragged(table, lengths, 16)
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == (
        [0, 3, 4, 6, 6],
        [5, 2, 7, 1, 6, 9],
        [16, 1, 1, 0],
    )
    back, lengths_back = attention.to_table(indptr, indices, last, 16)
    assert lengths_back.tolist() == lengths.tolist()
    assert back.tolist() == [[5, 2, 7], [1, 0, 0], [6, 9, 0], [0, 0, 0]]


def test_returned_outputs_are_compared_in_shape_and_dtype(tmp_path):
    (op,) = families.ops_of(written.definition_of(GEMM, "bf16")).values()
    for body, said in (
        ("A @ B.T", None),
        ("(A @ B.T,)", None),
        ("(A @ B.T).float()", "torch.float32"),
        ("(A @ B.T)[:, :3]", "[1, 3]"),
        ("None", "NoneType"),
    ):
        source = schema.Source("main.py", f"def run(A, B):\n    return {body}\n")
        error = outcome(op, loaded(op, tmp_path, [source]), {"batch": 1}).error
        assert error is None if said is None else said in error


def test_sources_import_each_other(tmp_path):
    (op,) = families.ops_of(written.definition_of(GEMM, "fp32")).values()
    sources = [
        schema.Source("src/main.py", "from .inner.product import run\n"),
        schema.Source("src/inner/product.py", "def run(A, B, C):\n    C.copy_(A @ B.T)\n"),
    ]
    function = loaded(op, tmp_path, sources, ("src/main.py", "run"), returns=False)
    assert outcome(op, function, {"batch": 3}, "fp32").error is None


# ---- what does not map -------------------------------------------------------------------------------------


def change(**changes):
    def apply(value):
        value.update(changes)

    return apply


UNMAPPED = {
    "gemma_rmsnorm_h64": (change(name="gemma_rmsnorm_h64"), "no op of ours computes it"),
    "another width": (change(name="rmsnorm_h128"), "the axis hidden_size is not the 128"),
    "another input": (
        lambda d: d["inputs"].update(eps={"shape": None, "dtype": "float32"}),
        "its inputs are hidden_states, weight, eps",
    ),
    "another shape": (
        lambda d: d["inputs"]["weight"].update(shape=["batch_size", "hidden_size"]),
        "weight has the shape",
    ),
    "fp8": (lambda d: [t.update(dtype="float8_e4m3fn") for t in d["inputs"].values()], "float8_e4m3fn"),
    "a width without end": (
        lambda d: d.update(
            name="rmsnorm_h9999999", axes={**d["axes"], "hidden_size": {"type": "const", "value": 9999999}}
        ),
        "hidden_states is larger than",
    ),
    "no EPS": (change(reference="def run(hidden_states, weight):\n    return 1\n"), "no constant EPS"),
}


@pytest.mark.parametrize("what", UNMAPPED)
def test_what_does_not_map_is_said(what, tmp_path, capsys):
    value = to_json(written.definition_of(NORM, "bf16"))
    apply, said = UNMAPPED[what]
    apply(value)
    path = tmp_path / "definition.json"
    path.write_text(json.dumps(value))
    assert cli.main(["import", str(path)]) == 2
    printed = capsys.readouterr()
    assert "does not map" in printed.out and said in printed.out
    assert printed.err.count("\n") == 1


def test_a_page_size_that_our_cache_has_not():
    subject = written.attention(4, 2, 64, 1)
    definition = Definition(
        subject.name,
        "gqa_paged",
        {name: schema.AxisConst(value) for name, value in subject.sizes.items()},
        *({} for _ in range(2)),
        reference="def run(): pass",
    )
    definition.inputs = written.definition_of(NHD, "bf16").inputs
    definition.outputs = written.definition_of(NHD, "bf16").outputs
    with pytest.raises(ValueError, match="page_size 1 is not one of 16"):
        families.require_family(definition)


def test_workloads_give_cases_and_the_large_ones_are_named():
    definition = written.definition_of(GEMM, "bf16")
    loads = [schema.Workload({"M": m}, {}, f"load {m}") for m in (2, 9, 5, 64, 65, 8192)]
    cases, left_out = families.cases_of(GEMM.family, definition, loads)
    assert [case.sizes["batch"] for case in cases] == [2, 9, 64]
    assert [line.split(":")[0] for line in left_out] == ["workload load 65", "workload load 8192"]


def test_a_workload_s_axis_that_the_definition_lacks_is_named():
    definition = written.definition_of(GEMM, "bf16")
    loads = [schema.Workload({"M": 2, "batch": 3}, {}, "load")]
    cases, (said,) = families.cases_of(GEMM.family, definition, loads)
    assert cases == [] and said.startswith("workload load: names the axis 'batch', which is not in the axes")


def test_constraints_that_no_case_of_ours_need_meet_are_said(capsys):
    definition = written.definition_of(NHD, "bf16")
    importing.show_definitions(importing.Dataset({definition.name: definition}))
    assert "constraints" not in capsys.readouterr().out
    definition.constraints.append("batch_size % 8 == 0")
    importing.show_definitions(importing.Dataset({definition.name: definition}))
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "    constraints that our inputs may not meet: 'batch_size % 8 == 0'"


# ---- bad files ---------------------------------------------------------------------------------------------


def solution(**changes):
    spec = {"language": "python", "target_hardware": ["cpu"], "entry_point": "main.py::run"}
    source = {"path": "main.py", "content": "def run(A, B, C): pass\n"}
    value = {"name": "s", "definition": GEMM.name, "author": "a", "spec": spec, "sources": [source]}
    for name, changed in changes.items():
        if name in ("path", "content"):
            source[name] = changed
        elif name in spec or name in ("binding", "destination_passing_style"):
            spec[name] = changed
        else:
            value[name] = changed
    return json.dumps(value)


WORKLOAD = {"axes": {"M": 1}, "inputs": {"A": {"type": "random"}}, "uuid": "u"}
EVALUATION = {"status": "PASSED", "environment": {"hardware": "H"}, "timestamp": "t"}
BAD = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[]", "is no JSON of flashinfer-bench"),
    "a key twice": ('{"sources": 1, "sources": 2}', "'sources' stands twice"),
    "nested": ('{"sources": ' + "[" * 40 + "]" * 40 + "}", "nested more than"),
    "nested for ever": ("[" * 100_000, "nested too deeply"),
    "NaN": ('{"sources": NaN}', "NaN is no number"),
    "a version": (solution(schema_version=2), "unknown field 'schema_version'"),
    "no author": (solution().replace('"author": "a", ', ""), "the field author is missing"),
    "an empty name": (solution(name=""), "name is empty"),
    "a number for a name": (solution(name=3), "name is 3, not str"),
    "a language": (solution(language="rust"), "'rust', none of python"),
    "a binding": (solution(binding="pybind"), "'pybind'"),
    "a text for a truth": (solution(destination_passing_style="yes"), "not bool"),
    "an entry point": (solution(entry_point="main.py"), "is not FILE::FUNCTION"),
    "an entry that is no source": (solution(entry_point="x.py::run"), "'x.py', which is not among"),
    "outside": (solution(path="../x.py"), "leads outside the folder"),
    "outside within": (solution(path="a/../../x.py"), "leads outside the folder"),
    "absolute": (solution(path="/tmp/x.py"), "is absolute"),
    "a drive": (solution(path="C:x.py"), "is absolute"),
    "a backslash": (solution(path="..\\x.py"), "leads outside the folder"),
    "a NUL": (solution(path="a\0.py"), "is no name of a file"),
    "no sources": (solution(sources=[]), "which is not among the sources"),
    "an input": (
        json.dumps({"definition": "d", "workload": {**WORKLOAD, "inputs": {"A": {}}}}),
        "its type must be",
    ),
    "a time beyond all numbers": (
        json.dumps(
            {
                "definition": "d",
                "workload": WORKLOAD,
                "evaluation": {**EVALUATION, "correctness": {}, "performance": {"latency_ms": 7}},
            }
        ).replace(": 7", ": 1e999"),
        "latency_ms is inf",
    ),
    "an axis below 0": (
        json.dumps({"definition": "d", "workload": {**WORKLOAD, "axes": {"M": -1}}}),
        "is -1",
    ),
    "no correctness": (
        json.dumps({"definition": "d", "workload": WORKLOAD, "solution": "s", "evaluation": EVALUATION}),
        "status PASSED needs correctness",
    ),
    "a definition without run": (
        json.dumps({**to_json(written.definition_of(GEMM, "bf16")), "reference": "x = 1"}),
        "no function `run`",
    ),
    "a definition named as a path": (
        json.dumps({**to_json(written.definition_of(GEMM, "bf16")), "name": "../x"}),
        "no name of a file",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_line(what, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(BAD[what][0])
    assert cli.main(["import", str(path), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and BAD[what][1] in printed.err and printed.out == ""


def test_a_solution_in_two_files_is_one_line(tmp_path, capsys):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(solution())
    assert cli.main(["import", str(tmp_path), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "the solution s stands in two files" in printed.err


def test_an_export_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main("export rmsnorm --out .".split()) == 0
    assert {p.name for p in Path.cwd().iterdir()} == {"definitions", "workloads", "solutions"}
    assert [p.name for p in tmp_path.iterdir()] == ["here"], "nothing is left beside it"


@pytest.mark.parametrize("name", ("missing.json", "kernel.cu", "empty"))
def test_a_path_that_holds_nothing_is_one_line(name, tmp_path, capsys):
    (tmp_path / "kernel.cu").touch()
    (tmp_path / "empty").mkdir()
    assert cli.main(["import", str(tmp_path / name), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- export ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "dataset"
    argv = ["export", "--model", "smollm2-135m", "--batch", "1,4", "--context", "40", "--out", str(out)]
    assert cli.main(argv) == 0
    return out


def test_an_export_can_be_read_and_says_what_it_lacks(dataset, tmp_path, capsys):
    files = sorted(file for file in dataset.rglob("*.json*"))
    made = [one for file in files for one in read(file)]
    kinds = {kind: [one for one in made if isinstance(one, kind)] for kind in (Definition, Solution, Trace)}
    assert {kind.__name__: len(found) for kind, found in kinds.items()} == {
        "Definition": 7,
        "Solution": 14,
        "Trace": 14,
    }
    for trace in kinds[Trace]:
        for name, one in trace.workload.inputs.items():
            if isinstance(one, schema.SafetensorsInput):
                from safetensors.torch import load_file

                assert load_file(dataset / one.path)[name].dtype == torch.int32
    assert cli.main(["export", "rope", "--out", str(tmp_path / "none")]) == 2
    printed = capsys.readouterr()
    assert "rope: not exported: " in printed.out and not (tmp_path / "none").exists()
    assert cli.main(["export", "--out", str(dataset)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_every_op_is_exported_or_has_a_reason():
    for op in OPS:
        assert op.name in families.OPS_WITH_FAMILY or exporting.reason(op)


def test_flashinfer_bench_reads_an_export(dataset, monkeypatch):
    """Its package data alone: the rest of it needs a GPU's packages."""
    spec = importlib.util.find_spec("flashinfer_bench")
    if spec is None:
        pytest.skip("flashinfer-bench is not installed")
    package = types.ModuleType("flashinfer_bench")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "flashinfer_bench", package)
    found = importlib.import_module("flashinfer_bench.data").TraceSet.from_path(str(dataset))
    assert len(found.definitions) == len(found.solutions) == len(found.workloads) == 7


# ---- measured rows -----------------------------------------------------------------------------------------

ENV = dict(
    schema=1, kind="env", run="r", when="before", device="cuda", gpu="NVIDIA H100", torch="2.11", time="2026"
)
ROW = dict(
    schema=1, kind="op", run="r", op="linear", backend="triton", dtype="bf16", batch=4, us=12.5, timer="graph"
)


def rows_of(tmp_path, *rows):
    path = Path(tmp_path) / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ENV, *rows)))
    return traces.measured_rows(path)


def test_a_measured_row_is_a_trace_and_a_foreign_trace_is_only_shown(tmp_path, capsys):
    row = {**ROW, "shape": {"n": 48, "k": 40}}
    warm, emulated = {**row, "cache": "warm"}, {**row, "timer": "wall", "emulated": True}
    paged = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_size": 16}
    attended = {**row, "op": "decode_attention", "backend": "cuda", "shape": paged, "context": 40}
    measured = rows_of(tmp_path, row, warm, emulated, attended)
    ((trace, tensors),) = traces.of_rows(GEMM, "bf16", measured)
    assert not tensors and traces.of_rows(GEMM, "fp16", measured) == []
    assert trace.workload.axes == {"M": 4} and trace.evaluation.performance.latency_ms == 0.0125
    ((decode, tensors),) = traces.of_rows(NHD, "bf16", measured)
    assert tensors["kv_last_page_len"].tolist() == [8] * 4 and decode.workload.axes["num_kv_indices"] == 12
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(to_json(one), allow_nan=False) + "\n" for one in (trace, decode)))
    back = read(path)
    assert to_json(back[0]) == to_json(trace)
    assert cli.main(["import", str(path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "foreign: gemm_n48_k40 M=4 lab_triton_gemm_n48_k40: PASSED, 12.5 us on NVIDIA_H100, as the file says"
    )
    assert len(lines) == 2 and not any(word in line for line in lines for word in ("faster", "slower"))


def test_records_without_a_measured_row_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no row of our kernels"):
        rows_of(tmp_path, {**ROW, "shape": {"n": 8, "k": 8}, "backend": "cublas"})


def test_reading_changes_nothing():
    value = to_json(written.definition_of(NHD, "bf16"))
    assert to_json(from_json(Definition, copy.deepcopy(value), "there and back")) == value
