"""The ladder of linear, y = x w^T, at one large matrix: from a sum in every thread to tensor cores."""

from functools import partial

from lab.rungs.rung import COMPILER_LAYOUT, Ladder, Rung, whole_vectors


def triton(number, a, out):
    from triton_kernels.ladder.linear import linear

    linear(number, a.x, a.w, a.bias, out)


rung = partial(Rung, "linear")
TALL = dict(shape={"n": 128256, "k": 4096})  # the output head of Llama 3.1 8B: 30 warps a multiprocessor
NARROW = dict(shape={"n": 256, "k": 14336})
VECTORS = dict(needs="rows of a multiple of 16 bytes", fits=lambda a: whole_vectors(a.x))

LADDER = Ladder(
    op="linear",
    triton=triton,
    rungs=(
        rung(
            1,
            "Naive",
            drawing="lanes",
            idea="one thread per output goes through its row of w alone, element by element",
            gain="the start: 4096 threads on 132 SMs, each with a few 2-byte loads in flight; a warp's "
            "load touches 32 lines",
        ),
        rung(
            2,
            "Shared memory",
            idea="a warp copies a tile of 32 rows, neighbouring lanes reading neighbouring elements; "
            "then each thread goes through its row there",
            gain="nothing yet: a load of w takes 1 step instead of 32, for the lines of 32 rows; but a read "
            "of shared memory has all 32 lanes on one bank, and takes these 32 steps instead",
            at=TALL,
            otherwise="One warp a block copies and multiplies in turn, so DRAM idles during the multiplies; "
            "and in the naive kernel most of the repeated loads of a line already hit L1. With 4096 rows, "
            "one warp a multiprocessor, nothing hides either.",
            absent={"triton": COMPILER_LAYOUT},
        ),
        rung(
            3,
            "Padded",
            drawing="banks",
            idea="rows of the tile are one bank longer, so that the 32 lanes read from 32 banks",
            gain="a read of shared memory takes 1 step instead of 32",
            factor=2.0,
            at=TALL,
            otherwise="Once the reads are short, the copy, which waits for DRAM, takes most of the time. "
            "With 4096 rows, one warp a multiprocessor, it always does.",
            absent={"triton": COMPILER_LAYOUT},
        ),
        rung(
            4,
            "Warp reduction",
            idea="a warp per output reads its row directly into registers; shuffles add the lanes",
            gain="no pass through shared memory, no barrier, and 32 times as many threads with loads "
            "in flight",
            factor=2.0,
            otherwise="A load of 2 bytes a lane moves only 64 bytes a warp: the number of load instructions "
            "is the limit.",
        ),
        rung(
            5,
            "Vectorised",
            idea="16 bytes a lane and load",
            gain="8 times the bytes in flight for the same number of loads (bfloat16)",
            factor=2.0,
            otherwise="If the compiler had unrolled the loop well, enough loads were in flight before.",
            **VECTORS,
        ),
        rung(
            6,
            "Pipeline",
            drawing="ring",
            idea="cp.async keeps seven loads of each lane in flight, of w and of x, through a ring in "
            "shared memory",
            gain="3.5 KB of weights in flight a warp, however the compiler unrolls the loop: with 256 "
            "rows, a warp each, nothing else keeps memory busy",
            factor=1.2,
            at=NARROW,
            otherwise="The loads pass through shared memory, which costs an extra instruction each; with "
            "4096 rows, 31 warps an SM, the unrolled plain loads of rung 5 keep DRAM as busy.",
            **VECTORS,
        ),
        rung(
            7,
            "Split-K",
            idea="the four warps of a block share a row, a quarter of k each",
            gain="four times the warps: with 256 rows, a warp each, only 64 blocks have work, for 132 SMs",
            factor=1.3,
            at=NARROW,
            otherwise="A matrix of so few bytes takes little longer than a launch. With 4096 rows every SM "
            "has its share of warps without this, and the sum over warps only costs time.",
            **VECTORS,
        ),
        rung(
            8,
            "Tensor cores",
            drawing="tile",
            idea="a warp multiplies 16 rows of w with 8 rows of x by one instruction",
            gain="at 8 rows of x, w is read once, not 8 times as in the rungs below; at one row nothing, "
            "because memory is the limit",
            factor=4.0,
            at=dict(batch=8),
            otherwise="At one row of x the multiply's other seven columns are wasted, and their cost is not "
            "hidden: w passes through shared memory, and fewer warps load it.",
            needs="float16 or bfloat16, rows of a multiple of 16 bytes",
            fits=lambda a: a.x.itemsize == 2 and whole_vectors(a.x),
        ),
        rung(
            9,
            "Product",
            idea="the op's own kernel: a warp uses each load of x for 4 rows of w, a load is replaced "
            "as soon as its data are used, and the first loads are issued before the preceding "
            "kernel has ended",
            gain="next to the pipeline of rung 6, a quarter of the reads of x, and no start-up gap between "
            "kernels",
            factor=1.05,
            over=6,
            otherwise="With one large matrix bandwidth is the only limit, and the rungs below may already "
            "reach it.",
        ),
    ),
    cases=(
        ("tails of a tile in n and k", dict(batch=1, n=37, k=136)),
        ("several steps of four warps", dict(batch=2, n=5, k=1096)),
        ("a k of no whole vectors, with bias", dict(batch=1, n=11, k=101, bias=True)),
        ("more rows than 8, float32 out", dict(batch=9, n=7, k=264, bias=True, out_dtype="fp32")),
    ),
    points={  # the down projection of Llama 3.1 8B
        "cuda": dict(batch=1, context=None, shape={"n": 4096, "k": 14336}),
        "cpu": dict(batch=1, context=None, shape={"n": 64, "k": 512}),
    },
)
