"""sample: one token id per row of logits: the largest, or a draw from the softmax cut to top-k, top-p, min-p

  logits [rows, vocab] float32   positions [rows] int32   out [rows] int32     row-major, contiguous
  mapping   one program per row, which walks over the row in chunks
  traffic   the row once from DRAM; each further pass (16 per threshold, one to draw) from L2
  contract  lab/ops/sample.py          twin  cuda_src/sample.cu

Draw: l = logit / temperature. Top-k keeps l >= the k-th largest. Of those, top-p keeps l >= t, with the
largest t for which the kept mass is at least top_p of their mass. Of those, min-p keeps l >= max(l) +
log(min_p). The token is the argmax over the kept of l + g, where g = -log(-log(u)) (the Gumbel-max trick).
Noise: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), from tl.philox.

Thresholds are found bit by bit on integers that order as the floats do: exact, with ties, and without a sort.
"""

import triton
import triton.language as tl

from triton_kernels.common import config, launch

CONFIGS = {
    "sm_90": dict(block=8192, num_warps=32),
    "sm_80": dict(block=4096, num_warps=16),
    "interpreter": dict(block=1 << 18, num_warps=1),
}


@triton.jit
def _load_chunk(row, start, vocab, BLOCK: tl.constexpr):
    """One chunk: logits (-inf past the end), uint32 keys of the same order (0 past the end), token ids."""
    token = start + tl.arange(0, BLOCK)
    value = tl.load(row + token, mask=token < vocab, other=float("-inf"))
    value = tl.where(value == 0.0, 0.0, value)  # -0 and +0 are equal
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)
    return value, tl.where(token < vocab, key, 0), token


@triton.jit
def _weight(value, top, scale):
    """exp((value - top) / temperature), with scale = log2(e) / temperature. It is 1 at an infinite top,
    too."""
    return tl.where(value == top, 1.0, tl.exp2((value - top) * scale))


