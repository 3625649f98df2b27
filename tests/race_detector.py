"""`make tsan`: the host build under ThreadSanitizer, with every op and every rung of the ladders once at one
seed.

    python tests/race_detector.py                    all ops, in the shapes of a CPU and of a GPU, and the
                                                     ladders
    python tests/race_detector.py --op sample        only these (repeatable; ladders: ladder/linear)

`python tests/mutants/run.py --planted` leaves out each barrier, fence and wait and asks whether this notices.

A race is reported with both places in cuda_src. Exit code: 0, or 1 with the reports. The sanitizer remembers
what about 2,000 CUDA threads of a launch have done, so the grids here are small: a fence between blocks that
it has forgotten would not be missed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "tsan"
RACES = 66  # the exit code of a run with races
# More splits than a cluster has blocks, so that the last block merges; in few blocks.
TICKETS = {
    "decode_attention": dict(lengths=(1100,), q_heads=2, kv_heads=1, head_dim=64, splits=12),
    "rope_append_attention": dict(positions=(1100,), q_heads=2, kv_heads=1, head_dim=64, splits=12),
    # the same barriers in a launch of few threads
    "norm_linear_argmax": dict(batch=2, n=40, k=64),
}
# Few splits, which one cluster merges, and long rows of which its blocks share k: in the shapes of a GPU.
CLUSTERS = {
    "decode_attention": dict(lengths=(700,), q_heads=2, kv_heads=1, head_dim=64, splits=4),
    "rope_append_attention": dict(positions=(699,), q_heads=2, kv_heads=1, head_dim=64, splits=4),
    "linear": dict(batch=17, n=8, k=8200),
}
# More rows of x than are multiplied at a time, by warps that share no rows of w and therefore wait for no
# other warp in between: an odd k has no vector loads, for which alone warps share rows.
ALONE = {"norm_linear": dict(batch=12, n=40, k=37)}
# Rows of x of which shared memory holds a part at a time: the next part must not overwrite what another warp
# still multiplies. In the shapes of a GPU. (linear_add: an odd number of columns: 4 rows are staged.)
PARTS_OF_X = {
    "linear_add": dict(batch=2, n=8, k=6203),
    "norm_linear_silu_mul": dict(batch=16, n=8, k=4160, format="int8-g32"),
}
# Packed weights by warpgroups, in the 6 blocks of a cluster, rings of codes and of x more than once around:
# formats with scales by group, in one segment (four runs of columns) and in two; and up to 16 rows of x, the
# first of them with a scale a row.
WARPGROUPS = {
    "linear": dict(batch=17, n=8, k=5000, format="int4-g128-zero"),
    "norm_linear_silu_mul": dict(batch=17, n=8, k=4200, format="fp8-g128"),
}
FEWER_ROWS = {
    "linear": dict(batch=12, n=8, k=8200, format="fp8"),
    "norm_linear_silu_mul": dict(batch=12, n=8, k=8200, format="int4-g128"),
}
MORE = {
    "sample": dict(batch=2, vocab=1030, temperature=1.3, top_k=50, top_p=0.8, seed=1),
    "norm_linear": dict(batch=12, n=40, k=264),
    "linear": dict(batch=3, n=33, k=7000),
    # q, k and v in one phase, in formats whose scales belong to two segments.
    "decode_step": dict(
        layers=2,
        hidden=264,
        intermediate=136,
        vocab=40,
        q_heads=2,
        kv_heads=1,
        head_dim=64,
        position=5,
        format="q4_k",
        head_format="q6_k",
        more_format="q6_k",
    ),
}


INSTRUMENTED = {"LAB_CUDA": "0", "LAB_HOST_SANITIZE": "thread", "LAB_HOST_GPU_SHAPES": "1"}


def build() -> Path:
    """The instrumented extension; what has not changed is not compiled again."""
    environment = {**os.environ, **INSTRUMENTED}
    command = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", str(BUILT)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return max((BUILT / "lab").glob("_host.*"), key=lambda file: file.stat().st_mtime_ns)


def sanitizer() -> str:
    """The sanitizer's library, which has to be there before Python loads anything."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    found = subprocess.run(
        [compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"race_detector: {compiler} has no libtsan.so: install it (Debian: it comes with g++)")
    return str(Path(found).resolve())


