"""`lab try FILE --op OP`: a kernel of your own in the place of a built-in one: judged and, on a GPU, raced
and drawn.

FILE.cu has what cuda_src/OP.cu has: the launcher that launchers/OP.h declares. FILE.py has what
triton_kernels/OP.py has: a function named OP with the same arguments. A copy of the built-in file is a good
start: `lab new kernel OP` makes one. The contract, its cases, its tolerances and the benchmark are the
built-in kernels'; in the records the backend is called by the file's name.

The file is loaded by a worker process alone (lab/worker.py). This process judges what the kernel wrote
(lab/judge), so nothing that the file does, ending its process included, can make it pass.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from lab.arguments import names, numbers
from lab.contract import BACKENDS, DTYPES, Op
from lab.errors import LabError, Unavailable
from lab.harness.request import Request
from lab.judge.cases import RANDOM, judge_again, judge_cases
from lab.judge.kernel_file import build, require_kernel_file
from lab.judge.race import RacedFile
from lab.judge.results import draw, race
from lab.judge.verdict import Judge
from lab.names import known
from lab.ops import find
from lab.worker import Worker


def main(args) -> int:
    op, device = find(args.op), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device cuda: this machine has no usable NVIDIA GPU; use --device cpu")
    taken = [name for name, dtype in DTYPES.items() if dtype in op.dtypes]
    dtypes = (
        [known(name, taken, f"dtype of {op.name}") for name in names(args.dtype)] if args.dtype else taken
    )
    if op.whole_step and device == "cuda" and not args.check_only:
        raise LabError(f"{op.name} is a whole step, which no race of ops has: use --check-only")
    require_kernel_file(args.file)
    name = args.file.name
    if name in BACKENDS:
        raise LabError(f"{name} is a backend's name: call the file something else")
    request = race_of(op, args, dtypes)
    spec = {
        "module": "lab.judge.child",
        "file": str(args.file.resolve()),
        "op": op.name,
        "device": device,
        "built": None,
        "what": str(args.file),
    }
    memory = int(args.memory * 2**30)
    with tempfile.TemporaryDirectory(prefix="lab-try-") as folder:
        if args.file.suffix == ".cu":
            spec["built"] = str(build(args.file, op, device, Path(folder), args.timeout, memory))
        with Worker(spec, args.timeout, memory) as worker:
            worker.start()
            return try_in(worker, op, args, request, device)


def try_in(worker: Worker, op: Op, args, request: Request, device: str) -> int:
    """Judges the file that a worker has loaded, and races it where there is a GPU; returns the exit
    status."""
    name = args.file.name
    judge = Judge(op, worker, RANDOM.getrandbits(63) if args.seed is None else args.seed)
    failed = sum(judge_cases(judge, name, dtype) for dtype in request.dtypes)
    if not failed:
        failed = judge_again(judge, request.dtypes)
    if failed:
        print(f"{failed} cases failed (--seed {judge.seed}): a kernel that is wrong is not raced")
        return 1
    if args.check_only or device == "cpu":
        print(
            "right in every case" + ("" if args.check_only else "; not raced, for emulated times say nothing")
        )
        return 0
    status = race(name, RacedFile(op, worker), request)
    return draw(name, request.out) if status == 0 else 1


def race_of(op: Op, args, dtypes) -> Request:
    """The bench that races a file: its op alone, beside the built-in kernels and the vendor's."""
    return Request(
        "ops",
        args.out or f"out/try/{args.file.stem}",
        ops=(op.name,),
        models=tuple(names(args.model)),
        batches=tuple(numbers(args.batch)),
        contexts=tuple(numbers(args.context)),
        dtypes=tuple(dtypes),
        fresh=True,
    )
