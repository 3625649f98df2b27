"""The ladder of rmsnorm, at a batch of 64 hidden states: mostly a matter of how many threads share a row."""

from functools import partial

from lab.rungs.rung import COMPILER_LAYOUT, Ladder, Rung, whole_vectors


def triton(number, a, out):
    from triton_kernels.ladder.rmsnorm import rmsnorm

    rmsnorm(number, a.x, a.w, a.eps, a.residual, out)


def plain_rows(a):
    return a.x.dim() == 2 and a.residual is None


def plain_vectors(a):
    return plain_rows(a) and whole_vectors(a.x)


def kept_vectors(a):
    """256 threads hold at most four vectors of 16 bytes each."""
    return plain_vectors(a) and a.x.shape[1] * a.x.itemsize <= 256 * 4 * 16


rung = partial(Rung, "rmsnorm")
ROWS = dict(needs="a 2-D x and no residual", fits=plain_rows)
ROW_VECTORS = dict(needs="a 2-D x of rows of a multiple of 16 bytes, and no residual", fits=plain_vectors)
ROW_IN_BLOCK = (
    "in Triton the op's own kernel, which is the next rung, already keeps the whole row in registers."
)

LADDER = Ladder(
    op="rmsnorm",
    triton=triton,
    rungs=(
        rung(
            1,
            "Naive",
            idea="one thread per row reads it twice, alone",
            gain="the start: 64 rows are two warps on the whole card, and each lane walks 8192 elements",
            **ROWS,
        ),
        rung(
            2,
            "Shared memory",
            idea="a block of 256 threads per row; sums are added in shared memory, in pairs",
            gain="256 times the threads, and neighbouring threads on neighbouring addresses",
            factor=20.0,
            absent={"triton": COMPILER_LAYOUT},
            **ROWS,
        ),
        rung(
            3,
            "No bank conflicts",
            idea="the numbers of a pair are as far apart as there are threads left, so that "
            "neighbouring threads use neighbouring banks",
            gain="fewer steps in 8 reads of shared memory",
            otherwise="The tree is a small part of a row's time: its conflicts cost tens of cycles, the "
            "loads thousands.",
            absent={"triton": COMPILER_LAYOUT},
            **ROWS,
        ),
        rung(
            4,
            "Warp reduction",
            idea="shuffles add the lanes, one exchange the warps",
            gain="two barriers where the tree had nine",
            factor=1.05,
            otherwise="The barriers are short when all threads arrive together.",
            **ROWS,
        ),
        rung(
            5,
            "Vectorised",
            idea="16 bytes a thread and load, in both passes",
            gain="8 times fewer loads, which wait for memory one after the other",
            factor=1.5,
            **ROW_VECTORS,
        ),
        rung(
            6,
            "One read",
            idea="the row stays in registers between the passes",
            gain="the second pass no longer waits for L2, and all loads are in flight at once",
            factor=1.2,
            otherwise="The second read may have hit L1 or L2.",
            absent={"triton": ROW_IN_BLOCK},
            needs="a 2-D x of rows of a multiple of 16 bytes, at most 16 KB long, and no residual",
            fits=kept_vectors,
        ),
        rung(
            7,
            "Product",
            idea="the op's own kernel: the weight is loaded before the preceding kernel has ended; "
            "also takes a residual",
            gain="one memory latency less on the critical path; between other kernels, no start-up gap",
            otherwise="For 2 MB the launch and one memory latency are the limit, whatever the kernel does.",
        ),
    ),
    cases=(
        ("one row", dict(rows=1, cols=576)),
        ("more rows than a warp has lanes", dict(rows=33, cols=64)),
        ("several steps of 256 vectors", dict(rows=2, cols=2056)),
        ("no whole vectors", dict(rows=3, cols=101)),
    ),
    points={
        "cuda": dict(batch=64, context=None, shape={"cols": 8192}),
        "cpu": dict(batch=4, context=None, shape={"cols": 512}),
    },
)
