"""`make gpu-check`: the checks that need an NVIDIA GPU. All steps run, even after a failure; each has its own
log in OUT.

  check       every op, both backends, all dtypes and cases, against the reference
  memcheck    the small cases under compute-sanitizer: no access outside an allocation
  racecheck   the small cases of the CUDA kernels under compute-sanitizer: no races in shared memory
  judge       `lab try` on planted cheats and on honest kernels; side by side where pytest-xdist is installed
  tests       the other tests marked gpu
  oracle      the model's logits and greedy tokens against Hugging Face transformers; left out if that is
              not installed
  text        the model under both backends and every plan: the same greedy tokens in fp32, where the plan
              supports it; tokens per second in fp32 and bf16
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.cli import take_any_text
from lab.errors import LabError, Unavailable, one_line
from lab.files import read_json, write_whole

TOGETHER = ("check", "memcheck", "racecheck", "judge")  # run at the same time, because they measure no times
# The pytest markers of a step.
MARKED = {"judge": "gpu and judge", "tests": "gpu and not judge and not oracle", "oracle": "oracle"}
STEPS = tuple(dict.fromkeys((*TOGETHER, *MARKED, "text")))
JUDGES = 8  # at most so many processes of the step judge, each with contexts of CUDA
LAB = [sys.executable, "-m", "lab"]
# `lab check` runs kernels in a child process, which the sanitizer must follow.
SANITIZER = ["--target-processes", "all", "--error-exitcode", "9", "--print-limit", "20"]
PROMPT = "What is the capital of France?"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="make gpu-check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", default="out/gpu-check", help="folder of the logs")
    parser.add_argument(
        "--model", help="model of the step text (default: smollm2-135m, or its shape if absent)"
    )
    parser.add_argument(
        "--steps", help="steps to run, with commas between (default: all that this machine can)"
    )
    args = parser.parse_args(argv)
    steps = args.steps.split(",") if args.steps else list(STEPS)
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise LabError(f"unknown step {', '.join(sorted(unknown))}: choose from {', '.join(STEPS)}")

    import torch

    if not torch.cuda.is_available():
        raise Unavailable(
            "gpu-check needs an NVIDIA GPU and a CUDA build of torch; `make test` needs neither"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"on {torch.cuda.get_device_name()}, torch {torch.__version__}; logs in {out}/", flush=True)
    if not args.steps and (lacking := oracle_lacks()):
        print(f"[oracle] left out: needs {lacking} (make oracle installs both)", flush=True)
        steps.remove("oracle")
    for step in steps:
        (out / f"{step}.log").unlink(missing_ok=True)
    run = functools.partial(run_step, out=out, model=args.model)
    together = [step for step in steps if step in TOGETHER]
    with concurrent.futures.ThreadPoolExecutor(len(TOGETHER)) as pool:
        results = dict(zip(together, pool.map(run, together)))
    results |= {step: run(step) for step in steps if step not in TOGETHER}
    failed = [step for step, ok in results.items() if not ok]
    print(
        f"gpu-check: {len(results) - len(failed)} steps passed, {len(failed)} failed"
        + (f": {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def oracle_lacks():
    """What the step oracle needs and this machine lacks, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers"
    return None if has_model() else "the model smollm2-135m"


def has_xdist():
    return importlib.util.find_spec("xdist") is not None


def has_model():
    """Whether the real weights of the default model are installed."""
    from lab.model.sources import default_model_file

    try:
        default_model_file()
    except LabError:
        return False
    return True


def run_step(step, out, model):
    say(f"[{step}] ...")
    began = time.monotonic()
    try:
        ok, said = text(out, model) if step == "text" else logged(command(step), out / f"{step}.log")
    except LabError as error:
        ok, said = False, str(error)
    say(f"[{step}] {'ok' if ok else 'FAILED'} in {time.monotonic() - began:.0f} s: {said}")
    return ok


