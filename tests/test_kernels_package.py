"""`make kernels-package`: a folder that Hugging Face's package `kernels` loads, with every op in Triton, and
one that its builder compiles, with every op in CUDA."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from commands import ROOT
from torch.utils.cpp_extension import include_paths

from lab import own_modules
from lab.errors import LabError
from lab.machine import kernels_package
from lab.ops import OPS

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "decode-kernel-lab"
    kernels_package.build(out)
    return out


def test_it_has_the_layout_of_a_package_without_compiled_code(package):
    assert {path.name for path in package.iterdir()} == set(
        "build.toml README.md LICENSE torch-ext tests benchmarks build".split()
    )
    for backend in kernels_package.BACKENDS:
        variant = package / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"].isidentifier()
        assert (variant / "__init__.py").is_file()
        for op in OPS:
            assert (variant / "lab/ops" / f"{op.name}.py").is_file()
            assert (variant / "triton_kernels" / f"{op.name}.py").is_file()
    if tomllib is not None:
        declared = tomllib.loads((package / "build.toml").read_text())["general"]
        assert tuple(declared["backends"]) == kernels_package.BACKENDS


def test_no_module_of_it_imports_this_repository(package):
    modules = list((package / "build/torch-cuda").rglob("*.py"))
    assert len(modules) > 50
    for path in modules:
        assert not list(own_modules.imports(ast.parse(path.read_text()))), path
    assert not (package / "build/torch-cuda/lab/model").exists()


def test_a_package_of_before_is_replaced_and_nothing_else(package, tmp_path, capsys):
    (package / "build/stale").mkdir()
    assert kernels_package.main(["--out", str(package)]) == 0
    assert not (package / "build/stale").exists()
    (tmp_path / "precious").write_text("")
    assert kernels_package.main(["--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err and (tmp_path / "precious").exists()


def test_an_import_that_cannot_be_made_relative_is_refused():
    with pytest.raises(LabError, match="import lab.ops"):
        list(own_modules.imports(ast.parse("import lab.ops")))


def test_the_package_kernels_loads_it_and_its_own_tests_pass(package, tmp_path):
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("needs the package kernels: pip install kernels")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")]
    ended = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 passed" in ended.stdout


# ---- in CUDA: what Hugging Face's kernel-builder compiles --------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels") / "decode-kernel-lab-cuda"
    kernels_package.build(out, "cuda")
    return out


def test_the_cuda_package_has_the_layout_that_the_builder_takes(sources):
    assert {path.name for path in sources.iterdir()} == set(
        "build.toml README.md LICENSE torch-ext tests cuda_src".split()
    )
    modules = sources / "torch-ext/decode_kernel_lab_cuda"
    assert 'use("cuda")' in (modules / "__init__.py").read_text()
    for path in modules.rglob("*.py"):
        assert not list(own_modules.imports(ast.parse(path.read_text()))), path
    assert not (modules / "triton_kernels").exists() and (modules / "cuda_src/tuned/sm_90.json").is_file()
    if tomllib is None:
        return
    declared = tomllib.loads((sources / "build.toml").read_text())
    assert declared["general"]["name"].replace("-", "_") == kernels_package.CUDA
    kernel = declared["kernel"]["decode"]
    assert kernel["backend"] == "cuda" and "9.0a" in kernel["cuda-capabilities"]
    listed = {*declared["torch"]["src"], *kernel["src"]}
    assert all((sources / name).is_file() for name in listed)
    there = {path.relative_to(sources).as_posix() for path in (sources / "cuda_src").rglob("*.*")}
    assert there <= listed and {f"cuda_src/{op.name}.cu" for op in OPS} <= listed


def test_every_op_has_a_launcher_in_it():
    launchers = kernels_package.launchers()
    assert {op.name for op in OPS} == launchers.keys()
    assert launchers["silu_mul"] == ("gate_up", "y", "rows", "cols", "dtype", "stream")


# registration.h is the builder's; _ops.py, too.
REGISTRATION = """
#define TORCH_LIBRARY_EXPAND(name, module) TORCH_LIBRARY(name, module)
#define REGISTER_EXTENSION(name)
"""
OPS_MODULE = """
import torch
torch.ops.load_library({library!r})
ops = torch.ops.lab_package_test
"""
USES = """
import pytest, torch
import decode_kernel_lab_cuda as kernel
from decode_kernel_lab_cuda._ops import ops

x, w = torch.randn(3, 576), torch.randn(576)
want = torch.nn.functional.rms_norm(x, (576,), w, 1e-5)
torch.testing.assert_close(kernel.rmsnorm(x, w, 1e-5), want)
x, w = torch.randn(2, 256), torch.randn(96, 256) / 16
torch.testing.assert_close(kernel.linear(x, w), x @ w.T, rtol=1e-3, atol=1e-3)
logits, positions = torch.randn(2, 301), torch.tensor([1, 2], dtype=torch.int32)
assert kernel.sample(logits, positions).tolist() == logits.argmax(-1).tolist()
wrong = {"no integer": [1.5] * 13, "too few": [1] * 3, "too many": [1] * 99, "not fit": [1 << 40] * 13}
for says, values in wrong.items():
    with pytest.raises(RuntimeError, match=says):
        ops.rmsnorm(values)
extension = kernel.lab.extension.load("_cuda")
with pytest.raises(TypeError, match="gate_up, y, rows"):
    extension.silu_mul(rows=1)
extension.set_settings([("linear", 2, 4, (96, 256), {"share": 2})])
extension.set_trace(True)
kernel.silu_mul(torch.randn(2, 64))
assert extension.take_trace() == ["silu_mul_kernel"]
"""


def test_its_binding_calls_the_kernels(sources, tmp_path):
    """The binding as it is, compiled for this machine's torch, with the host build's kernels."""
    objects = [
        p for p in (ROOT / "build/host").glob("*.o") if not p.name.startswith(("bindings", "build_facts"))
    ]
    shaped = [p for p in objects if p.name.startswith("gpu_shapes_")]
    plain = [p for p in objects if p.name.endswith(".cu.o") and p not in shaped]
    chosen = [p for p in objects if p not in (plain if shaped else [])]
    if not chosen:
        pytest.skip("needs the objects of the host build")
    (tmp_path / "registration.h").write_text(REGISTRATION)
    folders = [*include_paths(), tmp_path, sources / "cuda_src", sources / "torch-ext"]
    library = tmp_path / "binding.so"
    libraries = f"{torch.__path__[0]}/lib"
    command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread"]
    command += ["-DTORCH_EXTENSION_NAME=lab_package_test", *(f"-I{folder}" for folder in folders)]
    command += [str(sources / "torch-ext/torch_binding.cpp"), *map(str, chosen), "-o", str(library)]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    modules = sources / "torch-ext/decode_kernel_lab_cuda"
    (modules / "_ops.py").write_text(OPS_MODULE.format(library=str(library)))
    ended = subprocess.run(
        [sys.executable, "-c", USES],
        env={**os.environ, "PYTHONPATH": str(modules.parent), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
