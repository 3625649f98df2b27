"""Checks a Triton exercise without a GPU: its kernels run in the interpreter, in a process of their own
(lab/worker.py), on tensors with NaN around them.

Three things that a result does not show are watched besides: how many lines of memory a load or store
touches, how often a tensor is loaded, and how many bytes a loop keeps in flight. They are counted, not timed.
What a kernel reads before gdc_wait() is NaN, as in CUDA's host build.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lab.arena import Arena
from lab.errors import LabError, one_line
from lab.files import python_module
from lab.worker import Worker

LINE = 128  # bytes
NEEDED_IN_FLIGHT = 25_000  # bytes an SM of an H100: 3.35 TB/s x 1 us / 132 SMs
SHARED_MEMORY = 227 * 1024  # bytes an SM of an H100
DEFAULT_STAGES = 3  # Triton's num_stages where a launch names none


@dataclass(frozen=True)
class Task:
    """What a file has to do: its `function` takes the tensors of a case and then the output.

    cases: yields (a description of the case, the tensors, the right output).
    work: positions of tensors that it may change. exact: the result must agree bit for bit.
    watch: "lines", "loads of N" or "stages" (see Watch). early: the position of a tensor that the preceding
    kernel still writes until gdc_wait().
    """

    function: str
    cases: Callable
    work: tuple[int, ...] = ()
    exact: bool = False
    watch: str = ""
    early: int | None = None


def check(name: str, path: Path, timeout: float) -> str | None:
    """What is still wrong with the file `path` in the place of the exercise, or None. timeout: seconds that a
    call may take. Raises LabError for a file that cannot be loaded."""
    spec = {"module": __name__, "device": "cpu", "file": str(path), "name": name, "what": str(path)}
    with Worker(spec, timeout) as worker:
        worker.start()
        return first_fault(TASKS[name], worker.function(TASKS[name].function))


def first_fault(task: Task, function) -> str | None:
    """What is wrong in the first of the cases that fails; function: has `file`, and run(arena)."""
    for what, tensors, want in task.cases():
        wrong = _differs(task, function, tensors, want)
        if wrong:
            return f"{what}: {wrong}"
    return None


def _differs(task, function, tensors, want) -> str | None:
    """Calls function(*tensors, out). Says where `out` differs from `want`, or what else is wrong; or None."""
    out = torch.full(want.shape, torch.nan, dtype=torch.float16 if task.exact else torch.float32)
    values = {str(i): t for i, t in enumerate(tensors)} | {"out": out}
    arena = Arena(values, file=function.file)
    arena.remember()
    error = function.run(arena) or arena.damage({"out", *map(str, task.work)})
    if error:  # a LabError is ours, and its text is enough
        return one_line(error.removeprefix("LabError: "))
    out = arena.values()["out"].double()
    bad = ~((out - want).abs() <= (0 if task.exact else 1e-4 * (1 + want.abs())))  # true for NaN as well
    if not bad.any():
        return None
    i = int(bad.flatten().nonzero()[0])
    return (
        f"{int(bad.sum())} of {bad.numel()} elements are wrong; element {i} is "
        f"{float(out.flatten()[i]):.6g}, not {float(want.flatten()[i]):.6g}"
    )


# ---- in the worker's process -------------------------------------------------------------------------------


def in_worker(spec: dict) -> Callable:
    """Returns a function that gives the function of a name in spec["file"], watched as its task asks."""
    module, task = python_module(Path(spec["file"])), TASKS[spec["name"]]

    def function(name):
        def call(*args, out):
            watch = Watch(spec["file"])
            with watch.watching(), _early(args, task.early, watch):
                getattr(module, name)(*args, out)
            wrong = watch.verdict(task.watch, args)
            if wrong:
                raise LabError(wrong)
            return out

        return call

    return function


@dataclass
class Access:
    """One load or store of a program: the addresses of its elements, each once."""

    verb: str
    line: int  # of the source
    addresses: object
    itemsize: int


@dataclass
class Watch:
    """Notes all loads, stores and launches of a file's kernels while they are interpreted."""

    file: str
    accesses: list[Access] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)  # num_stages of each launch

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        import numpy as np

        from triton_kernels import interpreter
        from triton_kernels.interpreter import BUILDER, launches_interpreted

        run, load, store = interpreter.run, BUILDER.create_masked_load, BUILDER.create_masked_store

        def noted_run(kernel, grid, args, meta, reads=()):
            self.stages.append(meta.get("num_stages", DEFAULT_STAGES))
            return run(kernel, grid, args, meta, reads)

        def note(verb, pointers, mask):
            live = (
                pointers.data
                if mask is None
                else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            )
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.accesses.append(Access(verb, self.line(), np.unique(live), size))

        def noted_load(pointers, mask, *rest):
            note("load", pointers, mask)
            return load(pointers, mask, *rest)

        def noted_store(pointers, value, mask, *rest):
            note("store", pointers, mask)
            return store(pointers, value, mask, *rest)

        interpreter.run = noted_run
        BUILDER.create_masked_load, BUILDER.create_masked_store = noted_load, noted_store
        try:
            with launches_interpreted():
                yield
        finally:
            interpreter.run = run
            del BUILDER.create_masked_load, BUILDER.create_masked_store  # the methods of its class again

    def line(self) -> int:
        """The line of the learner's file that is being interpreted; 0 if it is none."""
        frame = inspect.currentframe()
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return frame.f_lineno if frame else 0

    def verdict(self, what: str, args) -> str | None:
        """What is wrong with the accesses, or None. what: the `watch` of a Task."""
        if what == "lines":
            return self.lines()
        if what.startswith("loads of"):
            return self.loads(args[int(what.split()[-1])])
        return self.in_flight() if what == "stages" else None

    def lines(self) -> str | None:
        """The first access that touches more lines of memory than its bytes need."""
        for access in self.accesses:
            touched = len({int(a) // LINE for a in access.addresses})
            fewest = -(-len(access.addresses) * access.itemsize // LINE)
            if touched > fewest:
                return (
                    f"line {access.line}: one {access.verb} of a program touches {touched} lines "
                    f"of {LINE} bytes, where {fewest} would do"
                )
        return None

    def loads(self, tensor: torch.Tensor) -> str | None:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        loads = [a for a in self.accesses if a.verb == "load"]
        count = sum(int(((a.addresses >= begin) & (a.addresses < end)).sum()) for a in loads)
        if count <= tensor.numel():
            return None
        return f"each key is loaded {count / tensor.numel():g} times, where once would do"

    def in_flight(self) -> str | None:
        """Whether the stages of the tile, the largest load, keep too few bytes in flight or do not fit."""
        tile = max(len(a.addresses) * a.itemsize for a in self.accesses if a.verb == "load")
        for stages in self.stages:
            said = f"tiles of {tile:,} bytes, num_stages {stages}: "
            flying, taken = max(stages - 1, 0) * tile, stages * tile
            if flying < NEEDED_IN_FLIGHT:
                return said + f"{flying:,} bytes are in flight, which is too few"
            if taken > SHARED_MEMORY:
                return said + f"{taken:,} bytes do not fit in shared memory"
        return None


@contextlib.contextmanager
def _early(args, position: int | None, watch: Watch) -> Iterator[None]:
    """Hides a tensor until a program calls gdc_wait(). Raises LabError if none did, or if nothing was loaded
    before.

    Programs run one after another here, so the first one shows what is read too early.
    """
    import triton.language as tl

    cuda = tl.extra.cuda
    originals = cuda.gdc_wait, cuda.gdc_launch_dependents
    hidden = args[position] if position is not None else None
    kept = None if hidden is None else hidden.clone()
    waited = []

    def wait():
        waited.append(len(watch.accesses))
        if hidden is not None:
            hidden.copy_(kept)

    cuda.gdc_wait, cuda.gdc_launch_dependents = wait, lambda: None
    if hidden is not None:
        hidden.fill_(torch.nan)
    try:
        yield
        if hidden is not None and not waited:
            raise LabError("no program called gdc_wait()")
        if hidden is not None and not waited[0]:
            raise LabError("nothing was loaded before gdc_wait(), and weights need not wait")
    finally:
        cuda.gdc_wait, cuda.gdc_launch_dependents = originals
        if hidden is not None:
            hidden.copy_(kept)


# ---- the tasks ---------------------------------------------------------------------------------------------


def _numbers(*shape, seed=0, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def _tail_mask():
    for rows, cols in ((3, 64), (4, 40), (2, 7)):
        # NaN follows x in memory, so that a read past its end spoils the mean.
        memory = torch.full((rows * cols + 64,), torch.nan)
        x = memory[: rows * cols].view(rows, cols).copy_(torch.arange(rows * cols).view(rows, cols) % 13)
        yield f"{rows} rows of {cols}", (x,), x.double().mean(1)


def _coalescing():
    x = _numbers(512)
    yield "512 numbers", (x,), 2 * x.double()


def _transpose():
    x = _numbers(32, 64)
    yield "32 rows of 64", (x,), x.double().T


def _centre():
    x = _numbers(512) + 3
    yield "512 numbers", (x, torch.full((8,), torch.nan)), x.double() - x.double().mean()


def _rescale():
    for tokens, slope in ((16, 0.0), (50, -0.2), (50, 0.2)):
        scores, values = (
            torch.arange(tokens) * slope + _numbers(tokens, spread=0.1),
            _numbers(tokens, 8, seed=1),
        )
        how = {0.0: "are about equal", -0.2: "fall", 0.2: "rise"}[slope]
        want = torch.softmax(scores.double(), 0) @ values.double()
        yield f"{tokens} tokens whose scores {how}", (scores, values), want


def _empty_split():
    for tokens in (128, 300, 33, 5):
        scores, values = _numbers(tokens, spread=3.0), _numbers(tokens, seed=1) + 1
        want = (torch.softmax(scores.double(), 0) @ values.double()).view(1)
        yield f"{tokens} tokens in 4 splits", (scores, values, torch.full((12,), torch.nan)), want


def _page_lookup():
    tokens = 75
    for size in (64, 32, 16, 8):
        pages = -(-tokens // size)
        table = torch.arange(pages, dtype=torch.int32).flip(0) * 2 + 1
        cache = torch.full((2 * pages, size), -1.0)
        want = torch.arange(tokens).float()
        t = torch.arange(tokens)
        cache[table[t // size].long(), t % size] = want
        yield f"pages of {size} tokens", (cache, table), want.double()


def _grouped_queries():
    q, k = _numbers(4, 32), _numbers(40, 32, seed=1)
    yield "4 query heads, 40 tokens", (q, k), q.double() @ k.double().T


def _rounding_point():
    x, r, w = (_numbers(256, seed=seed).half() for seed in range(3))
    h = (x.float() + r.float()).half()
    y = (h.float() * w.float()).half()
    yield "256 numbers", (x, r, w), torch.stack([h, y]).double()


def _stages():
    w, x = _numbers(64, 1024), _numbers(1024, seed=1)
    yield "64 rows of 1024", (w, x), w.double() @ x.double()


def _counter():
    x = _numbers(3, 256)
    yield "3 launches", (x, torch.full((8,), torch.nan), torch.zeros(1, dtype=torch.int32)), x.double().sum(1)


def _dependent_launch():
    x, w = _numbers(512), _numbers(512, seed=1)
    yield "x is NaN until gdc_wait()", (x, w), x.double() * w.double()


TASKS = {
    "tail_mask": Task("row_mean", _tail_mask),
    "coalescing": Task("double", _coalescing, watch="lines"),
    "bank_conflict": Task("transpose", _transpose, watch="lines"),
    "barrier": Task("centre", _centre, work=(1,)),
    "rescale": Task("average", _rescale),
    "empty_split": Task("average", _empty_split, work=(2,)),
    "page_lookup": Task("gather", _page_lookup),
    "grouped_queries": Task("scores", _grouped_queries, watch="loads of 1"),
    "rounding_point": Task("add_scale", _rounding_point, exact=True),
    "stages": Task("product", _stages, watch="stages"),
    "counter": Task("sums", _counter, work=(1, 2)),
    "dependent_launch": Task("scale", _dependent_launch, early=0),
}
