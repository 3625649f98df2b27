"""`lab try`: a copy of a built-in kernel passes in its place, a broken one does not, and nothing else changes."""
import sys
from types import SimpleNamespace

import pytest
import torch

from lab import cli, own_kernel
from lab.dispatch import select
from lab.harness import records
from lab.ops import find

SOURCES = {".cu": own_kernel.ROOT / "cuda_src/silu_mul.cu", ".py": own_kernel.ROOT / "triton_kernels/silu_mul.py"}


def own(folder, suffix, old="", new=""):
    """A copy of silu_mul with a change."""
    path = folder / f"mine{suffix}"
    text = SOURCES[suffix].read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("suffix", SOURCES)
def test_a_copy_passes_every_case(suffix, tmp_path, capsys):
    assert cli.main(["try", str(own(tmp_path, suffix)), "--op", "silu_mul", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[:-1]] == [["silu_mul", t, f"mine{suffix}"] for t in ("fp32", "fp16", "bf16")]
    assert said[-1].startswith("right in every case; not raced")


@pytest.mark.parametrize("suffix, old, new", [(".cu", "expf(-g)", "expf(g)"), (".py", "tl.exp(-g)", "tl.exp(g)")])
def test_a_wrong_kernel_fails_and_the_built_in_ones_stay(suffix, old, new, tmp_path, capsys):
    path = own(tmp_path, suffix, old, new)
    assert cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu", "--dtype", "fp32"]) == 1
    assert "elements are off" in capsys.readouterr().out
    gate_up = torch.randn(2, 64)
    want = find("silu_mul").reference(gate_up)[0].float()
    for backend in ("cuda", "triton"):
        torch.testing.assert_close(select(backend).silu_mul(gate_up), want)


@pytest.mark.parametrize("name, text, message", [
    ("a.cu", "int x", "does not compile"), ("b.cu", "int x;", "lacks the launcher silu_mul of cuda_src/launchers.h"),
    ("row_of_numbers.cu", "void silu_mul(unsigned long gate_up, unsigned long y, int rows, int cols, int, unsigned long) {}",
     "lacks the launcher silu_mul of cuda_src/launchers.h, void silu_mul(const SiluMulArgs& a)"),
    ("c.py", "x = 1", "has no function silu_mul"), ("d.py", "import nothing_like_it", "ModuleNotFoundError"),
    ("e.txt", "", "give a .cu file"), ("missing.cu", None, "no such file")])
def test_a_file_that_is_no_kernel(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["try", str(tmp_path / name), "--op", "silu_mul", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lab: error: ") and message in last


def test_a_race_is_recorded_and_drawn(tmp_path, monkeypatch, capsys):
    """On the CPU, where only the path is worth something: `lab try` itself does not race there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op, path, out = find("silu_mul"), own(tmp_path, ".py"), tmp_path / "out"
    before = sys.modules["triton_kernels.silu_mul"] if "triton_kernels.silu_mul" in sys.modules else None
    function = own_kernel.function_of(path, op, "cpu")
    args = SimpleNamespace(file=path, out=str(out), model="smollm2-135m", batch="1", context="16")
    assert own_kernel.race(op, path.name, function, args, ["fp32"]) == 0
    rows = [r for r in records.read(out).rows if r.kind == "op"]
    assert {r.backend for r in rows} == {"mine.py", "cuda", "triton", "torch"} and all(r.us > 0 for r in rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("silu_mul"))
    assert " us; " in line and "cuda" in line and "triton" in line
    assert "mine.py" in (out / "index.html").read_text()
    assert before in (None, sys.modules["triton_kernels.silu_mul"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (make gpu-check runs these)")
@pytest.mark.parametrize("suffix", SOURCES)
def test_a_race_on_a_gpu(suffix, tmp_path, capsys):
    path = own(tmp_path, suffix)
    command = ["try", str(path), "--op", "silu_mul", "--dtype", "bf16", "--batch", "1", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " of the ceiling; " in line)
    assert "cuda" in line and "triton" in line
