"""The rungs of the ladders: what each changes, what it should gain, and where it is absent. Never imports torch.

linear, rmsnorm and decode_attention climb from a naive kernel up to the product's, one idea a rung. A rung is a kernel
in cuda_src/ladder/<op>.cu and triton_kernels/ladder/<op>.py; the last one is the op itself. What a rung should gain is
argued for one H100: 132 multiprocessors (SMs), 3.35 TB/s, and some 600 ns from asking DRAM to having, so about 2 MB
must be in flight to keep the memory busy. lab/ladder.py runs them.
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
    idea: str                       # what it changes
    gain: str                       # what that should gain on an H100, and why
    factor: float                   # at least so much faster than the rung before, if the argument holds; 1: no promise
    otherwise: str                  # what keeps it from gaining that much
    absent: Mapping[str, str] = field(default_factory=dict, hash=False)     # backend -> why there is no such rung
    needs: str = ""                 # what it asks of its arguments, in words
    fits: Callable | None = None    # (*args) -> True where the arguments are such

    @property
    def title(self):
        return f"{self.number}. {self.name}"

    @property
    def product(self):
        return self.name == "Product"


# ---- what rungs need -------------------------------------------------------------------------------------------------

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

COMPILER_LAYOUT = "Triton's compiler lays out shared memory, and swizzles it, itself."
ROW_IN_BLOCK = "a Triton block holds the whole row already in the product's kernel, which is the next rung."

RUNGS = (
    Rung("linear", 1, "Naive", "one thread per output walks its row of w alone, element by element",
         "the start: 4096 threads on 132 SMs, each with a few 2-byte loads in flight; a warp's load touches 32 lines",
         1.0, ""),
    Rung("linear", 2, "Shared memory", "a warp copies a tile of 32 rows, neighbouring lanes on neighbouring elements, "
         "then each thread walks its row there",
         "whole lines cross once and leave in few requests; but a read in shared memory is 32 lanes on one bank", 1.5,
         "One warp a block copies and multiplies in turn, so DRAM idles during the multiplies, and the naive kernel's "
         "L1 had already caught most of the wasted lines.",
         absent={"triton": COMPILER_LAYOUT}),
    Rung("linear", 3, "Padded", "rows of the tile are one bank longer, so that the 32 lanes meet 32 banks",
         "a read of shared memory takes 1 step where it took 32", 2.0,
         "The copy, which waits for DRAM, takes most of the time once the reads are short.",
         absent={"triton": COMPILER_LAYOUT}),
    Rung("linear", 4, "Warp reduction", "a warp per output reads its row straight into registers; shuffles add lanes",
         "no trip through shared memory, no barrier, and 32 times as many threads with loads in flight", 2.0,
         "A load of 2 bytes a lane moves only 64 bytes a warp: the number of load instructions is what limits."),
    Rung("linear", 5, "Vectorised", "16 bytes a lane and load",
         "8 times the bytes in flight for the same number of loads (bfloat16)", 2.0,
         "When the loop was unrolled well before, the loads in flight sufficed already.", **VECTORS),
    Rung("linear", 6, "Pipeline", "cp.async keeps seven loads of each lane in flight, through a ring in shared memory",
         "3.5 KB in flight a warp, 14 MB on the card, whatever the compiler unrolls", 1.1,
         "The loads pass through shared memory, which costs an extra instruction each; unrolled plain loads of "
         "rung 5 with 31 warps an SM may keep DRAM as busy.", **VECTORS),
    Rung("linear", 7, "Split-K", "the four warps of a block share a row, each a quarter of k",
         "four times the warps, so that a matrix of 4096 rows fills all SMs to the end", 1.05,
         "With 4096 rows every SM already has its share of warps; narrow matrices gain more.", **VECTORS),
    Rung("linear", 8, "Tensor cores", "a warp multiplies 16 rows of w with 8 rows of x by one instruction",
         "nothing at one row of x, which memory binds; at 8 rows w is read once where rungs below read it 8 times", 1.0,
         "At one row of x the multiply's other seven columns are wasted, and what they cost is not hidden: w passes "
         "through shared memory, and fewer warps send for it.",
         needs="float16 or bfloat16, rows of a multiple of 16 bytes", fits=_half_vectors),
    Rung("linear", 9, "Product", "4 rows of w a warp share each load of x, loads are replaced as they are used, the "
         "first leave before the kernel before this one has ended",
         "a quarter of the reads of x, and no start-up gap between kernels", 1.05,
         "At one large matrix the bandwidth is all there is, and the rungs below may have it."),

    Rung("rmsnorm", 1, "Naive", "one thread per row reads it twice, alone",
         "the start: 64 rows are two warps on the whole card, and each lane walks 8192 elements", 1.0, "", **ROWS),
    Rung("rmsnorm", 2, "Shared memory", "a block of 256 threads per row; sums are added in shared memory, in pairs",
         "256 times the threads, and neighbours on neighbouring addresses", 20.0, "",
         absent={"triton": COMPILER_LAYOUT}, **ROWS),
    Rung("rmsnorm", 3, "No bank conflicts", "pairs lie half of the rest apart: neighbours use neighbouring banks",
         "fewer steps in 8 reads of shared memory", 1.0,
         "The tree is a small share of a row's time: conflicts in it cost tens of cycles next to loads of thousands.",
         absent={"triton": COMPILER_LAYOUT}, **ROWS),
    Rung("rmsnorm", 4, "Warp reduction", "shuffles add the lanes, one exchange the warps",
         "two barriers where the tree had nine", 1.05,
         "The barriers are short when all threads arrive together.", **ROWS),
    Rung("rmsnorm", 5, "Vectorised", "16 bytes a thread and load, in both passes",
         "8 times fewer loads, each of which waits for memory in its turn", 1.5, "", **ROW_VECTORS),
    Rung("rmsnorm", 6, "One read", "the row stays in registers between the passes",
         "the second pass no longer waits for L2, and all loads are in flight at once", 1.2,
         "The second read came from L1 or L2.", absent={"triton": ROW_IN_BLOCK},
         needs="a 2-D x of rows of a multiple of 16 bytes, at most 16 KB long, and no residual", fits=_kept_vectors),
    Rung("rmsnorm", 7, "Product", "the weight is loaded before the kernel before this one ends; also takes a residual",
         "one trip to memory less on the critical path; next to other kernels, no start-up gap", 1.0,
         "2 MB are bound by the launch and one trip to memory, whatever the kernel does."),

    Rung("decode_attention", 1, "Naive", "one thread per query head walks the context alone",
         "the start: 256 threads on the card", 1.0, "", **HEADS),
    Rung("decode_attention", 2, "Warp reduction", "a warp per query head; lanes share the head dimension",
         "32 times the threads, and a token is read by neighbours", 10.0, "",
         absent={"triton": "a Triton program is a warp or more from the start, and reads neighbours."}, **HEADS),
    Rung("decode_attention", 3, "Vectorised", "16 bytes a lane, so a warp works on several tokens at a time",
         "half the lanes carry a token, a quarter of the loads carry its bytes", 1.5,
         "The chain from score to new maximum to sum is as long as before, and there are no more warps.", **HEADS),
    Rung("decode_attention", 4, "Split-KV", "blocks share a sequence's context, 4 warps a part; a second kernel merges",
         "256 warps, one or two an SM, become thousands", 4.0,
         "Each query head still reads the cache for itself: once there are warps enough, L2 is what they wait for, and "
         "the next rung takes that away.", **HEADS),
    Rung("decode_attention", 5, "Group", "a block serves all query heads of a KV head",
         "each key and value is asked for once, not four times", 1.2,
         "L2 had caught the repeats, and a quarter of the blocks is left: what is saved in requests is lost in loads "
         "in flight. The next rung brings them back.", **HEADS),
    Rung("decode_attention", 6, "Pipeline", "a cp.async ring keeps three tokens of each lane in flight",
         "three times the bytes in flight", 1.3,
         "Many small blocks had most of those bytes in flight already.", **HEADS),
    Rung("decode_attention", 7, "Product", "a tile serves all warps of a block, four tokens a lane share one step of "
         "the softmax, and the last block merges: no second kernel",
         "fewer exponentials and shuffles a token, one launch", 1.2,
         "At this size DRAM is nearly busy before; the single launch and the merge by the last block pay where contexts "
         "are short."),
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
