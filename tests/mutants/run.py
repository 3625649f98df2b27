"""`make mutants`: single faults planted in copies of the kernels; do the checks and tests notice each?

    python tests/mutants/run.py [--only TEXT] [--jobs N] [--minutes M] [--cases COMMIT]
    python tests/mutants/run.py --planted [--only TEXT] [--jobs N] [--minutes M]

Each mutant of mutants.py is written into a copy of the project that has the host build, so that only what a
mutant changes is compiled. Then the op's cases run as in `lab check`, and after them the tests that the
mutant names. The mutant is killed if one of these fails, crashes or does not end, and survives if all
succeed. The case or test that failed runs again without the mutant, and has to succeed there.

--cases COMMIT asks what the checks and tests of another commit would have noticed. Its whole tree is taken
and built, and the mutants are planted into that; a mutant whose text is not there is left out. Where a test
that a mutant names is not in that tree, all tests there that have the op's name run in its place.

--planted leaves out each barrier, fence and wait instead, and says what notices it: see notice.py. All of
them take more than an hour.

Exit status: 0 if all were killed; 1 if some survive or time ran out; 2 for a mistake of the list: a text that
is not in its file exactly once, a mutant that does not compile, a case or test that fails without one.
"""

import argparse
import functools
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mutants.mutant import Mutant, mutate, places  # noqa: E402
from mutants.mutants import MUTANTS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# Seconds of one command: a kernel that hangs is noticed, too. Of CPU time, which other work on the machine
# does not change, and longer ones by the clock, for a kernel that sleeps.
CPU_LIMIT, LIMIT = 240, 1200
# Not copied: large, or made by runs. The GPU build is not used here.
IGNORED = (
    ".git",
    ".venv",
    "out",
    "reports",
    "__pycache__",
    ".pytest_cache",
    "_cuda.*",
    "cuda",
    "host-thread",
    "tsan",
)
ENVIRONMENT = {"LAB_CUDA": "0", "LAB_BUILD_JOBS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Mistake(Exception):
    """What makes a score meaningless; the message says what it is."""


# ---- copies of the project ---------------------------------------------------------------------------------


def copy(folder: Path, commit: str | None) -> None:
    """Makes `folder` a built copy of the project as it is, or as it was at a commit."""
    if commit:
        folder.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
        if archive.returncode:
            raise Mistake(f"--cases {commit}: git has no such commit")
        subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    else:
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*IGNORED), symlinks=True)
    if (ROOT / ".venv").exists():  # where the compiler found headers
        (folder / ".venv").symlink_to(ROOT / ".venv")
    built, said = build(folder, jobs=os.cpu_count())
    if not built:
        raise Mistake(f"the host build fails without a mutant: {said}")


def restore(folder: Path, whole: Path, path: Path) -> None:
    """Puts a file of the copy `folder` back as it is in `whole`, and the build, so that nothing is compiled
    twice."""
    shutil.copy2(whole / path.relative_to(folder), path)
    if path.is_relative_to(folder / "cuda_src"):
        shutil.rmtree(folder / "build")
        shutil.copytree(whole / "build", folder / "build")
        for library in (whole / "lab").glob("_host.*"):
            shutil.copy2(library, folder / "lab")
        own_paths(folder, whole)


def own_paths(folder: Path, whole: Path) -> None:
    """Older trees go by the times of the files that the compiler named, with whole paths: here, those of this
    copy."""
    for file in (folder / "build").rglob("*.d"):
        made = file.stat()
        file.write_text(file.read_text().replace(str(whole), str(folder)))
        os.utime(file, ns=(made.st_atime_ns, made.st_mtime_ns))


