"""Every planted fault is caught, with a word that helps; every solution passes; nothing else passes."""

import pytest

from lab.cli import main
from lab.errors import LabError
from lab.learn import exercises

SAYS = {
    "tail_mask": "4 rows of 40: element 0 is",
    "barrier": "that number belongs to tile 1, and this is tile 0",
    "split_merge": "splits of 8, 5, 3 tokens",
    "empty_split": "33 tokens in 4 splits give",
    "coalescing": "one load of a warp touches 4 lines of 128 bytes, where 1 would do",
    "bank_conflict": "takes 32 steps, where 1 would do",
}


def test_every_exercise_is_tested():
    assert set(SAYS) == set(exercises.EXERCISES)


@pytest.mark.parametrize("name", SAYS)
def test_fault_is_caught(name):
    assert SAYS[name] in exercises.check(name)


@pytest.mark.parametrize("name", SAYS)
def test_solution_passes(name):
    assert exercises.check(name, exercises.EXERCISES[name].solution) is None


@pytest.mark.parametrize("name", SAYS)
def test_files_ask_and_answer(name):
    exercise = exercises.EXERCISES[name]
    asked, answered = exercise.path.read_text(), exercise.solution.read_text()
    assert "Question:" in asked and f"lab check --exercise {name}" in asked
    assert "Solution of" in answered and "Question:" not in answered


MUTANTS = {  # changes of a solution, or of the file itself, that mend nothing
    "barrier": ("exercise", "    __syncthreads();\n", ""),
    "coalescing": ("exercise", "watched_load(x + at)", "x[at]"),
    "bank_conflict": ("solution", "watched_load(&tile[lane][row])", "tile[lane][row]"),
    "empty_split": (
        "solution",
        "weight == 0.f ? 0.f : sum / weight, maximum",
        "sum / (weight + 1e-3f), maximum",
    ),
    "tail_mask": ("solution", "other=0.0", "other=1.0"),
    "split_merge": ("solution", "share * factor[:, None]", "share"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_that_mends_nothing_fails(name, tmp_path):
    which, old, new = MUTANTS[name]
    exercise = exercises.EXERCISES[name]
    text = (exercise.solution if which == "solution" else exercise.path).read_text()
    assert old in text
    path = tmp_path / exercise.path.name
    path.write_text(text.replace(old, new))
    assert exercises.check(name, path) is not None


def test_command_line(capsys):
    assert main(["check", "--exercise", "tail_mask"]) == 1
    assert "not mended yet: 4 rows of 40" in capsys.readouterr().out
    assert main(["check", "--exercise", "list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["barrier"])
    assert main(["check", "--exercise", "bariier"]) == 2
    assert "did you mean barrier?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text", [("barrier", "int;;this is no C++"), ("tail_mask", "this is no Python")]
)
def test_a_file_that_does_not_compile_is_one_line(name, text, tmp_path):
    path = tmp_path / exercises.EXERCISES[name].path.name
    path.write_text(text)
    with pytest.raises(LabError):
        exercises.check(name, path)