def run_inside(extension: Path, ops: list[str], limit_s: int = 600, seed: int = 1) -> tuple[int, str]:
    """(exit code, what was printed) of the cases under the sanitizer, in a process of their own. seed: of the
    schedule."""
    # No address randomisation: some kernels place memory where the sanitizer does not expect it.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(),
        "OMP_NUM_THREADS": "1",
        "LAB_HOST_SEED": str(seed),
        "TSAN_OPTIONS": f"exitcode={RACES}:ignore_noninstrumented_modules=1:report_thread_leaks=0"
        ":report_signal_unsafe=0:history_size=4",
    }
    command = [*prefix, sys.executable, __file__, "--inside", str(extension)]
    for op in ops:
        command += ["--op", op]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as late:
        return 124, f"{(late.stdout or b'').decode(errors='replace')}\nnot done after {limit_s} s"
    return done.returncode, done.stdout


def inside(extension: Path, ops: list[str]) -> int:
    """Runs the cases in this process. Wrong results count, too."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from mutants import planted

    from lab.check import check_case
    from lab.contract import Rand
    from lab.ops import OPS
    from lab.rungs import RUNGS

    module, wrong = planted.load(extension), 0

    def check(what, op, function, dtype, sizes):
        nonlocal wrong
        outcome = check_case(op, function, Rand("cpu", dtype), sizes)
        if outcome.error:
            print(f"WRONG: {what} {sizes}: {outcome.error}", flush=True)
            wrong += 1

    for shapes in ("cpu", "gpu"):
        os.environ["LAB_HOST_SHAPES"] = shapes
        for op in OPS:
            if ops and op.name not in ops:
                continue
            sizes = [
                extra[op.name]
                for extra in (TICKETS, CLUSTERS, ALONE, PARTS_OF_X, WARPGROUPS, FEWER_ROWS, MORE)
                if op.name in extra
            ]
            for one in [*sizes, *(c.sizes for c in small(op))]:
                check(f"{op.name} ({shapes} shapes)", op, planted.bind(op, module), op.dtypes[-1], one)
            print(f"{op.name} {shapes}: done", flush=True)
    os.environ["LAB_HOST_SHAPES"] = "cpu"
    for rung in RUNGS:
        if rung.own_kernel or "cuda" in rung.absent or (ops and f"ladder/{rung.ladder}" not in ops):
            continue
        op = next(op for op in OPS if op.name == rung.op)
        print(f"ladder {rung.ladder} {rung.number}", flush=True)
        check_rung(check, rung, op, module)
    return 1 if wrong else 0


def small(op):
    """An op's cases, but those of many thread blocks: one seed in a minute or two."""
    most = {"decode_attention": 2, "rope_append_attention": 2, "decode_step": 2}
    return op.cases[: most.get(op.name, len(op.cases))]


def check_rung(check, rung, op, module):
    """The first case that the rung takes, with the instrumented module in the place of the installed one."""
    import torch

    from lab import extension, ladder
    from lab.contract import Rand
    from lab.learn import ladder_check

    installed, changed = sys.modules.get("lab._host"), extension.changed
    import lab

    sys.modules["lab._host"] = lab._host = module
    # It was built just now, but perhaps with another file in the place of a kernel's, so that it does not
    # name the sources that lie here: refused for that, no rung would run.
    extension.changed = lambda module: None
    try:
        for case in ladder_check.cases_of(rung.ladder):
            if rung.takes(op.bound(*op.inputs(Rand("cpu", torch.bfloat16), **case.sizes))):
                what = f"ladder/{rung.ladder} {rung.number}"
                return check(what, op, ladder.bind(rung, "cuda"), torch.bfloat16, case.sizes)
    finally:
        extension.changed = changed
        if installed is not None:
            sys.modules["lab._host"] = lab._host = installed


def places(report: str) -> str:
    """The lines of the kernels' sources that the first report names."""
    named = re.findall(r"((?:\w+/)*\w+\.cuh?:\d+)", report)
    return ", ".join(dict.fromkeys(name.split("cuda_src/")[-1] for name in named[:6]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside(args.inside, args.op)
    code, said = run_inside(build(), args.op, 3600)
    print(said, end="")
    races = said.count("WARNING: ThreadSanitizer: data race")
    print("race detector:", f"{races} races" if races else "no race" if code == 0 else "FAILED")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
