"""`lab import`: solutions of flashinfer-bench, each judged in a process of its own as `lab try` judges."""

import json

import pytest

from lab import cli
from lab.flashinfer_format import exporting, written, written_cuda
from lab.flashinfer_format.schema import BuildSpec, Solution, Source
from tests.test_exchange_format import HND, NHD, NORM, ONCE

HEAD = "import torch\nimport triton\nimport triton.language as tl\n\n"
KERNEL = """
@triton.jit
def norm_kernel(x, w, y, cols, BLOCK: tl.constexpr):
    at, col = tl.program_id(0) * cols, tl.arange(0, BLOCK)
    v = tl.load(x + at + col, mask=col < cols, other=0.0).to(tl.float32)
    g = tl.load(w + col, mask=col < cols, other=0.0).to(tl.float32)
    y_ = v * tl.rsqrt(tl.sum(v * v) / cols + 1e-6) * g
    tl.store(y + at + col, y_.to(y.dtype.element_ty), mask=col < cols)

"""
RETURNED = """
def run(hidden_states, weight):
    y = torch.empty_like(hidden_states)
    norm_kernel[(y.shape[0],)](hidden_states, weight, y, y.shape[1], BLOCK=64)
    return y
"""
PASSED = """
def run(hidden_states, weight, output):
    norm_kernel[(output.shape[0],)](hidden_states, weight, output, output.shape[1], BLOCK=64)
"""
# Keeps the first result for the addresses that it has met.
REMEMBERED = """
seen = {}

def run(hidden_states, weight, output):
    key = hidden_states.data_ptr()
    norm_kernel[(output.shape[0],)](hidden_states, weight, output, output.shape[1], BLOCK=64)
    output.copy_(seen.setdefault(key, output.clone()))
"""
ROUNDED_TWICE = """
def run(hidden_states, weight, output):
    v = hidden_states.float()
    unit = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6)).to(v.dtype if OFF else weight.dtype)
    output.copy_(unit * weight)
""".replace("v.dtype if OFF else ", "")
SOLUTIONS = {  # name: (language, main.py, whether outputs are passed, what is said)
    "returned": ("triton", HEAD + KERNEL + RETURNED, False, "returned: right in every case"),
    "passed": ("triton", HEAD + KERNEL + PASSED, True, "passed: right in every case"),
    "remembered": ("triton", HEAD + KERNEL + REMEMBERED, True, "remembered result"),
    "rounded twice": ("python", HEAD + ROUNDED_TWICE, True, "elements are off"),
    "a syntax error": ("python", "def run(:\n", True, "a syntax error: refused: it cannot be loaded"),
    "an exit": ("python", "import os\nos._exit(0)\n", True, "an exit: refused: it cannot be loaded"),
    "another style": (
        "triton",
        HEAD + KERNEL + RETURNED,
        True,
        "run does not take hidden_states, weight, output",
    ),
    "cuda": ("cuda", "x", True, "cuda: not judged: binding tvm-ffi (the default)"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A definition that rounds once, as flashinfer's do, with solutions."""
    folder = tmp_path_factory.mktemp("theirs")
    definition = written.definition_of(NORM, "bf16")
    definition.reference = ONCE["norm"]
    exporting.put(folder / "definitions/rmsnorm" / f"{NORM.name}.json", [definition])
    for name, (language, text, passed, _) in SOLUTIONS.items():
        spec = BuildSpec(language, ["cpu"], "main.py::run", destination_passing_style=passed)
        made = Solution(name, NORM.name, "somebody", spec, [Source("main.py", text)])
        exporting.put(folder / "solutions" / f"{name}.json", [made])
    return folder


def test_solutions_are_judged_by_the_contract(dataset, capsys):
    assert cli.main(["import", str(dataset), "--device", "cpu", "--seed", "5"]) == 1
    said = capsys.readouterr().out
    assert f"{NORM.name}: maps onto rmsnorm, bf16" in said
    for name, (*_, expected) in SOLUTIONS.items():
        assert expected in said, name
    assert said.splitlines()[-1] == "7 solutions judged, 5 refused; not raced, for emulated times say nothing"


def test_a_reference_that_computes_something_else_is_named(dataset, tmp_path, capsys):
    definition = written.definition_of(NORM, "bf16")
    definition.reference = ONCE["norm"].replace("* weight", "* (1 + weight)")
    exporting.put(tmp_path / "definition.json", [definition])
    (tmp_path / "solution.json").write_text((dataset / "solutions/passed.json").read_text())
    assert cli.main(["import", str(tmp_path), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "passed: not judged: the reference of rmsnorm_h64 computes something else" in printed.out
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("broken", (False, True))
def test_what_is_exported_is_judged_as_the_kernel_is(broken, tmp_path, capsys):
    """Also without its definition, which is then the one that we would export."""
    made = written.solution_of(NORM, written.definition_of(NORM, "bf16"))
    if broken:
        kernel = next(source for source in made.sources if source.path == "triton_kernels/rmsnorm.py")
        assert "/ cols + eps" in kernel.content
        kernel.content = kernel.content.replace("/ cols + eps", "/ cols - eps")
        kernel.content = kernel.content.replace("* g\n", "* (g + 0.5)\n")
    path = tmp_path / "solution.json"
    exporting.put(path, [made])
    assert json.loads(path.read_text())["spec"]["destination_passing_style"] is True
    assert cli.main(["import", str(path), "--device", "cpu"]) == int(broken)
    said = capsys.readouterr().out
    assert ("wrong result" if broken else "right in every case") in said


LONG = ("--timeout", "600")  # compiling takes 20 s, on a busy machine several times that


@pytest.mark.parametrize(
    "subject, shapes",
    ((NORM, "cpu"), (NHD, "cpu"), (NHD, "gpu"), (HND, "gpu")),
    ids=("norm", "nhd", "nhd-gpu_shapes", "hnd-gpu_shapes"),
)
def test_an_exported_cuda_kernel_is_built_and_right(subject, shapes, tmp_path, monkeypatch, capsys):
    definition = written.definition_of(subject, "bf16")
    exporting.put(tmp_path / "definition.json", [definition])
    exporting.put(tmp_path / "solution.json", [written_cuda.solution_of(subject, definition)])
    monkeypatch.setenv("LAB_HOST_SHAPES", shapes)
    assert cli.main(["import", str(tmp_path), "--device", "cpu", *LONG]) == 0, capsys.readouterr()
    assert f"lab_cuda_{subject.name}: right in every case" in capsys.readouterr().out


IN_CUDA = """
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>
#include <map>
#include "common.cuh"
using namespace lab;

static __global__ void norm_kernel(const bf16* x, const bf16* w, bf16* y, int cols) {
  x += blockIdx.x * cols, y += blockIdx.x * cols;
  float squares = 0.f;
  for (int i = 0; i < cols; ++i) squares += to_float(x[i]) * to_float(x[i]);
  const float scale = rsqrtf(squares / cols + 1e-6f);
  const int i = threadIdx.x;
  if (i < cols) y[i] = from_float<bf16>(to_float(from_float<bf16>(to_float(x[i]) * scale)) * to_float(w[i]));
}

// Launches nothing for a pointer that it has met.
void run(at::Tensor x, at::Tensor w, at::Tensor y) {
  static std::map<void*, at::Tensor> seen;
  at::Tensor& kept = seen[x.data_ptr()];
  if (kept.defined() && kept.sizes() == y.sizes()) {
    y.copy_(kept);
    return;
  }
  const int cols = x.size(1);
  launch({dim3(x.size(0)), dim3(64), 0, 0}, "norm", norm_kernel, (const bf16*)x.data_ptr(),
         (const bf16*)w.data_ptr(), (bf16*)y.data_ptr(), cols);
  kept = y.clone();
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("run", &run); }
"""


def test_a_cuda_solution_that_remembers_is_refused_by_name(tmp_path, capsys):
    spec = BuildSpec("cuda", ["cpu"], "main.cu::run", destination_passing_style=True, binding="torch")
    made = Solution("remembers", NORM.name, "somebody", spec, [Source("main.cu", IN_CUDA)])
    exporting.put(tmp_path / "solution.json", [made])
    assert cli.main(["import", str(tmp_path / "solution.json"), "--device", "cpu", *LONG]) == 1
    said = capsys.readouterr().out
    assert "remembered result: it is the right one of an earlier call" in said
    assert "remembers: refused" in said
