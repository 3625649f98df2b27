"""An extension that is not of the sources as they are now is refused by name, by every verb that runs
kernels."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import backends, cli, extension
from lab.backends.cuda import Backend
from lab.errors import LabError

ROOT = Path(__file__).resolve().parent.parent


def built_from(root, *names, patterns=("cuda_src/*.cu",)):
    """A module that says it was made of these files of `root`, as they are now."""
    info = {"sources": {name: extension.digest(root / name) for name in names}, "patterns": list(patterns)}
    return SimpleNamespace(build_info=lambda: info)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "cuda_src").mkdir()
    for name in ("rmsnorm.cu", "rope.cu", "common.cuh"):
        (tmp_path / "cuda_src" / name).write_text(f"// {name}\n")
    return tmp_path


ALL = ("cuda_src/rmsnorm.cu", "cuda_src/rope.cu", "cuda_src/common.cuh")


def test_what_differs_is_named(project):
    module = built_from(project, *ALL)
    assert extension.changed(module, project) is None
    (project / "cuda_src/common.cuh").write_text("// other\n")
    assert extension.changed(module, project) == "cuda_src/common.cuh has changed"
    (project / "cuda_src/new.cu").write_text("")
    (project / "cuda_src/rope.cu").unlink()
    assert extension.changed(module, project) == "cuda_src/new.cu was added, and 2 more files differ,"
    (project / "cuda_src/new.cu").unlink()
    (project / "cuda_src/common.cuh").write_text("// common.cuh\n")
    assert extension.changed(module, project) == "cuda_src/rope.cu is gone"


def test_contents_count_and_not_times(project):
    module, path = built_from(project, *ALL), project / "cuda_src/rope.cu"
    os.utime(path, (2e9, 2e9))
    assert extension.changed(module, project) is None
    text = path.read_text()
    path.write_text("// r0pe.cu\n")
    os.utime(path, (1, 1))  # as `git checkout` or `cp -p` may leave it
    assert extension.changed(module, project) == "cuda_src/rope.cu has changed"
    path.write_text(text)
    assert extension.changed(module, project) is None


def test_a_build_that_notes_no_sources_is_too_old(project):
    assert extension.changed(SimpleNamespace(build_info=lambda: {"compiler": "g++"}), project)


def test_an_installed_package_has_no_sources_to_compare(project):
    module = built_from(project, *ALL)
    shutil.rmtree(project / "cuda_src")
    assert extension.changed(module, project) is None


@pytest.mark.parametrize("name", ["_host", "_cuda"])
def test_an_installed_extension_notes_every_kernel_and_header(name):
    if importlib.util.find_spec(f"lab.{name}") is None:
        pytest.skip(f"lab.{name} is not built")
    info = __import__(f"lab.{name}", fromlist=["build_info"]).build_info()
    if "sources" not in info:
        pytest.skip(f"lab.{name} is an old build, which is refused")
    files = {
        f"cuda_src/{path.relative_to(ROOT / 'cuda_src')}"
        for pattern in ("*.cu", "*.cuh", "*.h", "ladder/*.cu")
        for path in (ROOT / "cuda_src").glob(pattern)
    } | {"cuda_src/bindings.cpp", "setup.py"}
    if name == "_host":
        files |= {f"cuda_src/host/{path.name}" for path in (ROOT / "cuda_src/host").glob("*.cpp")}
        assert "cuda_src/host/cuda_on_cpu.h" in info["sources"]
    changed = extension.changed(SimpleNamespace(build_info=lambda: info))
    if changed:
        pytest.skip(f"{changed} since lab.{name} was built")
    assert files <= set(info["sources"])


def test_comparing_takes_less_than_50_ms():
    module = extension.load("_host")
    times = []
    for _ in range(5):
        began = time.process_time()
        extension.changed(module)
        times.append(time.process_time() - began)
    assert min(times) < 0.05


# ---- every verb that runs kernels --------------------------------------------------------------------------

TINY = ("--weights", "random", "--ids", "1", "--device", "cpu", "smollm2-135m")
VERBS = {
    "check": ("check", "--op", "rmsnorm", "--backend", "cuda", "--device", "cpu"),
    "check, all backends": ("check", "--op", "rmsnorm", "--device", "cpu", "--quick"),
    "check --ladder": ("check", "--ladder", "--backend", "cuda", "--device", "cpu", "--quick"),
    "run": ("run", "--backend", "cuda", "--max-new-tokens", "1", *TINY),
    "run, one op": ("run", "--backend", "torch", "--override", "rope=cuda", "--max-new-tokens", "1", *TINY),
    "bench": ("bench", "ops", "rmsnorm", "--device", "cpu", "--quick", "--out", "OUT"),
    "bench model": ("bench", "model", "smollm2-135m", "--device", "cpu", "--quick", "--out", "OUT"),
    "bench --ladder": ("bench", "ops", "--ladder", "--device", "cpu", "--out", "OUT"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_a_stale_build_in_one_line(verb, monkeypatch, capfd, tmp_path):
    host = extension.load("_host")
    info = host.build_info()
    info["sources"]["cuda_src/rmsnorm.cu"] = "0" * 16
    stale = SimpleNamespace(**{name: getattr(host, name) for name in dir(host) if not name.startswith("__")})
    stale.build_info = lambda: info
    monkeypatch.setitem(sys.modules, "lab._host", stale)
    backends.load.cache_clear()
    try:
        status = cli.main([str(tmp_path / "out") if word == "OUT" else word for word in VERBS[verb]])
    finally:
        backends.load.cache_clear()
    out, err = capfd.readouterr()
    assert status == 2, out + err
    assert err.splitlines()[-1] == (
        "lab: error: cuda_src/rmsnorm.cu has changed since lab._host was built: run `make build`"
    )


def test_inspect_refuses_a_stale_gpu_build(monkeypatch):
    from lab.inspect import cuda_code

    monkeypatch.setitem(sys.modules, "lab._cuda", built_from(ROOT, "cuda_src/absent.cu", patterns=()))
    monkeypatch.setattr(extension, "changed", lambda module: "cuda_src/rope.cu has changed")
    with pytest.raises(
        LabError,
        match=re.escape(
            "cuda_src/rope.cu has changed since lab._cuda was built: run `LAB_CUDA=1 make build`"
        ),
    ):
        cuda_code.kernels(None, (), None)


def test_another_build_may_be_handed_in():
    """`lab try` builds from the sources as they are, and the tests have builds of their own."""
    host = extension.load("_host")
    own = SimpleNamespace(**{name: getattr(host, name) for name in dir(host) if not name.startswith("__")})
    own.build_info = lambda: {"compiler": "mine"}
    assert Backend(torch.device("cpu"), own).compiler == "mine"


# ---- the build ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_project(tmp_path):
    """setup.py with one small kernel: what it takes to see which edits are noticed."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("lab", "triton_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    source = tmp_path / "cuda_src"
    (source / "host").mkdir(parents=True)
    (source / "header.h").write_text("#pragma once\ninline int value() { return 1; }\n")
    (source / "kernel.cu").write_text('#include "header.h"\nint kernel() { return value(); }\n')
    (source / "bindings.cpp").write_text(
        "#include <Python.h>\n#include <string>\nint kernel();\nnamespace lab { const char* build_facts(); "
        "}\n"
        'static PyObject* info(PyObject*, PyObject*) { return Py_BuildValue("si", lab::build_facts(), '
        "kernel()); }\n"
        'static PyMethodDef methods[] = {{"info", info, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};\n'
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", "", -1, methods};\n'
        "#define NAMED_(name) PyInit_##name\n"
        "#define NAMED(name) NAMED_(name)\n"
        'extern "C" __attribute__((visibility("default"))) PyObject* NAMED(LAB_MODULE)() '
        "{ return PyModule_Create(&module); }\n"
    )
    return tmp_path


