"""`lab import`: which solutions in CUDA are taken, and the race of a solution. The race runs on the CPU,
where only its path is worth something: `lab import` itself does not race there."""

import json
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from lab import cli
from lab.errors import Unavailable
from lab.flashinfer_format import building, exporting, importing, racing, written, written_cuda
from lab.flashinfer_format.families import ops_of
from lab.flashinfer_format.schema import BuildSpec, Solution, Source, read
from lab.records import schema
from tests.test_exchange_format import HND, NHD, NORM, ONCE
from tests.test_exchange_judge import HEAD, KERNEL, PASSED, REMEMBERED

GEMM = written.subject_of("gemm_n{N}_k{K}", N=48, K=64)


def stored(folder, **changes):
    """A solution's file, of the field's own words."""
    spec = {"language": "cuda", "target_hardware": ["cpu"], "entry_point": "main.cu::run", "binding": "torch"}
    made = {"name": "theirs", "definition": NORM.name, "author": "somebody", "spec": spec}
    made["sources"] = [{"path": "main.cu", "content": "void run() {}"}]
    for name, value in changes.items():
        (spec if name in spec or name == "version" else made)[name] = value
    if spec["binding"] is None:
        del spec["binding"]
    path = folder / "solution.json"
    path.write_text(json.dumps(made))
    return path


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"binding": "nanobind"}, "binding is 'nanobind', none of tvm-ffi, torch"),
        ({"language": "hip"}, "language is 'hip', none of python"),
        ({"entry_point": "other.cu::run"}, "entry_point names 'other.cu', which is not among the sources"),
        ({"entry_point": "main.cu"}, "entry_point 'main.cu' is not FILE::FUNCTION"),
        ({"sources": [{"path": "../main.cu", "content": "x"}]}, "leads outside the folder of the sources"),
        ({"sources": [{"path": "/tmp/main.cu", "content": "x"}]}, "is absolute"),
        ({"version": "2.0"}, "unknown field 'version'"),
    ],
)
def test_a_solution_that_is_none_is_one_line(changes, said, tmp_path, capsys):
    assert cli.main(["import", str(stored(tmp_path, **changes)), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"binding": "tvm-ffi"}, "not judged: binding tvm-ffi: its headers are not part of this lab"),
        ({"binding": None}, "not judged: binding tvm-ffi (the default): its headers"),
        ({"language": "cpp"}, "not judged: language cpp: taken are python, triton, cuda"),
        (
            {"entry_point": "main.py::run", "sources": [{"path": "main.py", "content": "x = 1"}]},
            "not judged: its entry point is in main.py, which is no .cu or .cpp",
        ),
        (
            {"sources": [{"path": "main.cu", "content": "void run() {\n  kernel<<<1, 32>>>(x);\n}\n"}]},
            "not judged: its CUDA does not compile for the CPU, judge it on a GPU: line 2: kernel<<<",
        ),
        (
            {"sources": [{"path": "main.cu", "content": "#include <cuda_pipeline.h>\n"}]},
            "not judged: its CUDA does not compile for the CPU, judge it on a GPU: main.cu:1:10: fatal error",
        ),
    ],
)
def test_what_is_not_taken_is_said_in_a_line(changes, said, tmp_path, capsys):
    path = stored(tmp_path, **changes)
    assert cli.main(["import", str(path), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert f"theirs: {said}" in printed.out
    assert printed.err == f"lab: error: {path}: nothing in it can be judged; the lines above say why\n"


@pytest.mark.parametrize(
    "text, limits, said",
    [
        ("", (0.001, None), r"took more than 0.001 s \(--timeout\)"),
        ('#include "/dev/zero"\n', (60, 1 << 27), r"took more than 0.125 GiB of memory \(--memory\)"),
    ],
)
def test_a_build_beyond_its_limits_is_said(text, limits, said, tmp_path):
    made = Solution("slow", "x", "y", BuildSpec("cuda", ["cpu"], "a.cu::run"), [Source("a.cu", text)])
    (tmp_path / "a.cu").write_text(text)
    with pytest.raises(importing.LabError, match=f"^compiling its sources {said}$"):
        building.build(made, tmp_path, "cpu", *limits)


BY_NINJA = """Traceback (most recent call last):
  File "subprocess.py", line 571, in run
    raise CalledProcessError(retcode, process.args,
subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.
FAILED: a.cuda.o
a.cu(3): error: identifier "y" is undefined
RuntimeError: Error building extension 'theirs'
"""


def test_on_a_gpu_the_compilers_line_is_said_and_missing_tools_judge_nothing(tmp_path, monkeypatch):
    made = Solution("theirs", "x", "y", BuildSpec("cuda", ["H100"], "a.cu::run"), [Source("a.cu", "")])
    monkeypatch.setattr(building, "run_group", lambda *_: (1, BY_NINJA))
    monkeypatch.setattr(building.shutil, "which", lambda tool, path: tool)
    with pytest.raises(importing.LabError, match=r"do not compile: a.cu\(3\): error: identifier"):
        building.build(made, tmp_path, "cuda", 60)
    monkeypatch.setattr(building.shutil, "which", lambda tool, path: None)
    with pytest.raises(Unavailable, match="ninja"):
        building.build(made, tmp_path, "cuda", 60)


@pytest.mark.parametrize("subject", [NORM, GEMM, NHD, HND])
def test_an_exported_cuda_solution_has_all_that_it_includes(subject, tmp_path):
    definition = written.definition_of(subject, "bf16")
    exporting.put(tmp_path / "solution.json", [written_cuda.solution_of(subject, definition)])
    (made,) = read(tmp_path / "solution.json")
    assert (made.spec.language, made.spec.binding, made.entry) == ("cuda", "torch", ("main.cpp", "run"))
    assert made.spec.destination_passing_style is True
    paths = {source.path for source in made.sources}
    paged = subject.family.op == "decode_attention"
    assert f"{subject.family.op}.cu{'h' * paged}" in paths and "common.cuh" in paths
    # Only the emulation of CUDA, which is of this repository, stays here: a GPU's compiler needs none of it.
    assert [path for path in paths if path.startswith("host/") or ".." in path] == ["host/shapes.h"]
    compiled = {path for path in paths if path.endswith(building.COMPILED)}
    assert compiled == {"main.cpp", "paged_lists.cu" if paged else f"{subject.family.op}.cu"}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("subject", [NORM, GEMM, NHD])
def test_a_gpus_compiler_finds_all_that_an_exported_solution_includes(subject, tmp_path):
    made = written_cuda.solution_of(subject, written.definition_of(subject, "bf16"))
    for source in made.sources:
        (tmp_path / source.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source.path).write_text(source.content)
    (kernel,) = tmp_path.glob("*.cu")
    done = subprocess.run(
        ["nvcc", "-arch=sm_80", "-std=c++17", "-E", str(kernel), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---- the race ----------------------------------------------------------------------------------------------


HALF = PASSED.replace("(output.shape[0],)", "((output.shape[0] + 1) // 2,)")


def raced(text, tmp_path, monkeypatch, batch=16):
    """The row of a solution, and the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    definition = written.definition_of(NORM, "bf16")
    definition.reference = ONCE["norm"]
    spec = BuildSpec("triton", ["cpu"], "main.py::run")
    made = Solution("s", NORM.name, "them", spec, [Source("main.py", text)])
    args = SimpleNamespace(
        timeout=60, memory=1, seed=1, out=str(tmp_path / "out"), batches=[batch], contexts=[16]
    )
    found = importing.Readings("cpu", args, tmp_path)
    with found.worker(definition, "s", made.sources, made.entry, "triton", returns=False) as worker:
        worker.start()
        racing.race(made, definition, ops_of(definition)["rounded once"], worker, args, ("torch",))
    rows = [r for r in schema.read(tmp_path / "out/them_s").rows if r.kind == "op"]
    return next(r for r in rows if r.backend == "them/s"), [r for r in rows if r.backend != "them/s"]


def test_an_honest_solution_is_raced_beside_ours(undrawn, tmp_path, monkeypatch, capsys):
    mine, (other,) = raced(HEAD + KERNEL + PASSED, tmp_path, monkeypatch)
    assert mine.error is None and mine.us > 0 and "torch" in mine.verdict
    assert (mine.op, mine.batch, mine.shape) == ("rmsnorm", 16, {"cols": 64}) and other.us > 0
    assert "cols=64: " in capsys.readouterr().out
    assert "them/s" in (tmp_path / "out/them_s/index.html").read_text()


@pytest.mark.parametrize("text, kind", [(REMEMBERED, "remembered result"), (HALF, "unwritten output")])
def test_a_solution_that_cheats_in_the_race_has_no_time(text, kind, tmp_path, monkeypatch, capsys):
    mine, (other,) = raced(HEAD + KERNEL + text, tmp_path, monkeypatch)
    assert mine.us is None and mine.error.startswith(f"{kind}: in the race"), mine.error
    assert other.us > 0


def test_points_are_the_definitions_sizes():
    attention = written.attention(q_heads=8, kv_heads=2, head_dim=64, page_size=16)
    points = racing.points_of(written.definition_of(attention, "bf16"), [1, 2], [64])
    assert [(p.op, p.batch, p.context) for p in points] == [
        ("decode_attention", 1, 64),
        ("decode_attention", 2, 64),
    ]
    assert points[0].shape == {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "page_size": 16}
    (gemm,) = racing.points_of(written.definition_of(GEMM, "bf16"), [4], [64])
    assert (gemm.op, gemm.context, gemm.shape) == ("linear", None, {"n": 48, "k": 64})