def build(folder: Path, jobs: int = 1) -> tuple[bool, str]:
    """(succeeded, what was printed last)."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        text=True,
        env={**os.environ, "LAB_BUILD_JOBS": str(jobs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode == 0, last_line(done.stdout)


def place(mutant: Mutant, folder: Path) -> Path | None:
    """The file of a mutant in a copy, wherever it lay there; None if its text is not in one of that name
    once."""
    wanted = Path(mutant.file)
    found = [folder / wanted, *sorted((folder / wanted.parts[0]).rglob(wanted.name))]
    found = [path for path in found if path.is_file() and len(places(path.read_text(), mutant.old)) == 1]
    return found[0] if found else None


# ---- checks and tests, in processes that are forked when torch has been imported ---------------------------


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run_forked(command: tuple, folder: Path) -> tuple[bool, str]:
    """(whether a function with its arguments returned 0, what it printed), called in a child process with the
    copy's modules.

    A child that is forked has torch and Triton imported already, which takes longer than most checks.
    """
    log = folder.parent / f"{os.getpid()}.log"
    function, *arguments = command
    child = os.fork()
    if child == 0:
        status = 70
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
            os.setsid()  # whatever it starts can be ended with it
            sys.stdout = sys.stderr = file = open(log, "w", buffering=1)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.chdir(folder)
            for name in [
                name for name in sys.modules if name.partition(".")[0] in ("lab", "triton_kernels", "mutants")
            ]:
                del sys.modules[name]
            sys.path[:] = [
                str(folder),
                *(path for path in sys.path if not Path(path).is_relative_to(ROOT / "tests")),
            ]
            status = int(function(*arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ends, pid = time.monotonic() + LIMIT, 0
    try:
        while pid == 0 and time.monotonic() < ends:
            pid, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0 if pid else 0.02)
    finally:
        if pid == 0:  # too late, or interrupted
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if pid == 0:
        return False, f"{log.read_text(errors='replace')}\nno end after {LIMIT} s"
    said = log.read_text(errors="replace")
    return status == 0, said if os.WIFEXITED(
        status
    ) else f"{said}\nended by {signal.Signals(os.WTERMSIG(status)).name}"


def run_cases(op_name: str, backend: str, wanted: str, *chosen: tuple[str, int]) -> int:
    """Cases of an op as in `lab check`, on the CPU and in this process, up to the first wrong one: those
    chosen as (dtype, number), or all in the wanted dtype, or all."""
    from lab import check
    from lab.ops import OPS

    op = next(op for op in OPS if op.name == op_name)
    function = getattr(check.select(backend, "cpu", {op_name: backend}), op_name)
    dtypes = [name for name, dtype in check.DTYPES.items() if dtype in op.dtypes and wanted in ("", name)]
    for dtype, number in chosen or [(name, i) for name in dtypes for i in range(len(op.cases))]:
        print(f"case {dtype} {number}", flush=True)  # for failing_part(), also after a crash
        outcome = check.check_case(
            op, function, check.Rand("cpu", check.DTYPES[dtype]), op.cases[number].sizes
        )
        if outcome.error:
            print(f"{dtype}, {op.cases[number].why}: {outcome.error}".replace("\n", " "))
            return 1
    return 0


def run_tests(*words: str) -> int:
    import pytest

    return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *words])


def commands_of(mutant: Mutant, folder: Path) -> list[tuple]:
    """(function, arguments) of what should notice a mutant, the cheapest first."""
    backend = "cuda" if mutant.file.startswith("cuda_src") else "triton"
    commands = [(run_cases, mutant.op, backend, mutant.dtype)]
    words = shlex.split(mutant.tests.format(backend=backend))
    if words and not (folder / words[0]).exists():
        words = ["tests", "-m", "not oracle", "-k", f"{mutant.op} and not compile"]
    return commands + ([(run_tests, *words)] if words else [])


def failing_part(command: tuple, log: str) -> tuple:
    """The command of the one case or test that failed, by what a command printed; the whole one if that is
    not told."""
    function, *arguments = command
    if function is run_cases:
        if begun := re.findall(r"^case (\w+) (\d+)$", log, re.M):
            return function, *arguments[:3], (begun[-1][0], int(begun[-1][1]))
    elif failed := re.search(r"^FAILED (.+?) - ", log, re.M):
        return function, failed[1]
    return command


# ---- the run -----------------------------------------------------------------------------------------------


@functools.cache
def succeeds(command: tuple, whole: Path) -> bool:
    """Without a mutant. If it did not, it would call every mutant killed."""
    return run_forked(command, whole)[0]


def judge(mutant: Mutant, folder: Path, whole: Path) -> tuple[bool, str]:
    """(killed, by what) of a mutant, planted into the copy `folder` and taken out again. whole: the copy
    without a fault."""
    path = place(mutant, folder)
    right = path.read_text()
    try:
        path.write_text(mutate(right, mutant))
        if path.is_relative_to(folder / "cuda_src"):
            built, said = build(folder)
            if not built:
                raise Mistake(f"{mutant.file}, {mutant.why}: does not compile: {said}")
            library = next((folder / "lab").glob("_host.*"))
            if library.read_bytes() == (whole / "lab" / library.name).read_bytes():
                raise Mistake(f"{mutant.file}, {mutant.why}: compiles to the same library")
        for command in commands_of(mutant, folder):
            passed, log = run_forked(command, folder)
            if not passed:
                part = failing_part(command, log)
                if not succeeds(part, whole):
                    raise Mistake(f"{' '.join(map(str, part[1:]))} fails without a mutant, too")
                return True, f"{part[0].__name__.removeprefix('run_')}: {last_line(log)}"
        return False, ""
    finally:
        restore(folder, whole, path)


class Work:
    """What a process of the pool does: it has a copy of its own."""

    def __init__(self, whole: Path, ends: float):
        self.whole, self.ends, self.folder = whole, ends, None

    def __call__(self, number: int):
        """(number of a mutant, killed or None for no time left, by what); the mistake, if one is found."""
        if time.monotonic() > self.ends:
            return number, None, ""
        if self.folder is None:
            self.folder = self.whole.parent / f"copy-{os.getpid()}"
            shutil.copytree(self.whole, self.folder, symlinks=True)
            own_paths(self.folder, self.whole)
        try:
            return number, *judge(MUTANTS[number], self.folder, self.whole)
        except Mistake as mistake:
            return mistake


def score(chosen: list[int], jobs: int, work: Work) -> tuple[int, int, int]:
    """(killed, survived, not tried). Prints a line about each. Raises Mistake."""
    # What compiles for longest first: at the end the processes are then busy for nearly as long as each
    # other.
    chosen = sorted(chosen, key=lambda n: (Path(MUTANTS[n].file).suffix == ".py", -len(MUTANTS[n].op)))
    counts = {True: 0, False: 0, None: 0}
    with multiprocessing.get_context("fork").Pool(jobs, begin, [work]) as pool:
        for result in pool.imap_unordered(go_on, chosen):
            if isinstance(result, Mistake):
                raise result
            n, dead, by = result
            counts[dead] += 1
            says = {True: "killed   ", False: "SURVIVED ", None: "not tried"}[dead]
            print(f"{says} {MUTANTS[n].file}: {MUTANTS[n].why}  {by[:100]}", flush=True)
        pool.close()
        pool.join()  # so that their CPU time is counted
    return counts[True], counts[False], counts[None]


def begin(work: Work) -> None:
    """In each process of the pool: what go_on() does there."""
    global WORK
    WORK = work


def go_on(number: int):
    return WORK(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", metavar="COMMIT")
    parser.add_argument("--only", default="", help="mutants whose file and description have this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--planted", action="store_true")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if args.planted:
        sys.path.insert(0, str(ROOT))
        from mutants import notice

        return notice.main(args.only, args.minutes, args.jobs)
    started = time.monotonic()
    chosen = [n for n, m in enumerate(MUTANTS) if args.only in f"{m.file}: {m.why}"]
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            whole = Path(folder) / "whole"
            copy(whole, args.cases)
            absent = [n for n in chosen if place(MUTANTS[n], whole) is None]
            for n in absent:
                print(f"left out  {MUTANTS[n].file}: {MUTANTS[n].why}: its text is not there once")
            if absent and not args.cases or len(absent) == len(chosen):
                raise Mistake("no mutants, or the text of one is not in its file exactly once")
            import torch  # noqa: E401, F401  for the processes that are forked

            torch.set_num_threads(1)
            work = Work(whole, started + args.minutes * 60)
            killed, survived, late = score([n for n in chosen if n not in absent], args.jobs, work)
    except Mistake as mistake:
        print(f"mutants: error: {mistake}", file=sys.stderr)
        return 2
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        f"{killed} of {killed + survived} mutants killed"
        + (f"; {len(absent)} left out" if absent else "")
        + (f"; {late} not tried: time is up" if late else "")
        + f"; {time.monotonic() - started:.0f} s, {sum(u.ru_utime + u.ru_stime for u in used):.0f} s of CPU "
        "time"
    )
    return 1 if survived or late else 0


if __name__ == "__main__":
    sys.exit(main())
