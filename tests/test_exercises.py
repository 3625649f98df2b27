"""Every planted fault is caught, with a word that helps; every solution passes; nothing else passes."""

import json

import pytest

from lab.cli import main
from lab.errors import LabError
from lab.learn import cuda_exercise, exercises, hints, progress, triton_exercise

PAIRS = [(name, language) for name in exercises.SUMMARIES for language in exercises.LANGUAGES]
SAYS = {
    "tail_mask": ("4 rows of 40: the mean of row 0", "4 rows of 40: 4 of 4 elements are wrong"),
    "coalescing": (
        "one load of a warp touches 4 lines",
        "one load of a program touches 16 lines of 128 bytes, where 4",
    ),
    "bank_conflict": (
        "takes 32 steps, where 1 would do",
        "one load of a program touches 32 lines of 128 bytes, where 1",
    ),
    "barrier": ("that number belongs to tile 1, and this is tile 0", "element 0 is nan"),
    "rescale": ("tokens whose scores rise", "50 tokens whose scores rise"),
    "empty_split": ("33 tokens in 4 splits give", "300 tokens in 4 splits: 1 of 1"),
    "page_lookup": (
        "pages of 16 tokens: token 16 ",
        "pages of 16 tokens: 32 of 75 elements are wrong; element 16",
    ),
    "grouped_queries": ("each key is loaded 4 times", "each key is loaded 4 times"),
    "rounding_point": ("elements of y are not those of the two kernels", "elements are wrong; element 2"),
    "stages": ("the sum of 7 tiles is", "num_stages 1: 0 bytes are in flight"),
    "counter": ("launch 2 gives -1", "2 of 3 elements are wrong; element 1 is nan"),
    "dependent_launch": ("x was read before", "128 of 512 elements are wrong"),
}


class Here:
    """A function of a file, run in this process: a process of its own for each file would take seconds."""

    file = None

    def __init__(self, name, path):
        task = triton_exercise.TASKS[name]
        spec = {"file": str(path), "name": name}
        self.call = triton_exercise.in_worker(spec)(task.function)

    def run(self, arena):
        *tensors, out = arena.values().values()
        try:
            self.call(*tensors, out=out)
        except Exception as error:
            return str(error)


def fault(name, language, path):
    if language == "cuda":
        return cuda_exercise.check(path, 60)
    return triton_exercise.first_fault(triton_exercise.TASKS[name], Here(name, path))


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(exercises, "COPIES", tmp_path / "copies")


@pytest.mark.parametrize("name, language", PAIRS)
def test_fault_is_caught_and_solution_passes(name, language):
    said = SAYS[name][exercises.LANGUAGES.index(language)]
    assert said in fault(name, language, exercises.file_of(name, language))
    assert fault(name, language, exercises.solution_of(name, language)) is None


@pytest.mark.parametrize("name, language", PAIRS)
def test_files_ask_and_answer(name, language):
    file, solution = exercises.file_of(name, language), exercises.solution_of(name, language)
    assert f"Exercise {name}" in exercises.question(name, language)
    assert "Question:" in exercises.question(name, language) and "Mend it" not in exercises.question(
        name, language
    )
    assert f"lab exercise check {name} --language {language}" in file.read_text()
    assert "Question:" not in solution.read_text() and len(exercises.explanation(name, language)) > 100
    assert len(hints.of(name, language)) == 3


