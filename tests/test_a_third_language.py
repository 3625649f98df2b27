"""CONTRIBUTING.md's section "Add a language": a toy one, for two ops, that no file of the lab knows."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import commands
import pytest
from tiny_models import write_folder

from lab.model.families import PRESETS
from lab.records import schema

ROOT = Path(__file__).resolve().parent.parent
# numpy's arithmetic on the memory of the tensors: float32 alone holds what both contracts ask.
TOY = """
import numpy as np
import torch
from lab.backends import register


def values(tensor):
    return tensor.float().numpy()


def silu_mul(gate_up, out):
    gate, up = np.split(values(gate_up), 2, axis=-1)
    out.copy_(torch.from_numpy(gate / (1 + np.exp(-gate)) * up))


def rmsnorm(x, w, eps, residual=None, out=None):
    if residual is not None:
        x = residual.copy_(x.float() + residual.float())
    v = values(x)
    mean = np.square(v).mean(-1, keepdims=True, dtype=np.float32)
    scaled = torch.from_numpy(v / np.sqrt(mean + np.float32(eps)))
    out.copy_(scaled.to(x.dtype).float() * w.float())


class Backend:
    name = "toy"

    def __init__(self, device):
        self.launched = []

    def launcher(self, op):
        def launch(*args, **options):
            op.launchers["toy"](*args, **options)
            self.launched.append(f"toy_{op.name}")
        return launch

    def set_trace(self, on):
        pass

    def take_trace(self):
        names, self.launched = self.launched, []
        return names


register("toy", Backend, {"silu_mul": silu_mul, "rmsnorm": rmsnorm})
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """lab(command, ..) runs commands, each a list of words, in a process that knows the toy; gives the status
    and the output of each. .folder is where they run."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_language.py").write_text(TOY)
    settings = {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "LAB_LANGUAGES": "toy_language",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }

    def run(*given):
        done = [commands.lab(*words, folder=folder, env=settings) for words in given]
        return [(d.returncode, d.stdout + d.stderr) for d in done]

    run.folder = folder
    return run


def test_it_is_checked_at_the_ops_that_it_has(lab):
    (status, said), refused = lab(
        ["check", "--backend", "toy", "--quick"], ["check", "--backend", "toy", "--op", "rope"]
    )
    assert status == 0
    assert {line.split()[0] for line in said.splitlines() if " toy " in line} == {"silu_mul", "rmsnorm"}
    assert "12 cases on cpu, 0 failed" in said  # 2 ops, 3 dtypes, 2 cases
    assert refused[0] == 2 and "none of the chosen backends has" in refused[1]


def test_a_model_runs_with_its_ops(lab):
    config = replace(
        PRESETS["smollm2-135m"], layers=1, hidden=64, intermediate=96, q_heads=1, kv_heads=1, vocab=300
    )
    write_folder(lab.folder / "tiny", config)
    run = ("run", "tiny", "--device", "cpu", "--ids", "1,2", "--max-new-tokens", "2")
    (status, said), (refused, why), (too, why_too) = lab(
        [*run, "--backend", "torch", "--override", "silu_mul=toy", "--override", "rmsnorm=toy", "--trace"],
        [*run, "--backend", "toy"],
        [*run, "--backend", "torch", "--override", "rope=toy"],
    )
    assert (status, refused, too) == (0, 2, 2), (said, why, why_too)
    assert "toy_silu_mul" in said and "toy_rmsnorm" in said and "torch:linear" in said
    assert "backend toy has no embedding, linear" in why and "--override embedding=torch" in why
    assert "backend toy has no rope" in why_too


def test_it_is_measured_and_drawn(lab):
    out = str(lab.folder / "out")
    bench = ["bench", "ops", "silu_mul", "rope", "--quick", "--device", "cpu", "--backend", "toy,torch"]
    done = lab([*bench, "--seconds", "0.001", "--model", "smollm2-135m", "--out", out], ["report", out])
    assert [status for status, _ in done] == [0, 0], done
    rows = schema.read(out).of_kind("op")
    assert {(row.op, row.backend) for row in rows} == {
        ("silu_mul", "toy"),
        ("silu_mul", "torch"),
        ("rope", "torch"),
    }
    assert all(row.us > 0 and not row.error for row in rows)
    assert "toy" in (Path(out) / "README.md").read_text() and "toy" in (Path(out) / "index.html").read_text()


def test_what_cannot_be_a_language_is_refused(lab, tmp_path):
    from lab.backends import register
    from lab.errors import LabError

    with pytest.raises(LabError, match="there is a language 'cuda' already"):
        register("cuda", object, {})
    with pytest.raises(LabError, match="unknown op 'silu_mull': did you mean silu_mul"):
        register("other", object, {"silu_mull": print})
    done = subprocess.run(
        [sys.executable, "-m", "lab", "check", "--backend", "torch"],
        cwd=ROOT,
        text=True,
        env={**os.environ, "LAB_LANGUAGES": "no_such_module"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 2 and "LAB_LANGUAGES=no_such_module: No module named" in done.stdout
