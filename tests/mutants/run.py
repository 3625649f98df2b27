"""`make mutants`: single faults planted in copies of the kernels; do the checks and tests notice each?

    python tests/mutants/run.py [--only TEXT] [--jobs N] [--minutes M] [--cases COMMIT]

Each mutant of mutants.py is written into a copy of the project that has the host build, so that only what a mutant changes
is compiled. Then the op's cases run as in `lab check`, and after them the tests that the mutant names. The mutant is killed
if one of these fails, crashes or does not end, and survives if all succeed. First everything runs once without a mutant,
and has to succeed.

--cases COMMIT asks what the checks and tests of another commit would have noticed. Its whole tree is taken and built, and
the mutants are planted into that; a mutant whose text is not there is left out. Where a test that a mutant names is not in
that tree, all tests there that have the op's name run in its place.

Exit status: 0 if all were killed; 1 if some survive or time ran out; 2 for a mistake of the list: a text that is not in its
file exactly once, a mutant that does not compile, a check or test that fails without one.
"""
import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mutants.mutants import MUTANTS, Mutant  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240                                         # seconds of one command: a kernel that hangs is noticed, too
# Not copied: large, or made by runs. The GPU build is not used here.
IGNORED = (".git", ".venv", "out", "reports", "__pycache__", ".pytest_cache", "_cuda.*", "cuda", "host-thread", "tsan")
ENVIRONMENT = {"LAB_CUDA": "0", "LAB_BUILD_JOBS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Mistake(Exception):
    """What makes a score meaningless; the message says what it is."""


# ---- copies of the project -------------------------------------------------------------------------------------------

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
    built, said = build(folder, jobs=os.cpu_count())
    if not built:
        raise Mistake(f"the host build fails without a mutant: {said}")


def build(folder: Path, jobs: int = 1) -> tuple[bool, str]:
    """(succeeded, what was printed last)."""
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, text=True,
                          env={**os.environ, "LAB_BUILD_JOBS": str(jobs)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode == 0, last_line(done.stdout)


def place(mutant: Mutant, folder: Path) -> Path | None:
    """The file of a mutant in a copy, wherever it lay there; None if its text is not in one of that name once."""
    wanted = Path(mutant.file)
    found = [folder / wanted, *sorted((folder / wanted.parts[0]).rglob(wanted.name))]
    found = [path for path in found if path.is_file() and path.read_text().count(mutant.old) == 1]
    return found[0] if found else None


# ---- checks and tests, in processes that are forked when torch has been imported -------------------------------------

def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run_forked(function, folder: Path) -> tuple[bool, str]:
    """(whether function() returned 0, the last line that it printed), called in a child process with the copy's modules.

    A child that is forked has torch and Triton imported already, which takes longer than most checks.
    """
    log = folder / "mutant.log"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()                             # whatever it starts can be ended with it
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] in ("lab", "triton_kernels", "mutants")]:
                del sys.modules[name]
            sys.path[:] = [str(folder), *(path for path in sys.path if not Path(path).is_relative_to(ROOT / "tests"))]
            status = int(function())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ends, pid = time.monotonic() + LIMIT, 0
    while pid == 0 and time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if pid else 0.02)
    if pid == 0:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False, f"no end after {LIMIT} s"
    said = last_line(log.read_text(errors="replace"))
    return status == 0, said if os.WIFEXITED(status) else f"ended by {signal.Signals(os.WTERMSIG(status)).name}"


def run_cases(op_name: str, backend: str, dtype: str) -> int:
    """`lab check` of one op under one backend on the CPU, in this process and up to the first wrong case."""
    from lab.check import check_case
    from lab.contract import DTYPES, Rand
    from lab.dispatch import select
    from lab.ops import OPS
    op = next(op for op in OPS if op.name == op_name)
    function = getattr(select(backend, "cpu", {op_name: backend}), op_name)
    for name in [dtype] if dtype else DTYPES:
        for case in op.cases if DTYPES[name] in op.dtypes else ():
            outcome = check_case(op, function, Rand("cpu", DTYPES[name]), case.sizes)
            if outcome.error:
                print(f"{name}, {case.why}: {outcome.error}".replace("\n", " "))
                return 1
    return 0


def run_old_check(op_name: str, backend: str, dtype: str) -> int:
    """The same by the command's own function, for trees whose modules lie elsewhere."""
    from lab.cli import main
    return main(["check", "--op", op_name, "--backend", backend, "--device", "cpu", *(["--dtype", dtype] if dtype else [])])


def run_tests(words: list[str]) -> int:
    import pytest
    return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--durations=0", "--no-header", *words])