def test_printed_path_opens_the_copy_from_any_folder(monkeypatch, tmp_path, capsys):
    copy = exercises.copy_of("counter", "cuda")
    for folder, printed in ((tmp_path, "copies/cuda/counter.cu"), (exercises.ROOT, str(copy))):
        monkeypatch.chdir(folder)
        assert main(["exercise", "counter", "--language", "cuda"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"[cuda] {printed}"


def test_every_file_is_of_an_exercise():
    for language in exercises.LANGUAGES:
        one = exercises.file_of("barrier", language)
        for folder in (one.parent, one.parent / "solutions"):
            assert {p.stem for p in folder.glob(f"*{one.suffix}")} - {"__init__"} == set(exercises.SUMMARIES)
    assert set(hints.HINTS) == set(triton_exercise.TASKS) == set(exercises.SUMMARIES)


MUTANTS = [  # changes of a solution, or of the exercise itself, that mend nothing
    ("barrier", "cuda", "exercise", "    __syncthreads();\n", ""),
    ("coalescing", "cuda", "exercise", "watched_load(x + at)", "x[at]"),
    ("bank_conflict", "cuda", "solution", "watched_load(&tile[lane][row])", "tile[lane][row]"),
    ("stages", "cuda", "solution", "kStages - 2>", "0>"),
    ("dependent_launch", "cuda", "solution", "  pdl_wait();\n", ""),
    ("tail_mask", "triton", "solution", "other=0.0", "other=1.0"),
    ("stages", "triton", "solution", "num_stages=3", "num_stages=15"),
    ("dependent_launch", "triton", "solution", "    tl.extra.cuda.gdc_wait()\n", ""),
    (
        "dependent_launch",
        "triton",
        "solution",
        "    weight = tl.load(w + i)\n    tl.extra.cuda.gdc_wait()\n",
        "    tl.extra.cuda.gdc_wait()\n    weight = tl.load(w + i)\n",
    ),
    (
        "dependent_launch",
        "cuda",
        "solution",
        "  const float weight = watched_load(w + i);\n  pdl_wait();\n",
        "  pdl_wait();\n  const float weight = watched_load(w + i);\n",
    ),
    ("counter", "triton", "exercise", "ticket == PROGRAMS - 1", "ticket % PROGRAMS == 0"),
    ("bank_conflict", "triton", "solution", "R, C = 32, 32", "R, C = 1, 32"),
    ("page_lookup", "triton", "solution", "t // page_size, mask=t < tokens, other=0)", "t // page_size)"),
]


@pytest.mark.parametrize("name, language, which, old, new", MUTANTS)
def test_a_change_that_mends_nothing_fails(name, language, which, old, new, tmp_path):
    original = (exercises.file_of if which == "exercise" else exercises.solution_of)(name, language)
    assert old in original.read_text()
    path = tmp_path / original.name
    path.write_text(original.read_text().replace(old, new))
    assert fault(name, language, path) is not None


def test_command_line(capsys, monkeypatch, tmp_path):
    assert main(["exercise"]) == 0
    assert "next: lab exercise tail_mask --language cuda" in capsys.readouterr().out
    assert main(["exercise", "check", "tail_mask", "--language", "triton"]) == 1
    assert "not mended yet: 4 rows of 40" in capsys.readouterr().out
    for number in (1, 2):  # one hint more each time
        assert main(["exercise", "hint", "tail_mask", "--language", "triton"]) == 0
        assert f"hint {number} of 3" in capsys.readouterr().out
    solution = exercises.solution_of("tail_mask", "triton")
    explained = exercises.explanation("tail_mask", "triton")
    assert main(["exercise", "tail_mask"]) == 0
    assert explained not in capsys.readouterr().out
    monkeypatch.setattr(exercises, "check", lambda name, language, timeout: None)
    assert solution.exists() and main(["exercise", "check", "tail_mask", "--language", "triton"]) == 0
    assert explained in capsys.readouterr().out
    assert main(["exercise", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tail_mask"] == {"cuda": False, "triton": True}
    assert progress.load()["solved"] == ["tail_mask/triton"]


def test_a_learner_mends_a_copy(capsys, tmp_path):
    given = exercises.file_of("tail_mask", "triton").read_text()
    assert main(["exercise", "tail_mask", "--language", "triton"]) == 0
    copy = tmp_path / "copies" / "triton" / "tail_mask.py"
    assert str(copy) in capsys.readouterr().out and copy.read_text() == given
    copy.write_text(exercises.solution_of("tail_mask", "triton").read_text())
    assert main(["exercise", "tail_mask", "--language", "triton"]) == 0  # it is not overwritten
    assert main(["exercise", "check", "tail_mask", "--language", "triton"]) == 0
    assert exercises.file_of("tail_mask", "triton").read_text() == given
    copy.unlink()  # to begin anew
    assert exercises.check("tail_mask", "triton") is not None


def test_mistakes_are_one_line(capsys):
    assert main(["exercise", "check", "bariier"]) == 2
    assert "did you mean barrier?" in capsys.readouterr().err
    assert main(["exercise", "check"]) == 2
    assert "which exercise?" in capsys.readouterr().err
    progress.path().parent.mkdir(parents=True)
    progress.path().write_text('{"solved": 3}')
    assert main(["exercise"]) == 2
    assert "move it away to begin anew" in capsys.readouterr().err


@pytest.mark.parametrize("language, text", [("cuda", "int;;this is no C++"), ("triton", "this is no Python")])
def test_a_file_that_does_not_compile_is_one_line(language, text, tmp_path):
    path = tmp_path / exercises.file_of("barrier", language).name
    path.write_text(text)
    with pytest.raises(LabError):
        exercises.check("barrier", language, path)
