"""Judges a kernel by what it wrote, in a process that never loads the kernel's file.

Each case of the contract is called four times on the same tensors: with random contents, with others, with
the same again, and later, when all other cases have been called in an order drawn at random, with new ones.
Before each call the outputs are filled with NaN; every tensor lies between guard zones. A `Refusal` says
what was seen, and its kind names what a kernel does that is seen so.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import torch

from lab.arena import INTEGERS, Arena, unpack
from lab.check import check_call, compare, same_bits, values_of
from lab.contract import DTYPES, Op, Rand
from lab.errors import LabError
from lab.judge.precision import ErrorsByWidth
from lab.judge.refusal import Refusal
from lab.worker import Died, Worker

LOOK_AGAIN = 0.3  # seconds after which wrong outputs are read again: somebody may still be writing them


@dataclass
class Outputs:
    """The outputs of one call, and what the contract wants. errors: those of other calls are counted there,
    too."""

    errors: ErrorsByWidth
    all: list = field(default_factory=list)  # (got, want, rtol, atol)

    def add(self, got, want, rtol, atol, shared=0.0) -> None:
        self.all.append((got.clone(), want, rtol, atol))
        self.errors.add(got, want, rtol, atol, shared)


class Remote:
    """The op in the kernel's process, as lab.check.check_call takes a function; keeps the process's
    answer."""

    def __init__(self, worker: Worker, name: str):
        self.worker, self.name, self.file = worker, name, worker.file
        self.reply: dict = {}
        self.new_threads = 0
        self.late = False  # whether the arena has changed since the answer came
        self.at_return = None  # the arena's bytes when the answer came

    def run(self, arena: Arena) -> str | None:
        before = self.worker.threads() if self.worker.process else None
        self.reply = self.worker.exchange(self.name, arena)
        self.at_return = arena.memory.clone()
        self.new_threads = 0
        deadline = time.monotonic() + LOOK_AGAIN  # a thread that has been joined is gone a moment later
        while before is not None and self.worker.process is not None:
            self.new_threads = self.worker.threads() - before
            if self.new_threads <= 0 or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.late = not torch.equal(arena.memory, self.at_return)
        error = self.reply.get("error")
        return None if error is None else str(error)

    def happened_since(self, arena: Arena) -> Refusal | None:
        """What is seen a moment after a call whose outputs were wrong: memory has changed, here or on the
        GPU, or the process has ended, as when a thread that the call left behind crashes."""
        time.sleep(LOOK_AGAIN)
        if not torch.equal(arena.memory, self.at_return):
            return written_late()
        if self.worker.process is None:
            return None
        try:
            late = self.worker.ask({"run": "written_since", "arguments": ()})["result"] is True
        except Died as died:
            self.worker.count(died)
            return Refusal(died.kind, f"after the call had returned, the kernel's process {died}")
        except (LabError, KeyError):
            self.worker.kill()  # its CUDA context may be lost
            return None
        return written_late() if late else None


class Judge:
    """Judges one op of a worker's file."""

    def __init__(self, op: Op, worker: Worker, seed: int):
        self.op, self.worker, self.seed = op, worker, seed
        self.remote = Remote(worker, op.name)
        self.launched: dict = {}  # (dtype, id of the case) -> {kernel: how many} in its last call

    def case(self, dtype_name: str, case) -> tuple[Refusal | None, float]:
        """(a refusal or None, the share of the tolerance used): three calls on the same tensors."""
        op, rand = self.op, Rand("cpu", DTYPES[dtype_name], self.seed)
        errors = ErrorsByWidth()
        arena, used, wanted, before = None, 0.0, [], None
        contents = [self.contents(rand, case.sizes) for _ in range(2)]
        for number, values in enumerate([*contents, contents[1]]):
            if arena is None:
                arena = Arena(values, "cpu", self.worker.file)
            else:
                arena.fill(values, keep=op.state)
            # The same contents a second time say nothing new about the sizes of errors.
            outputs = Outputs(errors if number < 2 else ErrorsByWidth())
            refusal, share = self.call(arena, outputs, wanted, later=number > 0)
            if refusal:
                return refusal, share
            used, wanted = max(used, share), [want for _, want, *_ in outputs.all]
            after = written(op, arena)
            if number == 2 and (differs := first_difference(before, after)):
                return Refusal(
                    "not repeatable", f"two calls on the same inputs give different bits in {differs}"
                ), used
            before = {name: t.clone() for name, t in after.items()}
            self.launched[dtype_name, id(case)] = self.remote.reply.get("launched")
        return errors.refusal(), used

    def again(self, dtype_name: str, case) -> Refusal | None:
        """One more call of a case with new contents, which must launch the same kernels."""
        rand = Rand("cpu", DTYPES[dtype_name], secrets.randbits(63))
        arena = Arena(self.contents(rand, case.sizes), "cpu", self.worker.file)
        refusal, _ = self.call(arena, Outputs(ErrorsByWidth()), [], later=False)
        return refusal or other_kernels(
            self.remote.reply.get("launched"), self.launched[dtype_name, id(case)], "in an earlier call"
        )

    def contents(self, rand: Rand, sizes) -> dict:
        return values_of(self.op, self.op.with_workspace(*self.op.inputs(rand, **sizes)))

    def call(
        self, arena: Arena, outputs: Outputs, earlier: list, later: bool
    ) -> tuple[Refusal | None, float]:
        """Calls the kernel once. earlier: the right values of the call before, in the same tensors; later:
        whether there was one."""
        self.remote.reply = {}
        outcome = check_call(self.op, self.remote, arena, {"out", *self.op.state}, outputs)
        if not self.remote.reply:  # the call before left something in `state` that no kernel may be given
            return Refusal("wrong result", outcome.error), outcome.used
        return self.refusal(outcome, arena, outputs, earlier, later), outcome.used

    def refusal(self, outcome, arena, outputs, earlier, later) -> Refusal | None:
        reply = self.remote.reply
        if reply.get("kind"):
            return Refusal(reply["kind"], str(outcome.error).removeprefix("not run: "))
        if patched := reply.get("patched"):
            return Refusal("patched functions", f"the file replaced {', '.join(map(str, patched[:4]))}")
        if outcome.kind == "raised":
            return Refusal("error", outcome.error)
        if outcome.kind == "overrun":
            return Refusal("out of bounds", outcome.error)
        if outcome.kind == "changed":
            return Refusal("changed input", outcome.error)
        if reply.get("late") or self.remote.late:
            return written_late()
        if outcome.error and (since := self.remote.happened_since(arena)):
            return since
        if not reply.get("launched"):
            also = f", and {outcome.error}" if outcome.error else ""
            return Refusal(
                "no kernel", f"the call launched none: use launch() in CUDA, kernel[grid]() in Triton{also}"
            )
        if not reply.get("own"):
            return only_of_torch(reply["launched"])
        if outcome.error:
            return wrong(self.op, outcome, arena, outputs, earlier)
        if later and self.remote.new_threads > 0:
            return Refusal("late work", f"a call leaves {self.remote.new_threads} more threads behind")
        return None


