"""The ladder of linear with weights of 4 bits, at one large matrix: from expanding them in memory to unpacking
them for tensor cores.

What a rung should gain is argued by instructions. Memory allows 20 us for the 61 MB of the measured matrix, in
which an H100 issues 5 instructions for each of its 117 million weights.
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
            gain="the start: 4 bits are read, 16 written and 16 read again, 530 MB where 61 would do",
            **WHOLE,
        ),
        rung(
            2,
            "Scalar unpack",
            idea="the multiplying kernel reads words of 8 codes and makes numbers of them in registers, one "
            "by one: shift, mask, subtract, convert",
            gain="a ninth of the bytes; now about 9 instructions a weight are the limit, 35 us",
            factor=3.0,
            otherwise="The instructions that unpack take the time that the bytes took; with 132 SMs waiting "
            "for 4-byte loads it may be even more.",
            **WHOLE,
        ),
        rung(
            3,
            "Bit tricks",
            idea="a code becomes the last bits of a float that is a large power of two plus the code: one "
            "LOP3, and one subtraction of the power and the 8",
            gain="two instructions a weight replace four, one of which, the conversion, an SM does half as "
            "often: 6 remain",
            factor=1.3,
            otherwise="If loads of 4 bytes, not instructions, were the limit, it remains.",
            **WHOLE,
        ),
        rung(
            4,
            "Packed layout",
            idea="codes are arranged in advance so that a lane loads 32 of one group at once, and four lanes "
            "have a row",
            gain="a load of 16 bytes in the place of four of 4 bytes, and all 8 rows of a warp read the same "
            "values of x",
            factor=1.1,
            otherwise="Where arithmetic is the limit, fewer loads hardly count; and columns of a word that "
            "are 16 apart take two loads of x, not one.",
            **WHOLE,
        ),
        rung(
            5,
            "Scales reused",
            idea="the sum of a lane's 32 products of a group is multiplied by the scale, not each weight",
            gain="one multiplication a weight less, of 5 to 6 instructions",
            factor=1.1,
            otherwise="The multiplications by scales run beside integer instructions, which may be the limit.",
            **WHOLE,
        ),
        rung(
            6,
            "Tensor cores",
            idea="codes are cut out in pairs of 16-bit numbers, and one instruction multiplies 16 rows of w "
            "with 8 rows of x",
            gain="about 2 instructions a weight remain, so that memory is the limit also for 4 bits; and at 8 "
            "rows of x w is read and unpacked once, not 8 times as in rungs below",
            factor=1.1,
            otherwise="At one row of x the rung below may be near the limit of memory; and each warp has 16 "
            "rows, so there are half as many.",
            needs="float16 or bfloat16, a k of a multiple of 8",
            fits=lambda a: a.x.itemsize == 2 and a.x.shape[-1] % 8 == 0,
        ),
        rung(
            7,
            "Product",
            idea="the op's own kernel: loads of several segments are issued ahead, before the preceding "
            "kernel has ended, x lies in shared memory, and blocks stay for several sets of rows",
            gain="no pause between two loads of a warp, no reads of x from L2, and no start-up gap between "
            "kernels",
            factor=1.1,
            otherwise="With enough warps a multiprocessor, others load while one waits, and the rung below "
            "may already reach the limit.",
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
)
