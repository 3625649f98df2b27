"""The rungs of the ladders: what each changes, what it should gain, where it is absent. No import of torch.

The ladders of linear, rmsnorm and decode_attention go from a naive kernel to the op's own kernel; each rung
adds one idea. A rung is a kernel in cuda_src/ladder/<op>.cu and triton_kernels/ladder/<op>.py; the last one,
called Product, is the op's own kernel. What a rung should gain is argued for one H100: 132 multiprocessors
(SMs), 3.35 TB/s, and a DRAM latency of about 600 ns, so about 2 MB must be in flight to keep the memory busy.
lab/ladder.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lab.errors import LabError

BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Rung:
    """One step of a ladder. The sizes that `gain` argues about are those of `lab bench ops --ladder`."""

    op: str
    number: int
    name: str
    idea: str  # what it changes
    gain: str  # what that should gain on an H100, and why
    factor: float  # promised speed over the rung before, at least; 1: no promise
    otherwise: str  # why it may gain less
    absent: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # backend -> why there is no such rung
    needs: str = ""  # what its arguments must be, in words
    fits: Callable | None = None  # (*args) -> whether they are that

    @property
    def title(self):
        return f"{self.number}. {self.name}"

    @property
    def product(self):
        return self.name == "Product"


# ---- what rungs need ---------------------------------------------------------------------------------------


def _whole_vectors(x, *_, **__):
    return x.shape[-1] * x.itemsize % 16 == 0


def _half_vectors(x, *_, **__):
    return x.itemsize == 2 and _whole_vectors(x)


def _plain_rows(x, w, eps, residual=None):
    return x.dim() == 2 and residual is None


def _plain_vectors(x, w, eps, residual=None):
    return _plain_rows(x, w, eps, residual) and _whole_vectors(x)


def _kept_vectors(x, w, eps, residual=None):
    return _plain_vectors(x, w, eps, residual) and x.shape[1] * x.itemsize <= 256 * 4 * 16


def _power_of_two_head(q, *_, **__):
    return q.shape[2] in (64, 128)


VECTORS = dict(needs="rows of a multiple of 16 bytes", fits=_whole_vectors)
ROWS = dict(needs="a 2-D x and no residual", fits=_plain_rows)
ROW_VECTORS = dict(needs="a 2-D x of rows of a multiple of 16 bytes, and no residual", fits=_plain_vectors)
HEADS = dict(needs="head_dim 64 or 128", fits=_power_of_two_head)

COMPILER_LAYOUT = "Triton's compiler chooses the layout of shared memory, with its swizzles, itself."
ROW_IN_BLOCK = (
    "in Triton the op's own kernel, which is the next rung, already keeps the whole row in registers."
)

RUNGS = (
    Rung(
        "linear",
        1,
        "Naive",
        "one thread per output goes through its row of w alone, element by element",
        "the start: 4096 threads on 132 SMs, each with a few 2-byte loads in flight; a warp's load touches "
        "32 lines",
        1.0,
        "",
    ),
    Rung(
        "linear",
        2,
        "Shared memory",
        "a warp copies a tile of 32 rows, neighbouring lanes reading neighbouring "
        "elements; then each thread goes through its row there",
        "each line is loaded once, with few requests; but a read of shared memory has all 32 lanes on one "
        "bank",
        1.5,
        "One warp a block copies and multiplies in turn, so DRAM idles during the multiplies; and in the "
        "naive kernel most of the repeated loads of a line already hit L1.",
        absent={"triton": COMPILER_LAYOUT},
    ),
    Rung(
        "linear",
        3,
        "Padded",
        "rows of the tile are one bank longer, so that the 32 lanes read from 32 banks",
        "a read of shared memory takes 1 step instead of 32",
        2.0,
        "Once the reads are short, the copy, which waits for DRAM, takes most of the time.",
        absent={"triton": COMPILER_LAYOUT},
    ),
    Rung(
        "linear",
        4,
        "Warp reduction",
        "a warp per output reads its row directly into registers; shuffles add the lanes",
        "no pass through shared memory, no barrier, and 32 times as many threads with loads in flight",
        2.0,
        "A load of 2 bytes a lane moves only 64 bytes a warp: the number of load instructions is the limit.",
    ),
    Rung(
        "linear",
        5,
        "Vectorised",
        "16 bytes a lane and load",
        "8 times the bytes in flight for the same number of loads (bfloat16)",
        2.0,
        "If the compiler had unrolled the loop well, enough loads were in flight before.",
        **VECTORS,
    ),
    Rung(
        "linear",
        6,
        "Pipeline",
        "cp.async keeps seven loads of each lane in flight, through a ring in shared memory",
        "3.5 KB in flight a warp, 14 MB on the card, however the compiler unrolls the loop",
        1.1,
        "The loads pass through shared memory, which costs an extra instruction each; unrolled plain loads "
        "of rung 5 with 31 warps an SM may keep DRAM as busy.",
        **VECTORS,
    ),
    Rung(
        "linear",
        7,
        "Split-K",
        "the four warps of a block share a row, a quarter of k each",
        "four times the warps, so that a matrix of 4096 rows fills all SMs to the end",
        1.05,
        "With 4096 rows every SM already has its share of warps; narrow matrices gain more.",
        **VECTORS,
    ),
    Rung(
        "linear",
        8,
        "Tensor cores",
        "a warp multiplies 16 rows of w with 8 rows of x by one instruction",
        "nothing at one row of x, where memory is the limit; at 8 rows w is read once, not 8 times as in "
        "rungs below",
        1.0,
        "At one row of x the multiply's other seven columns are wasted, and their cost is not hidden: w "
        "passes through shared memory, and fewer warps load it.",
        needs="float16 or bfloat16, rows of a multiple of 16 bytes",
        fits=_half_vectors,
    ),
    Rung(
        "linear",
        9,
        "Product",
        "the op's own kernel: a warp uses each load of x for 4 rows of w, a load is "
        "replaced as soon as its data are used, and the first loads are issued before the preceding kernel "
        "has ended",
        "a quarter of the reads of x, and no start-up gap between kernels",
        1.05,
        "With one large matrix bandwidth is the only limit, and the rungs below may already reach it.",
    ),
    Rung(
        "rmsnorm",
        1,
        "Naive",
        "one thread per row reads it twice, alone",
        "the start: 64 rows are two warps on the whole card, and each lane walks 8192 elements",
        1.0,
        "",
        **ROWS,
    ),
    Rung(
        "rmsnorm",
        2,
        "Shared memory",
        "a block of 256 threads per row; sums are added in shared memory, in pairs",
        "256 times the threads, and neighbouring threads on neighbouring addresses",
        20.0,
        "",
        absent={"triton": COMPILER_LAYOUT},
        **ROWS,
    ),
    Rung(
        "rmsnorm",
        3,
        "No bank conflicts",
        "the numbers of a pair are as far apart as there are threads left, so that "
        "neighbouring threads use neighbouring banks",
        "fewer steps in 8 reads of shared memory",
        1.0,
        "The tree is a small part of a row's time: its conflicts cost tens of cycles, the loads thousands.",
        absent={"triton": COMPILER_LAYOUT},
        **ROWS,
    ),
    Rung(
        "rmsnorm",
        4,
        "Warp reduction",
        "shuffles add the lanes, one exchange the warps",
        "two barriers where the tree had nine",
        1.05,
        "The barriers are short when all threads arrive together.",
        **ROWS,
    ),
    Rung(
        "rmsnorm",
        5,
        "Vectorised",
        "16 bytes a thread and load, in both passes",
        "8 times fewer loads, which wait for memory one after the other",
        1.5,
        "",
        **ROW_VECTORS,
    ),
    Rung(
        "rmsnorm",
        6,
        "One read",
        "the row stays in registers between the passes",
        "the second pass no longer waits for L2, and all loads are in flight at once",
        1.2,
        "The second read may have hit L1 or L2.",
        absent={"triton": ROW_IN_BLOCK},
        needs="a 2-D x of rows of a multiple of 16 bytes, at most 16 KB long, and no residual",
        fits=_kept_vectors,
    ),
    Rung(
        "rmsnorm",
        7,
        "Product",
        "the op's own kernel: the weight is loaded before the preceding kernel has ended; also takes a "
        "residual",
        "one memory latency less on the critical path; between other kernels, no start-up gap",
        1.0,
        "For 2 MB the launch and one memory latency are the limit, whatever the kernel does.",
    ),
    Rung(
        "decode_attention",
        1,
        "Naive",
        "one thread per query head goes through the context alone",
        "the start: 256 threads on the card",
        1.0,
        "",
        **HEADS,
    ),
    Rung(
        "decode_attention",
        2,
        "Warp reduction",
        "a warp per query head; lanes share the head dimension",
        "32 times the threads, and a token is read by neighbouring lanes",
        10.0,
        "",
        absent={"triton": "a Triton program is at least a warp, whose lanes read neighbouring elements."},
        **HEADS,
    ),
    Rung(
        "decode_attention",
        3,
        "Vectorised",
        "16 bytes a lane, so a warp works on several tokens at a time",
        "half the lanes, and a quarter of the loads, suffice for a token",
        1.5,
        "The chain from score to new maximum to sum is as long as before, and there are no more warps.",
        **HEADS,
    ),
    Rung(
        "decode_attention",
        4,
        "Split-KV",
        "blocks share a sequence's context, 4 warps for each part; a second kernel merges",
        "256 warps, one or two an SM, become thousands",
        4.0,
        "Each query head still reads the whole cache: with enough warps, L2 is the limit, which the next "
        "rung removes.",
        **HEADS,
    ),
    Rung(
        "decode_attention",
        5,
        "Group",
        "a block serves all query heads of a KV head",
        "each key and value is loaded once, not four times",
        1.2,
        "The repeated loads hit L2, and only a quarter of the blocks is left: fewer requests, but also "
        "fewer loads in flight. The next rung makes up for that.",
        **HEADS,
    ),
    Rung(
        "decode_attention",
        6,
        "Pipeline",
        "a cp.async ring keeps three tokens of each lane in flight",
        "three times the bytes in flight",
        1.3,
        "Many small blocks had most of those bytes in flight already.",
        **HEADS,
    ),
    Rung(
        "decode_attention",
        7,
        "Product",
        "the op's own kernel: all warps of a block use the same tile, four tokens of "
        "a lane take one step of the softmax together, and the last block merges, without a second kernel",
        "fewer exponentials and shuffles a token, one launch",
        1.2,
        "At this size DRAM was nearly busy before; the single launch and the merge by the last block gain "
        "more where contexts are short.",
    ),
)
OPS = tuple(dict.fromkeys(rung.op for rung in RUNGS))


def rungs(op: str) -> list[Rung]:
    """The ladder of an op, bottom first; raises LabError for an op that has none."""
    if op not in OPS:
        raise LabError(f"{op} has no ladder: choose from {', '.join(OPS)}")
    return [rung for rung in RUNGS if rung.op == op]


def fits(rung: Rung, args) -> bool:
    """Does the rung take these arguments of its op?"""
    return rung.fits is None or rung.fits(*args)
