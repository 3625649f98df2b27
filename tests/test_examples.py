"""The scripts of examples/ run, and are short."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, write_folder

from lab import torch_ops

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments) -> what the example prints."""

    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code
        finally:
            torch.set_default_device(None)
            torch_ops.use(None)
        return capsys.readouterr().out

    return run


def test_there_are_five_and_each_is_short():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 5
    for script in scripts:
        assert len(script.read_text().splitlines()) < 40, script


def test_call_an_op(run):
    out = run("call_an_op.py")
    assert [line.split()[0] for line in out.splitlines()] == ["torch", "cuda", "triton", "compiled:"]


def test_swap_one_op(run, tmp_path):
    write_folder(tmp_path, CONFIGS["llama"])
    out = run("swap_one_op.py", tmp_path)
    assert "rope by triton" in out and "linear by cuda" in out and "the same tokens" in out


@pytest.mark.filterwarnings("ignore")
def test_a_transformers_model(run):
    for package in ("transformers", "kernels"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install transformers kernels")
    out = run("transformers_model.py")
    # Five norms in each of 20 steps; two layers' attention in all but the prompt's.
    assert "the same tokens" in out and "'calls': 100" in out and "'calls': 38" in out


@pytest.mark.skipif(os.name != "posix", reason="kernels' processes need POSIX")
def test_race_a_kernel(run, tmp_path):
    assert "right" in run("race_a_kernel.py", tmp_path).splitlines()[-1]


def test_draw_a_report(run, tmp_path, undrawn):
    out = run("draw_a_report.py", tmp_path)
    assert "silu_mul by cuda" in out and (tmp_path / "index.html").stat().st_size > 10_000
