"""`lab exercise`: small kernels with a planted fault each, in CUDA and in Triton, to be mended.

The kernels are cuda_src/exercises/NAME.cu and triton_kernels/exercises/NAME.py, with a question at the top.
The learner mends a copy of each in out/exercises, which is made when the question is first shown: so nothing
that belongs to the lab changes, and its tests still pass. The folder solutions beside the kernels has a
solution of each, and at its top the explanation that is shown once the exercise is solved. No exercise needs
a GPU: cuda_exercise.py and triton_exercise.py beside this file say how each language is checked. What a
learner has solved is kept by progress.py.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from lab.errors import LabError
from lab.files import write_whole
from lab.learn import hints, progress
from lab.names import known

ROOT = Path(__file__).resolve().parent.parent.parent
COPIES = ROOT / "out" / "exercises"  # where learners mend theirs
LANGUAGES = ("cuda", "triton")
ACTIONS = ("check", "hint")
SUMMARIES = {  # in the order in which they are best solved
    "tail_mask": "a row whose end is no multiple of the block",
    "coalescing": "which thread, or program, reads which numbers",
    "bank_conflict": "a column of a tile in shared memory; in Triton, the shape of a tile",
    "barrier": "who may write while others still read; in Triton, what orders programs",
    "rescale": "the sums of an online softmax when its maximum grows",
    "empty_split": "a split of the context without a token",
    "page_lookup": "tokens in a paged KV cache",
    "grouped_queries": "keys that several query heads share, loaded once",
    "rounding_point": "where two fused ops must round in between",
    "stages": "how far ahead copies run: cp.async's wait, Triton's num_stages",
    "counter": "a counter in memory that the next launch needs again",
    "dependent_launch": "what a kernel may read before the preceding one has ended",
}


def copy_of(name: str, language: str) -> Path:
    """The learner's own file, a copy of the exercise where there is none yet. Raises LabError where it cannot
    be written."""
    given = file_of(name, language)
    path = COPIES / language / given.name
    if not path.exists():
        write_whole(path, given.read_text())
    return path


def shown(path: Path) -> str:
    """A path as it is printed: one that opens the file from the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def file_of(name: str, language: str) -> Path:
    """The exercise as it is given."""
    if language == "cuda":
        return ROOT / "cuda_src" / "exercises" / f"{name}.cu"
    return ROOT / "triton_kernels" / "exercises" / f"{name}.py"


def solution_of(name: str, language: str) -> Path:
    path = file_of(name, language)
    return path.parent / "solutions" / path.name


def header(path: Path) -> list[str]:
    """The paragraphs of the comment, or docstring, at the top of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        comment = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = text.splitlines()
        first_code = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
        comment = "\n".join(line[2:].removeprefix(" ") for line in lines[:first_code])
    return comment.strip().split("\n\n")


def question(name: str, language: str) -> str:
    """What the exercise asks: the header of its file as it was given, without the line about the check."""
    try:
        paragraphs = header(file_of(name, language))
    except (OSError, SyntaxError) as error:
        raise LabError(f"exercise {name}: {file_of(name, language)}: {error}") from None
    return "\n\n".join(p for p in paragraphs if not p.startswith("Mend it here"))


def explanation(name: str, language: str) -> str:
    return "\n\n".join(header(solution_of(name, language))[1:])


def check(name: str, language: str, path: Path | None = None, timeout: float = 60.0) -> str | None:
    """What is still wrong with the learner's copy (or with the file `path`), or None if it is mended.

    timeout: seconds that a call of a kernel may take. Raises LabError for an unknown name and for a file that
    does not compile.
    """
    known(name, list(SUMMARIES), "exercise")
    path = path or copy_of(name, language)
    if not path.exists():
        raise LabError(f"exercise {name}: {path} is not there")
    if language == "cuda":
        from lab.learn import cuda_exercise

        return cuda_exercise.check(path, timeout)
    from lab.learn import triton_exercise

    return triton_exercise.check(name, path, timeout)


# ---- the verb ----------------------------------------------------------------------------------------------


def add_arguments(parser):
    from lab.arguments import seconds

    parser.add_argument(
        "words",
        nargs="*",
        metavar="[check|hint] NAME",
        help="an exercise, to read its question; with check, to see whether it is mended; with hint, for the "
        "next of three hints; without a word, the list",
    )
    parser.add_argument("--language", choices=LANGUAGES, help="only this language; default: both")
    parser.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="SECONDS", help="time limit of a call (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="the list, or the result of a check, as JSON")


def main(args) -> int:
    words = list(args.words)
    action = words.pop(0) if words and words[0] in ACTIONS else "show"
    if len(words) > 1 or (action != "show" and not words):
        raise LabError(
            "which exercise? lab exercise check NAME, lab exercise hint NAME, or lab exercise NAME"
        )
    if not words:
        return show_list(args.json)
    name = known(words[0], list(SUMMARIES), "exercise")
    languages = [args.language] if args.language else list(LANGUAGES)
    if action == "check":
        return check_and_tell(name, languages, args.timeout, args.json)
    if args.json:
        raise LabError("--json goes with the list and with check")
    for language in languages:
        print(f"[{language}] {shown(copy_of(name, language))}")
        if action == "hint":
            show_hint(name, language)
        else:
            show_question(name, language)
    return 0


def show_list(as_json: bool) -> int:
    solved = progress.load()["solved"]
    if as_json:
        print(
            json.dumps(
                {name: {l: f"{name}/{l}" in solved for l in LANGUAGES} for name in SUMMARIES}, indent=1
            )
        )
        return 0
    for number, (name, summary) in enumerate(SUMMARIES.items(), 1):
        ticks = "  ".join(f"{l} {'✓' if f'{name}/{l}' in solved else '·'}" for l in LANGUAGES)
        print(f"{number:2}  {name:17} {ticks}  {summary}")
    left = [(n, l) for n in SUMMARIES for l in LANGUAGES if f"{n}/{l}" not in solved]
    print(f"\nnext: lab exercise {left[0][0]} --language {left[0][1]}" if left else "\nall solved")
    return 0


def show_question(name: str, language: str) -> None:
    print(question(name, language))
    if f"{name}/{language}" in progress.load()["solved"]:
        print(f"\nsolved ✓\n{explanation(name, language)}\n")
    else:
        print(f"\nMend that file, then: lab exercise check {name} --language {language}")
        print(f"A hint: lab exercise hint {name} --language {language}\n")


def show_hint(name: str, language: str) -> None:
    """The hints shown before, and one more."""
    known_hints = hints.of(name, language)
    shown = progress.next_hint(f"{name}/{language}", len(known_hints))
    for number, hint in enumerate(known_hints[:shown], 1):
        print(f"  hint {number} of {len(known_hints)}: {hint}")


def check_and_tell(name: str, languages: list[str], timeout: float, as_json: bool) -> int:
    """Checks, notes what is solved, and shows its explanation. Returns the exit status."""
    wrong = {}
    for language in languages:
        wrong[language] = check(name, language, timeout=timeout)
        if wrong[language] is None:
            progress.solve(f"{name}/{language}")
        if as_json:
            continue
        if wrong[language] is None:
            print(f"{name} in {language}: mended ✓\n\n{explanation(name, language)}\n")
        else:
            print(
                f"{name} in {language}: not mended yet: {wrong[language]}\n"
                f"    the question is at the top of {shown(copy_of(name, language))}; "
                f"a hint: lab exercise hint {name} --language {language}"
            )
    if as_json:
        print(json.dumps({"exercise": name, "wrong": wrong}, indent=1))
    return 1 if any(wrong.values()) else 0