def commands_of(mutant: Mutant, folder: Path, commit: str | None) -> dict[tuple, object]:
    """{(what, ...): function} of what should notice a mutant, the cheapest first."""
    backend = "cuda" if mutant.file.startswith("cuda_src") else "triton"
    check = ("check", mutant.op, backend, mutant.dtype)
    commands = {check: lambda: (run_old_check if commit else run_cases)(*check[1:])}
    words = mutant.tests.format(backend=backend).split()
    if words and not (folder / words[0]).exists():
        words = ["tests", "-m", "not oracle", "-k", f"{mutant.op} and not compile"]
    if words:
        commands["tests", *words] = lambda: run_tests(words)
    return commands


# ---- the run ---------------------------------------------------------------------------------------------------------

def judge(mutant: Mutant, folder: Path, whole: Path, commit: str | None) -> tuple[bool, str]:
    """(killed, by what) of a mutant, planted into the copy `folder` and taken out again. whole: the copy without a fault."""
    path = place(mutant, folder)
    right = path.read_text()
    try:
        path.write_text(right.replace(mutant.old, mutant.new))
        if path.is_relative_to(folder / "cuda_src"):
            built, said = build(folder)
            if not built:
                raise Mistake(f"{mutant.file}, {mutant.why}: does not compile: {said}")
        for (what, *_), function in commands_of(mutant, folder, commit).items():
            passed, said = run_forked(function, folder)
            if not passed:
                return True, f"{what}: {said}"
        return False, ""
    finally:
        path.write_text(right)
        if path.is_relative_to(folder / "cuda_src"):        # the objects as they were, so that none is compiled twice
            shutil.rmtree(folder / "build")
            shutil.copytree(whole / "build", folder / "build")


class Work:
    """What a process of the pool does: it has a copy of its own."""

    def __init__(self, whole: Path, commit: str | None, ends: float):
        self.whole, self.commit, self.ends, self.folder = whole, commit, ends, None

    def own(self) -> Path:
        if self.folder is None:
            self.folder = self.whole.parent / f"copy-{os.getpid()}"
            shutil.copytree(self.whole, self.folder, symlinks=True)
        return self.folder

    def without_a_mutant(self, command):
        name, mutant = command
        passed, said = run_forked(commands_of(mutant, self.own(), self.commit)[name], self.own())
        return name, passed, said

    def with_one(self, number):
        """(number, killed or None for no time, by what)."""
        if time.monotonic() > self.ends:
            return number, None, ""
        try:
            return number, *judge(MUTANTS[number], self.own(), self.whole, self.commit)
        except Mistake as mistake:
            return number, "mistake", str(mistake)


WORK: Work | None = None                            # of this process, set before the pool forks


def call(task):
    return getattr(WORK, task[0])(task[1])


def score(chosen: list[int], jobs: int, whole: Path, commit: str | None) -> tuple[int, int, int]:
    """(killed, survived, not tried). Prints a line about each. Raises Mistake."""
    commands = {name: MUTANTS[n] for n in chosen for name in commands_of(MUTANTS[n], whole, commit)}
    # What compiles for longest first: at the end the processes are then busy for nearly as long as each other.
    chosen = sorted(chosen, key=lambda n: (Path(MUTANTS[n].file).suffix == ".py", -len(MUTANTS[n].op)))
    counts = {True: 0, False: 0, None: 0}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for name, passed, said in pool.imap_unordered(call, [("without_a_mutant", item) for item in commands.items()]):
            if not passed:
                raise Mistake(f"{' '.join(name)} fails without a mutant: {said}")
        for n, dead, by in pool.imap_unordered(call, [("with_one", n) for n in chosen]):
            if dead == "mistake":
                raise Mistake(by)
            counts[dead] += 1
            says = {True: "killed   ", False: "SURVIVED ", None: "not tried"}[dead]
            print(f"{says} {MUTANTS[n].file}: {MUTANTS[n].why}  {by[:100]}", flush=True)
        pool.close()
        pool.join()
    return counts[True], counts[False], counts[None]


def main() -> int:
    global WORK
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", metavar="COMMIT")
    parser.add_argument("--only", default="", help="mutants whose file and description have this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
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
            import torch, triton, pytest  # noqa: E401, F401  for the processes that are forked
            torch.set_num_threads(1)
            WORK = Work(whole, args.cases, started + args.minutes * 60)
            killed, survived, late = score([n for n in chosen if n not in absent], args.jobs, whole, args.cases)
    except Mistake as mistake:
        print(f"mutants: error: {mistake}", file=sys.stderr)
        return 2
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{killed} of {killed + survived} mutants killed"
          + (f"; {len(absent)} left out" if absent else "") + (f"; {late} not tried: time is up" if late else "")
          + f"; {time.monotonic() - started:.0f} s, {sum(u.ru_utime + u.ru_stime for u in used):.0f} s of CPU time")
    return 1 if survived or late else 0


if __name__ == "__main__":
    sys.exit(main())
