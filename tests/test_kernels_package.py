"""`make kernels-package`: a folder that Hugging Face's package `kernels` loads, with every op in Triton."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest

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
