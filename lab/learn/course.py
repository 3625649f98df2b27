"""`lab learn`: the course, lesson by lesson. It knows where the learner is (progress.py).

A lesson shows what to read and what to run. Its figures are shown once the learner has written down a
prediction, its explanation once its exercise is solved.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lab.errors import LabError
from lab.learn import exercises, lessons, progress
from lab.learn.lessons import Lesson

TIMEOUT = 60.0  # seconds that a call of an exercise may take


def add_arguments(parser):
    from lab.arguments import seconds

    parser.add_argument(
        "words",
        nargs="*",
        metavar="[check] [N]",
        help="the number of a lesson, to read it; check: is its exercise solved? (without a number: that of "
        "the lesson where you are); without a word, the list of lessons",
    )
    parser.add_argument("--predict", metavar="TEXT", help="your prediction; then the figures are shown")
    parser.add_argument("--hint", action="store_true", help="the next of three hints")
    parser.add_argument(
        "--answer", type=float, metavar="NUMBER", help="with check: where a number is asked for"
    )
    parser.add_argument("--file", metavar="FILE", help="with check: where a kernel of your own is asked for")
    parser.add_argument(
        "--json", action="store_true", help="with check: results as JSON; without a number, of every lesson"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="with check: time limit of a call (default 60; of your own kernel that of `lab try`)",
    )


def main(args) -> int:
    words, checking = list(args.words), False
    if words and words[0] == "check":
        checking = bool(words.pop(0))
    course = lessons.all_lessons()
    if len(words) > 1 or any(not w.isdecimal() or int(w) not in course for w in words):
        raise LabError(f"which lesson? their numbers are 1 to {len(course)}, as in `lab learn 1`")
    if checking and (args.predict is not None or args.hint):
        raise LabError("--predict and --hint go with the number of a lesson, without check")
    if not checking and (args.answer is not None or args.file or args.json):
        raise LabError("--answer, --file and --json go with check: lab learn check [N]")
    if not words and not checking and (args.predict is not None or args.hint):
        raise LabError("which lesson? lab learn N --predict TEXT, lab learn N --hint")
    if checking and args.json and not words and (args.answer is not None or args.file):
        raise LabError("--answer and --file are for one lesson: lab learn check N --json --answer NUMBER")
    if not checking and args.timeout is not None:
        raise LabError("--timeout goes with check: lab learn check [N]")
    if checking and args.json and not words:
        return report(list(course.values()), args)
    if not words and not checking:
        return show_list(course)
    lesson = course[int(words[0])] if words else current(course)
    if not checking:
        return show(lesson, args)
    for option, value, goal in (("--answer", args.answer, "Answer"), ("--file", args.file, "Try")):
        if value is not None and lesson.goal[0] != goal:
            raise LabError(
                f"lesson {lesson.number} does not ask for {option}: see `lab learn {lesson.number}`"
            )
    if args.file is not None:
        from lab.judge.kernel_file import require_kernel_file

        require_kernel_file(Path(args.file))  # a name that is mistyped says nothing about the exercise
    if args.json:
        return report([lesson], args)
    return 0 if check(lesson, args) else 1


# ---- where the learner is ----------------------------------------------------------------------------------


def done(lesson: Lesson, known: dict) -> bool:
    """Whether the learner has solved the lesson's exercise. known: progress.load()."""
    keys = [f"{name}/{language}" for name in lesson.exercises for language in exercises.LANGUAGES]
    if keys:
        return all(key in known["solved"] for key in keys)
    return bool(known["lessons"].get(str(lesson.number), {}).get("solved"))


def current(course: dict[int, Lesson]) -> Lesson:
    """The first lesson that is not done; the last one if all are."""
    known = progress.load()
    return next((lesson for lesson in course.values() if not done(lesson, known)), list(course.values())[-1])


def note(lesson: Lesson, **facts) -> dict:
    """Keeps facts about a lesson, and returns all that is kept about it."""
    known = progress.load()
    mine = {**known["lessons"].get(str(lesson.number), {}), **facts}
    known["lessons"][str(lesson.number)] = mine
    progress.save(known)
    return mine


# ---- what is shown -----------------------------------------------------------------------------------------


def show_list(course: dict[int, Lesson]) -> int:
    known, here = progress.load(), current(course)
    for lesson in course.values():
        mark = "✓" if done(lesson, known) else ">" if lesson is here else "·"
        print(f" {mark} {lesson.number:2}  {lesson.title}")
    if all(done(lesson, known) for lesson in course.values()):
        print("\nAll lessons are done.")
    else:
        print(f"\nnext: lab learn {here.number}")
    return 0