def wrong(op: Op, outcome, arena: Arena, outputs: Outputs, earlier: list) -> Refusal:
    """Names what is wrong with outputs that are. earlier: the right values of the call before, in the same
    tensors."""
    before = written(op, arena, arena.before)
    names = [name for name in before if name != "out" or op.verify is None]
    for name, (got, want, rtol, atol) in zip(names, outputs.all):
        bad = off(got, want, rtol, atol)
        left = bad & (bits(got) == bits(before[name])).reshape(bad.shape)
        if int(left.sum()) > 0 and bool((left == bad).all()):
            count = int(left.sum())
            return Refusal(
                "unwritten output", f"{count} of {got.numel()} elements of {name} were not written"
            )
    for (got, want, *limits), old in zip(outputs.all, earlier):
        same_shape = old.shape == want.shape and got.is_floating_point()
        if same_shape and not torch.equal(old, want) and compare(got, old, *limits).error is None:
            return Refusal("remembered result", "it is the right one of an earlier call, of other contents")
    if outputs.all and all(map(nearly_right, outputs.all)):
        return Refusal(
            "low precision", f"{outcome.error}; all are off by little, as after one more rounding in between"
        )
    if op.verify is not None and earlier_token(op, arena):
        return Refusal("unwritten output", outcome.error)
    return Refusal("wrong result", outcome.error)


def written(op: Op, arena: Arena, memory: torch.Tensor | None = None) -> dict:
    """The output and the arguments that the op changes, by name, in the arena or in a copy of its memory."""
    memory = arena.memory if memory is None else memory
    values = unpack(memory, arena.layout(), arena.recipe, readdress=False)
    names = ["out", *(name for name in op.mutates if name not in op.state)]
    return {name: values[name] for name in names if values.get(name) is not None}


def earlier_token(op: Op, arena: Arena) -> bool:
    """Whether an output of tokens was left as it was before the call."""
    return same_bits(written(op, arena)["out"], written(op, arena, arena.before)["out"])


def first_difference(before: dict, after: dict) -> str | None:
    """The name of an output of which two calls wrote different bits."""
    return next((name for name in after if not same_bits(before[name], after[name])), None)


def written_late() -> Refusal:
    return Refusal(
        "late work",
        "memory was written after the call had returned: join the work of other threads and streams",
    )


def other_kernels(now, before, when: str) -> Refusal | None:
    if now == before:
        return None
    return Refusal("other kernels", f"launched {named(now)}; {when} {named(before)}")


def only_of_torch(kernels: dict) -> Refusal:
    """Of a call whose kernels, {name: how many}, were launched by another than the file, as far as is
    seen."""
    return Refusal(
        "no kernel",
        "the file launched none by launch() in CUDA or kernel[grid]() in Triton; the GPU ran "
        + named(kernels),
    )


def named(kernels: dict) -> str:
    """A few kernels of {name: how many} for a message."""
    kernels = [f"{n} x {name}" if n > 1 else str(name) for name, n in (kernels or {}).items()]
    return ", ".join(kernels[:3]) + (f" and {len(kernels) - 3} more" if len(kernels) > 3 else "") or "none"


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(INTEGERS[t.element_size()])


def off(got, want, rtol, atol) -> torch.Tensor:
    """Which elements are outside the tolerance."""
    got, want = got.double(), want.double()
    near = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= rtol * want.abs() + atol)
    return ~near


def nearly_right(output) -> bool:
    """Whether no element is off by more than a tenth of the usual size of the right values."""
    got, want, *_ = output
    if not got.is_floating_point() or not bool(got.isfinite().all() & want.isfinite().all()):
        return False
    return float((got.double() - want).abs().max()) <= 0.1 * float(want.double().square().mean().sqrt())
