"""The ladder of linear, y = x w^T, at one large matrix: from a sum in every thread to tensor cores."""

from functools import partial

from lab.rungs.rung import COMPILER_LAYOUT, Ladder, Rung, whole_vectors


def triton(number, a, out):
    from triton_kernels.ladder.linear import linear

    linear(number, a.x, a.w, a.bias, out)


rung = partial(Rung, "linear")
VECTORS = dict(needs="rows of a multiple of 16 bytes", fits=lambda a: whole_vectors(a.x))

LADDER = Ladder(
    op="linear",
    triton=triton,
    rungs=(
        rung(
            1,
            "Naive",
            idea="one thread per output goes through its row of w alone, element by element",
            gain="the start: 4096 threads on 132 SMs, each with a few 2-byte loads in flight; a warp's "
            "load touches 32 lines",
        ),
        rung(
            2,
            "Shared memory",
            idea="a warp copies a tile of 32 rows, neighbouring lanes reading neighbouring elements; "
            "then each thread goes through its row there",
            gain="each line is loaded once, with few requests; but a read of shared memory has all 32 "
            "lanes on one bank",
            factor=1.5,
            otherwise="One warp a block copies and multiplies in turn, so DRAM idles during the multiplies; "
            "and in the naive kernel most of the repeated loads of a line already hit L1.",
            absent={"triton": COMPILER_LAYOUT},
        ),
        rung(
            3,
            "Padded",
            idea="rows of the tile are one bank longer, so that the 32 lanes read from 32 banks",
            gain="a read of shared memory takes 1 step instead of 32",
            factor=2.0,
            otherwise="Once the reads are short, the copy, which waits for DRAM, takes most of the time.",
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
            idea="cp.async keeps seven loads of each lane in flight, through a ring in shared memory",
            gain="3.5 KB in flight a warp, 14 MB on the card, however the compiler unrolls the loop",
            factor=1.1,
            otherwise="The loads pass through shared memory, which costs an extra instruction each; "
            "unrolled plain loads of rung 5 with 31 warps an SM may keep DRAM as busy.",
            **VECTORS,
        ),
        rung(
            7,
            "Split-K",
            idea="the four warps of a block share a row, a quarter of k each",
            gain="four times the warps, so that a matrix of 4096 rows fills all SMs to the end",
            factor=1.05,
            otherwise="With 4096 rows every SM already has its share of warps; narrow matrices gain more.",
            **VECTORS,
        ),
        rung(
            8,
            "Tensor cores",
            idea="a warp multiplies 16 rows of w with 8 rows of x by one instruction",
            gain="nothing at one row of x, where memory is the limit; at 8 rows w is read once, not 8 "
            "times as in rungs below",
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
            gain="a quarter of the reads of x, and no start-up gap between kernels",
            factor=1.05,
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