def show(lesson: Lesson, args) -> int:
    """The lesson, as far as the learner may see it."""
    if args.predict is not None:
        if not args.predict.strip():
            raise LabError("a prediction cannot be empty")
        note(lesson, prediction=args.predict)
    mine = progress.load()["lessons"].get(str(lesson.number), {})
    n = lesson.number
    if args.hint:
        shown = min(int(mine.get("hints", 0)) + 1, len(lesson.hints))
        note(lesson, hints=shown)
        for number, hint in enumerate(lesson.hints[:shown], 1):
            print(f"hint {number} of {len(lesson.hints)}: {hint}")
        return 0
    parts = [f"# {n}. {lesson.title}", lesson.about]
    parts += [f"## {name}\n\n{lesson.shown(name)}" for name in ("Read", "Predict", "Run")]
    if mine.get("prediction"):
        parts += [f"## Figures\n\nYou predicted: {mine['prediction']}", lesson.shown("Figures")]
    else:
        parts.append(
            f'Write down your prediction, and the figures are shown: `lab learn {n} --predict "..."`'
        )
    parts.append(f"## Exercise\n\n{lesson.shown('Exercise')}")
    if done(lesson, progress.load()):
        parts.append(f"## Explanation\n\n{lesson.shown('Explanation')}")
    else:
        needs = {"Solve": "", "Answer": " --answer NUMBER", "Try": " --file FILE"}[lesson.goal[0]]
        parts.append(f"Then: `lab learn check {n}{needs}`. A hint: `lab learn {n} --hint`")
    write("\n\n".join(parts))
    return 0


def write(markdown: str) -> None:
    """Prints Markdown: typeset on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        print(markdown)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


# ---- checks ------------------------------------------------------------------------------------------------


def check(lesson: Lesson, args) -> bool:
    """Checks the lesson's exercise, says what is wrong, and shows the explanation if nothing is."""
    how, what = lesson.goal
    if how == "Solve":
        known = progress.load()["solved"]
        for name in lesson.exercises:
            open_ones = [l for l in exercises.LANGUAGES if f"{name}/{l}" not in known]
            if open_ones:
                exercises.check_and_tell(name, open_ones, args.timeout or TIMEOUT, as_json=False)
    elif given(args) or not done(lesson, progress.load()):
        if wrong := wrong_with(lesson, args):
            print(f"lesson {lesson.number}: not yet: {wrong}")
            return False  # a lesson that was solved earlier stays so
        note(lesson, solved=True)
    solved = done(lesson, progress.load())
    if solved:
        course = lessons.all_lessons()
        after = course.get(lesson.number + 1)
        write(f"lesson {lesson.number}: done ✓\n\n{lesson.shown('Explanation')}")
        print(f"\nnext: lab learn {after.number}" if after else "\nThat was the last lesson.")
    return solved


def given(args) -> bool:
    """Whether an answer or a file came with the call; otherwise one that was accepted earlier counts."""
    return args.answer is not None or args.file is not None


def wrong_with(lesson: Lesson, args) -> str | None:
    """What is wrong with the answer, or the file, that was given; or None."""
    how, what = lesson.goal
    if how == "Answer":
        if args.answer is None:
            return f"give the number: lab learn check {lesson.number} --answer NUMBER"
        return None if lesson.right(args.answer) else f"{args.answer:g} is not right (10 % off would be)"
    if args.file is None:
        return f"name your kernel: lab learn check {lesson.number} --file FILE"
    words = [sys.executable, "-m", "lab", "try", args.file, "--op", what, "--check-only"]
    if args.timeout is not None:
        words += ["--timeout", f"{args.timeout:g}"]
    status = subprocess.run(words, stdout=sys.stderr if args.json else None).returncode
    return None if status == 0 else f"`lab try {args.file} --op {what}` does not accept it"


def report(chosen: list[Lesson], args) -> int:
    """Checks lessons anew and prints JSON, for grading. Exercises are run; an answer or a file that was
    accepted earlier counts. Returns 1 if a lesson is not done."""
    found, wrong_of = [], {}
    for lesson in chosen:
        wrong = {}
        for name in lesson.exercises:
            for language in exercises.LANGUAGES:
                key = f"{name}/{language}"
                if key not in wrong_of:
                    wrong_of[key] = failure(name, language, args.timeout or TIMEOUT)
                wrong[key] = wrong_of[key]
        if lesson.goal[0] == "Solve":
            solved = not any(wrong.values())
        else:
            if given(args):
                wrong["exercise"] = wrong_with(lesson, args)
                solved = wrong["exercise"] is None
                if solved:
                    note(lesson, solved=True)
            else:
                solved = done(lesson, progress.load())
        mine = progress.load()["lessons"].get(str(lesson.number), {})
        found.append(
            {
                "lesson": lesson.number,
                "title": lesson.title,
                "done": solved,
                "prediction": mine.get("prediction"),
                "hints": int(mine.get("hints", 0)),
                "wrong": {key: text for key, text in wrong.items() if text},
            }
        )
    print(json.dumps({"done": sum(f["done"] for f in found), "of": len(found), "lessons": found}, indent=1))
    return 0 if all(f["done"] for f in found) else 1


def failure(name: str, language: str, timeout: float) -> str | None:
    """exercises.check(), with an error of the file as what is wrong."""
    try:
        return exercises.check(name, language, timeout=timeout)
    except LabError as error:
        return str(error)
