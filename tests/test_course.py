"""The lessons: what they name exists, their commands run, and no figure is shown before a prediction."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.cli import main
from lab.errors import LabError
from lab.learn import course, exercises, glossary, lessons, progress

COURSE = lessons.all_lessons()


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(exercises, "COPIES", tmp_path / "copies")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", COURSE)
def test_what_a_lesson_names_exists(number):
    lesson = COURSE[number]
    for section in lessons.SECTIONS:  # raises LabError for lines or figures that are not there
        assert "{{" not in lesson.shown(section)
    reading = lessons.READING.findall(lesson.sections["Read"])
    assert reading and len(reading) == lesson.sections["Read"].count("\n- ") + 1
    assert all(lessons.lines(*one)[0] <= lessons.lines(*one)[1] for one in reading)
    assert lesson.words and all(glossary.meaning(word) for word in lesson.words)
    assert set(lesson.exercises) <= set(exercises.SUMMARIES)
    assert len(lesson.hints) == 3 and lesson.commands
    assert re.search(r"^Time: .+\. Assumes: ", lesson.about, re.M)


def test_lessons_are_numbered_and_use_every_exercise():
    assert list(COURSE) == list(range(1, len(COURSE) + 1))
    assert sorted(name for lesson in COURSE.values() for name in lesson.exercises) == sorted(
        exercises.SUMMARIES
    )
    teachers = (lessons.FOLDER / "teachers.md").read_text()
    for lesson in COURSE.values():
        minutes = re.search(r"Time: (\S+) (minutes|hours)", lesson.about)
        minutes = minutes[1] if minutes[2] == "minutes" else "120"
        assert f"| {lesson.number}. {lesson.title} | {minutes} |" in teachers


@pytest.mark.parametrize("number", COURSE)
def test_figures_are_read_from_records(number):
    for section in ("Figures", "Explanation"):
        typed = lessons.PLACEHOLDER.sub("", COURSE[number].sections[section])
        assert not re.search(r"\d ?(us|ms|GB/s|TB/s|%)(\W|$)", typed)


@pytest.mark.parametrize("number, command", [(n, c) for n, lesson in COURSE.items() for c in lesson.commands])
def test_commands_run(number, command, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(
        tmp_path_factory.getbasetemp()
    )  # one folder: some commands read what earlier ones wrote
    program, *words = shlex.split(command)
    assert program == "lab" and main(words) == 0


def test_figures_follow_a_prediction_and_the_explanation_the_solution(capsys):
    figures, explained = COURSE[2].shown("Figures"), COURSE[2].shown("Explanation")
    assert main(["learn", "2"]) == 0
    assert figures not in capsys.readouterr().out
    assert main(["learn", "2", "--predict", "one us"]) == 0
    out = capsys.readouterr().out
    assert figures in out and "You predicted: one us" in out and explained not in out
    for number in (1, 2):
        assert main(["learn", "2", "--hint"]) == 0
        assert f"hint {number} of 3" in capsys.readouterr().out
    for language in exercises.LANGUAGES:
        progress.solve(f"tail_mask/{language}")
    assert main(["learn", "2"]) == 0
    assert explained in capsys.readouterr().out


def test_it_knows_where_the_learner_is(capsys):
    assert main(["learn"]) == 0
    assert "next: lab learn 1\n" in capsys.readouterr().out
    assert main(["learn", "check"]) == 1
    assert "--answer NUMBER" in capsys.readouterr().out
    assert main(["learn", "check", "--answer", "500"]) == 1
    assert "500 is not right" in capsys.readouterr().out
    right = lessons.value(*lessons.PLACEHOLDER.fullmatch(COURSE[1].goal[1]).groups())
    assert main(["learn", "check", "--answer", f"{right * 1.05:.0f}"]) == 0
    assert COURSE[1].shown("Explanation") in capsys.readouterr().out
    assert main(["learn", "check", "1"]) == 0  # what was accepted counts
    assert "not yet" not in capsys.readouterr().out
    assert main(["learn", "check", "1", "--answer", "500"]) == 1
    assert "done" not in capsys.readouterr().out
    assert main(["learn", "check", "1", "--json", "--answer", "500"]) == 1  # this answer is graded, no other
    assert not json.loads(capsys.readouterr().out)["lessons"][0]["done"]
    assert main(["learn", "check", "1"]) == 0  # a wrong one later takes nothing back
    assert main(["learn", "check", "1", "--answer", f"{right * 0.95:.0f}"]) == 0
    assert main(["learn"]) == 0
    assert "next: lab learn 2\n" in capsys.readouterr().out


def test_grades_are_json(capsys, monkeypatch):
    fails = {"barrier/cuda": "y[0] is wrong"}
    monkeypatch.setattr(exercises, "check", lambda n, l, path=None, timeout=0: fails.get(f"{n}/{l}"))
    progress.solve("barrier/cuda")  # what the file says does not count: exercises are run
    assert main(["learn", "check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["of"] == len(COURSE)
    assert [f["lesson"] for f in found["lessons"] if not f["done"]] == [1, 4, 12, 13]
    assert found["lessons"][3]["wrong"] == fails
    assert main(["learn", "check", "2", "--json"]) == 0


def test_a_kernel_of_ones_own(tmp_path, monkeypatch, capsys):
    from lab import cli

    called, status = [], 1

    def judged(words, stdout):
        called.append((words[1:], stdout))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(course.subprocess, "run", judged)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def silu_mul(gate_up, out): pass\n")
    args = cli.parse(["learn", "check", "13", "--file", "mine.py"], "learn")
    assert course.main(args) == 1
    status = 0
    assert course.main(args) == 0
    assert called[1] == (["-m", "lab", "try", "mine.py", "--op", "silu_mul", "--check-only"], None)
    assert "That was the last lesson." in capsys.readouterr().out
    args = cli.parse(["learn", "check", "13", "--json", "--file", "mine.py"], "learn")
    assert course.main(args) == 0
    assert called[2][1] is sys.stderr  # what `lab try` says is not among the JSON
    assert json.loads(capsys.readouterr().out)["done"] == 1
    assert "--timeout" not in called[2][0]
    assert (
        course.main(cli.parse(["learn", "check", "13", "--file", "mine.py", "--timeout", "7"], "learn")) == 0
    )
    assert called[3][0][-2:] == ["--timeout", "7"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["learn", "99"], "their numbers are 1 to"),
        (["learn", "--hint"], "which lesson?"),
        (["learn", "1", "--answer", "3"], "go with check"),
        (["learn", "check", "--json", "--answer", "3"], "are for one lesson"),
        (["learn", "check", "2", "--answer", "3"], "lesson 2 does not ask for --answer"),
        (["learn", "check", "1", "--file", "mine.py", "--json"], "lesson 1 does not ask for --file"),
        (["learn", "1", "--timeout", "3"], "--timeout goes with check"),
        (["learn", "1", "--predict", " "], "cannot be empty"),
        (["explain", "--glossary", "splitt"], "did you mean split"),
        (["explain"], "which op?"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_glossary_has_each_word_of_a_row(capsys):
    assert glossary.meaning("role") == glossary.meaning("use") and glossary.meaning("Ceiling")
    assert main(["explain", "--glossary"]) == 0
    assert capsys.readouterr().out.count("\n") == len(glossary.entries()) > 50


def test_a_placeholder_that_no_row_answers_is_an_error():
    with pytest.raises(LabError, match="0 different values"):
        lessons.filled("{{op us op=rmsnorm backend=nobody}}")


@pytest.mark.parametrize("more", ["", " --json"])
def test_a_file_that_is_not_there_is_a_mistake_of_the_command(more, capsys):
    course.note(COURSE[13], solved=True)
    assert main(f"learn check 13 --file missing.cu{more}".split()) == 2
    assert capsys.readouterr().err == "lab: error: missing.cu: no such file\n"
    assert course.done(COURSE[13], progress.load()), "what was accepted before still is"
