"""What `make gpu-check` makes of its steps; commands of no GPU stand in for them."""

import re
import subprocess
import sys
import time

import pytest
import torch

from lab.errors import LabError
from lab.machine import gpu_check


def script(step, status=0):
    """Writes when it began and ended, then a last line."""
    return [
        sys.executable,
        "-c",
        f"import time; print(time.time()); time.sleep(0.4); print(time.time()); "
        f"print('== {step} is done =='); raise SystemExit({status})",
    ]


@pytest.fixture
def pretend(monkeypatch):
    def steps(failing=(), lacking=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(gpu_check, "oracle_lacks", lambda: lacking)
        monkeypatch.setattr(gpu_check, "command", lambda step: script(step, 3 if step in failing else 0))
        monkeypatch.setattr(
            gpu_check, "text", lambda out, model: (time.sleep(0.1) or True, f"{model} said the same")
        )

    return steps


def spans(out):
    return {
        step: tuple(map(float, (out / f"{step}.log").read_text().splitlines()[1:3]))
        for step in gpu_check.STEPS
        if step != "text"
    }


def test_all_steps_run_and_only_what_measures_runs_alone(pretend, tmp_path, capsys):
    pretend()
    assert gpu_check.main(["--out", str(tmp_path), "--model", "m"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "gpu-check: 7 steps passed, 0 failed"
    assert "check is done" in said and "m said the same" in said
    when = spans(tmp_path)
    together = [when[step] for step in gpu_check.TOGETHER]
    assert max(begin for begin, _ in together) < min(end for _, end in together)
    assert when["tests"][0] > max(end for _, end in together)


def test_a_failed_step_is_named_and_the_others_still_run(pretend, tmp_path, capsys):
    pretend(failing=["racecheck"])
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "gpu-check: 6 steps passed, 1 failed: racecheck"
    assert (
        f"racecheck is done (exit status 3; see {tmp_path / 'racecheck.log'})" in said
        and len(spans(tmp_path)) == 6
    )


def test_the_oracle_is_left_out_with_a_word_unless_asked_for(pretend, tmp_path, capsys):
    pretend(lacking="transformers")
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[oracle] left out: needs transformers" in said and said.endswith(
        "gpu-check: 6 steps passed, 0 failed\n"
    )
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "oracle"]) == 0
    assert "oracle is done" in capsys.readouterr().out


def test_an_unknown_step(tmp_path):
    steps = "check, memcheck, racecheck, judge, tests, oracle, text"
    with pytest.raises(LabError, match=f"unknown step memchek: choose from {steps}"):
        gpu_check.main(["--out", str(tmp_path), "--steps", "memchek,tests"])


def test_every_test_that_needs_a_gpu_belongs_to_one_step(tmp_path):
    marked = {"kernel": ["gpu"], "cheat": ["gpu", "judge"], "logits": ["oracle"], "plain": []}
    lines = ["import pytest"]
    for name, marks in marked.items():
        lines += [*(f"@pytest.mark.{mark}" for mark in marks), f"def test_{name}(): pass"]
    (tmp_path / "test_marked.py").write_text("\n".join(lines))
    chosen = {}
    for step, expression in gpu_check.MARKED.items():
        words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", expression]
        said = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True).stdout
        chosen[step] = re.findall(r"::test_(\w+)", said)
    assert chosen == {"judge": ["cheat"], "tests": ["kernel"], "oracle": ["logits"]}


def test_only_the_judge_runs_side_by_side(monkeypatch):
    for xdist in (True, False):
        monkeypatch.setattr(gpu_check, "has_xdist", lambda: xdist)
        assert ("-n" in gpu_check.command("judge")) == xdist
        assert "-n" not in gpu_check.command("tests")