def build(project, name="_host", folder=None, **environment):
    """What was compiled, and what the extension says: of the project's own folder, or built into another."""
    where = ["--build-lib", str(folder)] if folder else ["--inplace"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *where],
        cwd=project,
        text=True,
        capture_output=True,
        env={**os.environ, "LAB_CUDA": "0", "PYTHONPATH": "", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (folder or project).glob(f"lab/{name}.*.so")
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from importlib import machinery, util; "
            f"loader = machinery.ExtensionFileLoader({name!r}, {str(file)!r}); "
            f"built = util.module_from_spec(util.spec_from_loader({name!r}, loader)); "
            "facts, value = built.info(); print(json.dumps([json.loads(facts), value]))",
        ],
        text=True,
        capture_output=True,
        check=True,
    )
    info, value = json.loads(said.stdout)
    compiled = re.findall(r"^  \S+ (\S.*)  [\d.]+ s$", done.stdout, re.M)
    assert extension.changed(SimpleNamespace(build_info=lambda: info), project) is None
    return SimpleNamespace(value=value, compiled=sorted(Path(name).name for name in compiled), info=info)


def test_an_edit_with_an_old_date_is_compiled(small_project):
    assert build(small_project).compiled == ["bindings.cpp", "build_facts.cpp", "kernel.cu"]
    assert build(small_project).compiled == []
    header = small_project / "cuda_src/header.h"
    header.write_text(header.read_text().replace("1", "2"))
    os.utime(header, (1, 1))
    again = build(small_project)
    assert (again.value, again.compiled) == (2, ["build_facts.cpp", "kernel.cu"])
    os.utime(header)  # a new date alone compiles nothing
    assert build(small_project).compiled == []


