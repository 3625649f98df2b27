"""`make mutants`: its list fits the sources, and its runner tells a mutant that is noticed from one that is
not."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import run
from mutants.mutant import Mutant, mutate, places
from mutants.mutants import MUTANTS

from lab.contract import DTYPES
from lab.ops import find

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.why}")
def test_a_mutant_changes_one_place_that_is_there(mutant):
    text = (ROOT / mutant.file).read_text()
    assert mutate(text, mutant) != text
    assert find(mutant.op) and mutant.dtype in ("", *DTYPES)
    words = mutant.tests.split()
    assert not words or (ROOT / words[0]).is_file()


def test_each_mutant_has_a_description_of_its_own():
    assert len({(m.file, m.why) for m in MUTANTS}) == len(MUTANTS)


def test_a_mutant_is_planted_where_its_file_lay_at_another_commit(tmp_path):
    mutant = Mutant("cuda_src/core/rope.cuh", "a + b", "a - b", "a sign", "rope")
    assert run.place(mutant, tmp_path) is None
    (tmp_path / "cuda_src").mkdir()
    old = tmp_path / "cuda_src" / "rope.cuh"
    old.write_text("a + b; a + b;")
    assert run.place(mutant, tmp_path) is None, "which of the two is not said"
    old.write_text("a + b;")
    assert run.place(mutant, tmp_path) == old


def test_a_child_that_fails_crashes_or_ends_is_told_apart(tmp_path):
    def said(function, *arguments):
        passed, log = run.run_forked((function, *arguments), tmp_path)
        return passed, run.last_line(log)

    assert said(lambda text: print(text) or 0, "all right\n") == (True, "all right")
    assert said(lambda: print("wrong") or 1) == (False, "wrong")
    assert said(lambda: 1 / 0) == (False, "ZeroDivisionError: division by zero")
    assert said(lambda: os.kill(os.getpid(), signal.SIGKILL)) == (False, "ended by SIGKILL")


def test_what_failed_is_run_again_without_the_mutant():
    whole = (run.run_cases, "rope", "cuda", "")
    assert run.failing_part(whole, "case bf16 0\ncase bf16 3\nended by SIGSEGV") == (*whole, ("bf16", 3))
    assert run.failing_part(whole, "ImportError: no module") == whole
    tests = (run.run_tests, "tests/test_rope.py", "-k", "cuda")
    assert run.failing_part(
        tests, "..F\nFAILED tests/test_rope.py::test_it[idle last-cuda] - assert 1\n"
    ) == (run.run_tests, "tests/test_rope.py::test_it[idle last-cuda]")
    assert run.failing_part(tests, "ended by SIGSEGV") == tests


def test_a_planted_fault_is_killed_and_an_equivalent_one_survives(monkeypatch, capsys):
    """The runner as a whole, on mutants of a Triton kernel, which compiles nothing but what the build
    lacks."""

    def score(old, new):
        mutant = Mutant("triton_kernels/rope.py", old, new, "planted", "rope", dtype="bf16")
        monkeypatch.setattr(run, "MUTANTS", [mutant])
        monkeypatch.setattr(sys, "argv", ["run.py", "--jobs", "1"])
        status = run.main()
        return status, re.search(r"(\d) of 1 mutants killed", capsys.readouterr().out)[1]

    old = "(position >= 0)[:, None]"
    assert score(old, "(position >= -1)[:, None]") == (0, "1")
    assert score(old, "(position > -1)[:, None]") == (1, "0")
    assert score(old, "(position >= 0") == (0, "1")  # does not even parse


def test_a_list_without_a_mutant_is_a_mistake():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/mutants/run.py", "--only", "no such mutant"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 2 and "no mutants" in done.stderr


def test_a_place_is_found_however_its_lines_are_broken():
    assert places("x = f(a,\n        b) + 1", "f(a, b)+1")
    assert not places("inta;", "int a;") and not places("xf( a)", "f(a)") and places("f(a)f(a)", "f(a)")
    assert mutate("u = sizes(a, bb) * 2;", Mutant("", "bb) *2", "b) / 2", "")) == "u = sizes(a, b) / 2;"
