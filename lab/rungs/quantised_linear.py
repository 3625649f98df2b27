"""The ladder of linear with weights of 4 bits, at one large matrix: from expanding them in memory to
unpacking them for tensor cores.

What a rung should gain is argued for an H100 by two limits. Memory: the 61 MB of the measured matrix take
20 us. Instructions: one a weight takes 4 us, because each of 132 SMs starts those of 128 threads in a cycle,
and there are 117 million weights. The instructions a weight are those of the loops in the compiled code
(sm_90a, bfloat16).
"""

from functools import partial

from lab.rungs.rung import Ladder, Rung

FORMAT = "int4-g128"


def prepare(number, a):
    """Rungs 1 to 3 take w row by row. Rung 1 needs memory for the expanded weights."""
    from lab.formats.row_major import row_major

    if number > 3:
        return {}, dict(expanded=None)
    w = row_major(a.w)
    memory = a.x.new_empty(w.rows, 2 * w.codes.shape[1]) if number == 1 else None
    return dict(w=w), dict(expanded=memory)


def triton(number, a, out, expanded):
    from triton_kernels.ladder.quantised_linear import linear

    linear(number, a.x, a.w, a.bias, out, expanded)


rung = partial(Rung, "linear", named="quantised_linear")
WHOLE = dict(needs="a k of a multiple of 8", fits=lambda a: a.x.shape[-1] % 8 == 0)

LADDER = Ladder(
    op="linear",
    format=FORMAT,
    triton=triton,
    prepare=prepare,
    rungs=(
        rung(
            1,
            "Unpack to memory",
            idea="one kernel writes code - 8 of every weight in 16 bits, the next one multiplies",
            gain="the start: 4 bits are read, 16 written and 16 read again, 530 MB where 61 would do: 180 us",
            **WHOLE,
        ),
        rung(
            2,
            "Scalar unpack",
            idea="the multiplying kernel reads words of 8 codes and makes numbers of them in registers, one "
            "by one: shift, mask, subtract, convert",
            gain="a ninth of the bytes; now instructions are the limit, 8 a weight in CUDA and 11 in Triton: "
            "31 to 43 us, if enough loads are in flight",
            factor=3.0,
            factors={8: 2.0},
            otherwise="A lane loads 4 bytes and waits for them: with 64 warps on an SM these are 8 KB in "
            "flight, and memory wants twice as many.",
            **WHOLE,
        ),
        rung(
            3,
            "Bit tricks",
            idea="a code becomes bits of a float that is a large power of two plus the code: one LOP3, and "
            "one subtraction of the power and the 8",
            gain="two instructions a weight in the place of four, and one of the two is an addition of "
            "floats, of which an SM does twice as many in a cycle; 6.6 of 7.9 remain in CUDA, 10.5 of 10.9 "
            "in Triton",
            factor=1.1,
            otherwise="As long as loads of 4 bytes are the limit, fewer instructions gain little.",
            **WHOLE,
        ),
        rung(
            4,
            "Packed layout",
            idea="codes are arranged in advance so that a lane loads 32 of one group at once, and four lanes "
            "have a row",
            gain="16 bytes a lane in flight in the place of 4, and one address for 32 codes: 6.7 "
            "instructions a weight in CUDA, 6.2 in Triton, which hardly wait for memory now",
            factor=1.25,
            otherwise="If loads were not the limit in the rung below, only Triton has fewer instructions; "
            "there the words pass through shared memory on their way to the lanes.",
            **WHOLE,
        ),
        rung(
            5,
            "Scales reused",
            idea="a sum of products of one group is multiplied by the scale, not each weight",
            gain="one multiplication a weight less: 5.7 instructions remain in CUDA, 5.4 in Triton",
            factor=1.1,
            otherwise="The multiplications run beside integer instructions, which may be the limit.",
            **WHOLE,
        ),
        rung(
            6,
            "Tensor cores",
            idea="codes are cut out in pairs of 16-bit numbers, and one instruction multiplies 16 rows of w "
            "with 8 rows of x",
            gain="2.5 instructions a weight in CUDA and 4.1 in Triton, so memory is the limit also for 4 "
            "bits; at 8 rows of x w is read and unpacked once, not 8 times as in rungs below",
            factor=1.1,
            factors={8: 6.0},
            otherwise="At one row of x the rung below may be near the limit of memory. In Triton x is padded "
            "to 16 rows, which pass through shared memory in each step.",
            needs="float16 or bfloat16, a k of a multiple of 8",
            fits=lambda a: a.x.itemsize == 2 and a.x.shape[-1] % 8 == 0,
        ),
        rung(
            7,
            "Product",
            idea="the op's own kernel: loads of several segments are issued ahead, the first of them before "
            "the preceding kernel has ended; in CUDA x lies in shared memory, and blocks stay for several "
            "sets of rows",
            gain="no pause between two loads of a warp, and no start-up gap between kernels",
            factor=1.05,
            otherwise="With enough warps on an SM others load while one waits, and the rung below may "
            "already reach the limit.",
        ),
    ),
    cases=(
        ("tails of a block of rows and of a group", dict(batch=1, n=37, k=328)),
        ("several steps of four warps", dict(batch=2, n=5, k=1160)),
        ("a k of no whole words, with bias", dict(batch=1, n=11, k=101, bias=True)),
        ("more rows than 8, float32 out", dict(batch=9, n=19, k=264, bias=True, out_dtype="fp32")),
        ("less than a word's run", dict(batch=3, n=1, k=8)),
    ),
    points={  # gate and up of Llama 3.1 8B
        "cuda": dict(batch=1, context=None, shape={"n": 28672, "k": 4096}),
        "cpu": dict(batch=1, context=None, shape={"n": 64, "k": 512}),
    },
    batches=(8,),
)