def test_a_kernel_that_was_removed_is_no_longer_noted(small_project):
    extra = small_project / "cuda_src/extra.cu"
    extra.write_text("int extra() { return 0; }\n")
    assert "cuda_src/extra.cu" in build(small_project).info["sources"]
    extra.unlink()
    assert "cuda_src/extra.cu" not in build(small_project).info["sources"]


# A file with two parts, and what stands for nvcc: g++ without the options that it does not know.
IN_PARTS = """#include "header.h"
template <typename T, int N>
void part_of(int& sum) { sum += N * int(sizeof(T)); }
#ifdef LAB_PART
extern template void part_of<char, 10>(int&);
extern template void part_of<short, 100>(int&);
template void part_of<LAB_PART>(int&);
#endif
__attribute__((weak)) int kernel() {
  int sum = value();
  part_of<char, 10>(sum), part_of<short, 100>(sum);
  return sum;
}
"""
NVCC = """#!/usr/bin/env python3
import re, subprocess, sys
words = [w for w in sys.argv[1:] if not re.match("-(gencode|Xptxas|lineinfo|cudart|Xcompiler)", w)]
words = ["c++" if w == "cu" else w for w in words]
sys.exit(subprocess.call(["g++", "-fPIC", *words]))
"""


@pytest.fixture
def project_in_parts(small_project, monkeypatch):
    (small_project / "cuda_src/kernel.cu").write_text(IN_PARTS)
    nvcc = small_project / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    return small_project


PARTS = ["kernel.cu <char, 10>", "kernel.cu <short, 100>"]


def test_nvcc_compiles_a_file_in_the_parts_that_it_declares(project_in_parts):
    gpu = build(project_in_parts, "_cuda", LAB_CUDA="1")
    assert gpu.value == 1 + 10 + 200
    # The first of them is compiled by g++, which is quick, for the CPU.
    assert [name for name in gpu.compiled if "kernel" in name] == ["kernel.cu", *PARTS]
    assert build(project_in_parts, "_cuda", LAB_CUDA="1").compiled == []
    assert build(project_in_parts).value == gpu.value


def test_a_tried_file_is_compiled_in_the_parts_of_the_file_that_it_includes(project_in_parts, tmp_path):
    build(project_in_parts, "_cuda", LAB_CUDA="1")
    mine = tmp_path / "mine.cu"
    mine.write_text('#include "header.h"\n#define value() 1000\n#include "kernel.cu"\n')
    tried = build(
        project_in_parts, "_cuda", tmp_path / "tried", LAB_CUDA="1", LAB_TRY=f"kernel={tmp_path / 'mine.cu'}"
    )
    assert tried.value == 1000 + 10 + 200
    assert [name for name in tried.compiled if "kernel" in name or "mine" in name] == [
        part.replace("kernel", "mine") for part in PARTS
    ]