@triton.jit
def _threshold(row, vocab, lowest, wanted, top, scale, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key t for which the tokens with key >= t and >= lowest number, or weigh, at least `wanted`.
    Counts are exact in float32, up to 2^24."""
    cut = tl.full([], 0, tl.uint32)
    for digit in range(16):
        step = tl.full([], 1, tl.uint32) << (30 - 2 * digit)
        cut1 = cut + step
        cut2 = cut1 + step
        cut3 = cut2 + step
        n1 = tl.zeros([BLOCK], tl.float32)
        n2 = tl.zeros([BLOCK], tl.float32)
        n3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            value, key, token = _load_chunk(row, start, vocab, BLOCK)
            weight = (key >= lowest).to(tl.float32)
            if WEIGHTED:
                weight *= _weight(value, top, scale)
            n1 += tl.where(key >= cut1, weight, 0.0)
            n2 += tl.where(key >= cut2, weight, 0.0)
            n3 += tl.where(key >= cut3, weight, 0.0)
        # All sums are computed in the same order, so they fall as the candidate rises: the candidates that
        # reach `wanted` are the lowest ones.
        passed = (
            (tl.sum(n1, axis=0) >= wanted).to(tl.uint32)
            + (tl.sum(n2, axis=0) >= wanted).to(tl.uint32)
            + (tl.sum(n3, axis=0) >= wanted).to(tl.uint32)
        )
        cut += passed * step
    return cut


@triton.jit(do_not_specialize=["top_k", "seed"])
def sample_kernel(
    logits,
    positions,
    out,
    table,
    vocab,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    TABLE: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Locate: program r owns row r.
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * vocab
    counter = r
    if TABLE:  # the parameters of this row; the flags GREEDY, TOP_K and TOP_P then say what rows may ask for
        own = table + r * 6
        temperature = tl.load(own).to(tl.float32, bitcast=True)
        top_k = tl.load(own + 1)
        top_p = tl.load(own + 2).to(tl.float32, bitcast=True)
        min_p = tl.load(own + 3).to(tl.float32, bitcast=True)
        low = tl.load(own + 4).to(tl.uint32, bitcast=True).to(tl.uint64)
        seed = (tl.load(own + 5).to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
        counter = r * 0

    # 2. Greedy: each lane keeps the first of its largest values; then the lanes agree on the lowest index.
    # NaN: -1.
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.arange(0, BLOCK)
    nan = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        nan = nan | (value != value).to(tl.int32)
        index = tl.where(value > best, token, index)
        best = tl.where(value > best, value, best)
    top = tl.max(best, axis=0)
    bad = tl.max(nan, axis=0)

    # A row of its own parameters may be greedy among others that draw; else GREEDY says it for all.
    if not GREEDY:
        if temperature > 0:
            # Division by the temperature keeps the order: the thresholds are found on the logits themselves.
            scale = 1.4426950408889634 / temperature
            cut = tl.full([], 0, tl.uint32)

            # 3. Top-k threshold: the largest key that at least top_k keys reach. The twin counts digits of 8
            # bits in shared memory; Triton has no such scatter, so each pass counts for the three candidates
            # of the next two bits.
            if TOP_K:
                if (top_k > 0) & (top_k < vocab):
                    cut = _threshold(row, vocab, cut, top_k, top, scale, WEIGHTED=False, BLOCK=BLOCK)

            # 4. Top-p threshold: the largest key that leaves at least top_p of the weight that top-k left.
            if TOP_P:
                if top_p < 1.0:
                    mass = tl.zeros([BLOCK], tl.float32)
                    for start in range(0, vocab, BLOCK):
                        value, key, token = _load_chunk(row, start, vocab, BLOCK)
                        mass += tl.where(key >= cut, _weight(value, top, scale), 0.0)
                    # With wanted = 0 a threshold above every key would do; a tiny positive mass is reached by
                    # the largest key at the latest.
                    wanted = tl.maximum(top_p * tl.sum(mass, axis=0), 1e-30)
                    cut = _threshold(row, vocab, cut, wanted, top, scale, WEIGHTED=True, BLOCK=BLOCK)

            # 5. Min-p threshold: tokens at least min_p as likely as the likeliest stay.
            least = float("-inf")
            if MIN_P:
                likely = tl.div_rn(top, temperature) + tl.log(tl.maximum(min_p, 1e-38))
                least = tl.where(min_p > 0.0, likely, float("-inf"))

            # 6. Draw: the largest l + g. Winners have u near 1, where float32 cannot hold u and tl.log is
            # only good to 2^-22; there a series in 1 - u, which float32 does hold, is used instead. (The twin
            # has log1p.)
            position = tl.load(positions + r)
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            index = tl.arange(0, BLOCK)
            for start in range(0, vocab, BLOCK):
                value, key, token = _load_chunk(row, start, vocab, BLOCK)
                word, w1, w2, w3 = tl.philox(seed, token, position, counter, 0)
                word = (word >> 8).to(tl.int32)
                u = (word.to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
                v = ((16777215 - word).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 1 - u
                series = v * (1.0 + v * (0.5 + v * (1.0 / 3 + v * (0.25 + v * (0.2 + v * (1.0 / 6))))))
                scaled = tl.div_rn(value, temperature)
                noisy = scaled - tl.log(tl.where(v < 0.0625, series, -tl.log(u)))
                kept = (key >= cut) & (scaled >= least) & (token < vocab)
                noisy = tl.where(kept, noisy, float("-inf"))
                index = tl.where(noisy > best, token, index)
                best = tl.where(noisy > best, noisy, best)

    winner = tl.min(tl.where(best == tl.max(best, axis=0), index, 2147483647), axis=0)
    tl.store(out + r, tl.where(bad > 0, -1, winner))


def sample(logits, positions, temperature, top_k, top_p, seed, min_p, table, out):
    """Launch a draw per row; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 keep everything. With a
    table each row has its own of these (lab/ops/sample.py)."""
    cfg = config(CONFIGS, logits)
    rows, vocab = logits.shape
    own = table is not None
    launch(
        sample_kernel,
        (rows,),
        logits,
        positions,
        out,
        table if own else positions,  # without a table no address is read
        vocab,
        float(temperature),
        top_k,
        float(top_p),
        float(min_p),
        seed,
        TABLE=own,
        GREEDY=not own and temperature == 0,
        TOP_K=own or 0 < top_k < vocab,
        TOP_P=own or top_p < 1.0,
        MIN_P=own or min_p > 0,
        BLOCK=min(triton.next_power_of_2(vocab), cfg["block"]),
        num_warps=cfg["num_warps"],
    )