def say(line):
    """Prints a line with its end in the same write: steps run in threads, and print() alone would let another
    step's line come between the two."""
    print(f"{line}\n", end="", flush=True)


def command(step):
    if step in MARKED:
        together = ["-n", str(min(JUDGES, os.cpu_count() or 1))] if step == "judge" and has_xdist() else []
        return [sys.executable, "-m", "pytest", "-q", *together, "-m", MARKED[step]]
    # Backends are named, so that a missing one is an error. racecheck leaves Triton out: its compiler lets
    # threads that hold copies of one value all store it, which racecheck reports as a race.
    backends = "cuda" if step == "racecheck" else "cuda,triton"
    check = [*LAB, "check", "--device", "cuda", "--backend", backends]
    if step == "check":
        return check
    # Kernels of fp16 and of bf16 differ in the type of a number alone.
    return [sanitizer(), "--tool", step, *SANITIZER, *check, "--quick", "--dtype", "fp32,bf16"]


def sanitizer():
    """The path of compute-sanitizer: from PATH, or from the toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    roots = [
        os.environ.get("CUDA_HOME"),
        nvcc and Path(os.path.realpath(nvcc)).parent.parent,
        "/usr/local/cuda",
    ]
    places = [shutil.which("compute-sanitizer"), *(f"{root}/bin/compute-sanitizer" for root in roots if root)]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if not found:
        raise Unavailable(
            "compute-sanitizer not found: it comes with the CUDA toolkit; put its folder on PATH"
        )
    return found


def logged(words, log):
    """Runs a command and appends its output to a log file. Returns (whether it exited with status 0, its last
    line)."""
    # Gives every tensor an allocation of its own, without torch's caching allocator and outside the arena of
    # `lab check`, so that memcheck sees an access beyond it.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LAB_CHECK_APART": "1"}
    env = {**os.environ, **alone} if "--tool" in words else None
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"$ {' '.join(map(str, words))}\n")
        file.flush()
        status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return status == 0, lines[-1].strip("= ") + ("" if status == 0 else f" (exit status {status}; see {log})")


def text(out, model):
    """Compares the greedy tokens of both backends and of all plans that support fp32. bf16 rounds
    differently, so its tokens are only reported."""
    from lab.contract import DTYPES
    from lab.model.plans import PLANS, refusal
    from lab.model.sources import DEFAULT_MODEL

    words = [*LAB, "run", model or DEFAULT_MODEL, "--device", "cuda", "--max-new-tokens", "64", "--no-stream"]
    what, note = ["--prompt", PROMPT], ""
    if model is None and not has_model():
        words += ["--weights", "random"]
        what, note = ["--ids", "1,2,3,4,5"], "RANDOM WEIGHTS, for the model is not installed; "
    said, runs = [], {}
    for dtype, plan, backend in itertools.product(("fp32", "bf16"), PLANS, ("cuda", "triton")):
        if refusal(plan, 1, DTYPES[dtype]):
            continue
        name = f"{backend} {plan} {dtype}"
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            options = ["--backend", backend, "--plan", plan, "--dtype", dtype, "--json", file.name]
            ok, line = logged([*words, *what, *options], out / "text.log")
            if not ok:
                return False, f"{name}: {line}"
            run = read_json(file.name)
        runs.setdefault(dtype, []).append(run)
        said.append(f"{name} {1e3 / statistics.median(run['decode_ms']):.0f} tokens/s")
    same = {
        dtype: all(run["output_ids"] == those[0]["output_ids"] for run in those)
        for dtype, those in runs.items()
    }
    said += [f"{dtype} tokens {'identical' if ok else 'DIFFER'}" for dtype, ok in same.items()]
    write_whole(out / "text.json", json.dumps(runs, indent=1) + "\n")
    return same["fp32"], note + ", ".join(said)


if __name__ == "__main__":
    take_any_text()
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"gpu-check: error: {one_line(str(error))}")
