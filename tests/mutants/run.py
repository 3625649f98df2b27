"""`make mutants`: single faults planted in copies of the kernels; do the checks and tests notice each?

python tests/mutants/run.py [--cases COMMIT] [--only TEXT] [--jobs N] [--minutes M]

Each mutant of mutants.py is written into a copy of the project whose host build is at hand, so that one kernel is compiled
again; then `lab check` of its op runs, and the tests that the mutant names. A mutant is killed if one of these fails, and
survives if all succeed. What does not compile, or is not in its file once, is a mistake of the list: it ends the run.
--cases takes the contracts, checks and tests of another commit, to see what they would have noticed.
Exit status: 0 if all were killed, 1 if some survive or time ran out, 2 for a mistake.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutants import MUTANTS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240                                                 # seconds of one command: a kernel that hangs is noticed, too


def copy(folder: Path, commit: str | None) -> Path:
    """The project with its host build in `folder`; lab and tests from `commit` if one is given."""
    skip = shutil.ignore_patterns(".git", ".venv", "out", "reports", "__pycache__", "_cuda.*", "cuda")
    shutil.copytree(ROOT, folder, ignore=skip, symlinks=True)
    for file in (folder / "build" / "host").glob("*.d"):    # the compiler wrote absolute paths
        made = file.stat()
        file.write_text(file.read_text().replace(str(ROOT), str(folder)))
        os.utime(file, ns=(made.st_atime_ns, made.st_mtime_ns))
    if commit:
        shutil.rmtree(folder / "tests")
        archive = subprocess.run(["git", "archive", commit, "lab/ops", "lab/check.py", "lab/dispatch.py", "tests"], cwd=ROOT,
                                 check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    return folder


def run(words, folder, name):
    """(succeeded, last line said) of a command in a copy."""
    environment = {**os.environ, "LAB_CUDA": "0", "LAB_BUILD_JOBS": "1", "PYTHONPATH": str(folder),
                   "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, timeout=LIMIT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return False, f"{name}: no end after {LIMIT} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode == 0, f"{name}: {lines[-1] if lines else done.returncode}"


def commands_of(mutant, backend, folder):
    """(name, words) of what should notice a mutant."""
    words = ["-m", "lab", "check", "--op", mutant.op, "--backend", backend, "--device", "cpu"]
    commands = [("check", words + (["--dtype", mutant.dtype] if mutant.dtype else []))]
    if mutant.tests and (folder / mutant.tests.split()[0]).exists():
        commands.append(("tests", ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                                   *mutant.tests.format(backend=backend).split()]))
    return commands


def control(chosen, jobs, commit):
    """Every command must succeed where nothing is planted, or it would call every mutant killed: raises ValueError."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as place, ThreadPoolExecutor(jobs) as pool:
        folder = copy(Path(place) / "copy", commit)
        built, said = run(["setup.py", "--quiet", "build_ext", "--inplace"], folder, "build")
        if not built:
            raise ValueError(f"without a mutant: {said}")
        commands = {tuple(words): name for m in chosen for name, words in commands_of(
            m, "cuda" if m.file.startswith("cuda_src") else "triton", folder)}
        for passed, said in pool.map(lambda item: run(item[0], folder, item[1]), commands.items()):
            if not passed:
                raise ValueError(f"without a mutant: {said}")


def judge(mutant, folder):
    """(killed, by what) of a mutant in a copy, which is as before afterwards. Raises ValueError for a mistake of the list."""
    path = folder / mutant.file
    if not path.is_file():
        raise ValueError(f"{mutant.file} is not there")
    right = path.read_text()
    if right.count(mutant.old) < 1:
        raise ValueError(f"{mutant.file}: the text {mutant.old!r} is not there")
    backend = "cuda" if mutant.file.startswith("cuda_src") else "triton"
    build = ["setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        path.write_text(right.replace(mutant.old, mutant.new, 1))
        if backend == "cuda":
            made, said = run(build, folder, "build")
            if not made:
                raise ValueError(f"{mutant.file}, {mutant.why}: does not compile: {said}")
        for name, command in commands_of(mutant, backend, folder):
            passed, said = run(command, folder, name)
            if not passed:
                return True, said
        return False, ""
    finally:
        path.write_text(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", metavar="COMMIT")
    parser.add_argument("--only", default="", help="mutants whose file or description has this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in f"{m.file} {m.why}"]
    ends, killed, survived, late = time.monotonic() + args.minutes * 60, [], [], []
    chosen.sort(key=lambda m: m.file)                       # a copy that a mutant of the same file left compiles no other

    def work(share):
        with tempfile.TemporaryDirectory(prefix="mutants-") as place:
            folder = copy(Path(place) / "copy", args.cases)
            for mutant in share:
                if time.monotonic() > ends:
                    late.append(mutant)
                    continue
                dead, by = judge(mutant, folder)
                (killed if dead else survived).append(mutant)
                print(f"{'killed  ' if dead else 'SURVIVED'} {mutant.file}: {mutant.why}  {by[:90]}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            control(chosen, args.jobs, args.cases)
            list(pool.map(work, [chosen[i::args.jobs] for i in range(args.jobs)]))
        except ValueError as error:
            print(f"mutants: error: {error}", file=sys.stderr)
            return 2
    ran = len(killed) + len(survived)
    print(f"{len(killed)} of {ran} mutants killed" + (f"; {len(late)} not tried: time is up" if late else ""))
    return 1 if survived or late else 0


if __name__ == "__main__":
    sys.exit(main())
