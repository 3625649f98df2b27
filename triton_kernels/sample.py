"""sample: one token id per row of logits: the largest, or a draw from the softmax cut to top-k and top-p

  logits [rows, vocab] float32   positions [rows] int32   out [rows] int32     row-major, contiguous
  mapping   one program per row, which walks over the row in chunks
  traffic   the row once from DRAM; each further pass (about 30 per threshold) from L2
  contract  lab/ops/sample.py          twin  cuda_src/sample.cu

Thresholds are found by bisection on integer keys that sort as the floats do: it is exact, ties included, needs no sort
and no memory. The draw is the argmax of l + gumbel (Gumbel-max), with noise from Philox4x32-10 counted by (token, position,
row), so it depends on nothing else: not on the batch, the hardware or the order of the programs.
"""
import triton
import triton.language as tl

from triton_kernels.common import config, launch

CONFIGS = {
    "sm_90": dict(block=8192, num_warps=16),
    "sm_80": dict(block=8192, num_warps=16),
    "interpreter": dict(block=1 << 18, num_warps=1),
}


@triton.jit
def _key(value):
    """An int32 that sorts as the float32 does."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _chunk(row, start, vocab, temperature, BLOCK: tl.constexpr):
    """The scaled logits of a chunk (-inf past the end), their keys (the smallest int past the end) and their indices."""
    token = start + tl.arange(0, BLOCK)
    live = token < vocab
    value = tl.div_rn(tl.load(row + token, mask=live, other=float("-inf")), temperature)
    return value, tl.where(live, _key(value), -2147483648), token


@triton.jit
def _weight(value, top):
    """exp(value - top), and 1 at the top even if it is infinite."""
    return tl.where(value == top, 1.0, tl.exp(value - top))


@triton.jit
def sample_kernel(logits, positions, out, vocab, temperature, top_k, top_p, seed,
                  GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Locate: program r owns row r.
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * vocab

    # 2. Greedy: each lane keeps the first of its largest values; then the lanes agree on the lowest index. NaN: -1.
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

    if not GREEDY:
        top = tl.div_rn(top, temperature)
        above = _key(top).to(tl.int64) + 1
        cut = tl.full([], -2147483648, tl.int64)

        # 3. Top-k threshold: the largest key that at least top_k keys reach.
        if TOP_K:
            high = above
            while high - cut > 1:
                middle = (cut + high) >> 1
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(0, vocab, BLOCK):
                    value, key, token = _chunk(row, start, vocab, temperature, BLOCK)
                    count += (key >= middle).to(tl.int32)
                enough = tl.sum(count, axis=0) >= top_k
                cut = tl.where(enough, middle, cut)
                high = tl.where(enough, high, middle)

        # 4. Top-p threshold: the largest key whose keys hold at least top_p of the mass above the first cut.
        if TOP_P:
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab, BLOCK):
                value, key, token = _chunk(row, start, vocab, temperature, BLOCK)
                mass += tl.where(key >= cut, _weight(value, top), 0.0)
            wanted = top_p * tl.sum(mass, axis=0)
            high = above
            while high - cut > 1:
                middle = (cut + high) >> 1
                mass = tl.zeros([BLOCK], tl.float32)
                for start in range(0, vocab, BLOCK):
                    value, key, token = _chunk(row, start, vocab, temperature, BLOCK)
                    mass += tl.where(key >= middle, _weight(value, top), 0.0)
                enough = tl.sum(mass, axis=0) >= wanted
                cut = tl.where(enough, middle, cut)
                high = tl.where(enough, high, middle)

        # 5. Draw: -log(u) comes from the series in 1 - u where u is close to 1: there log(u) has lost its digits (float32
        # cannot hold u, and the GPU's log is only accurate to 2^-22), and it is there that the winners are.
        position = tl.load(positions + r)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        index = tl.arange(0, BLOCK)
        for start in range(0, vocab, BLOCK):
            value, key, token = _chunk(row, start, vocab, temperature, BLOCK)
            word, w1, w2, w3 = tl.philox(seed, token, position, r, 0)
            word = (word >> 8).to(tl.int32)
            u = (word.to(tl.float32) + 0.5) * 5.9604644775390625e-08                    # 2^-24
            v = ((16777215 - word).to(tl.float32) + 0.5) * 5.9604644775390625e-08       # 1 - u
            series = v * (1.0 + v * (0.5 + v * (1.0 / 3 + v * (0.25 + v * (0.2 + v * (1.0 / 6))))))
            noisy = value - tl.log(tl.where(v < 0.0625, series, -tl.log(u)))
            noisy = tl.where((key >= cut) & (token < vocab), noisy, float("-inf"))
            index = tl.where(noisy > best, token, index)
            best = tl.where(noisy > best, noisy, best)

    winner = tl.min(tl.where(best == tl.max(best, axis=0), index, 2147483647), axis=0)
    tl.store(out + r, tl.where(bad > 0, -1, winner))


def sample(logits, positions, temperature, top_k, top_p, seed, out):
    """Launch a draw per row; temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""
    cfg = config(CONFIGS, logits)
    rows, vocab = logits.shape
    launch(sample_kernel, (rows,), logits, positions, out, vocab, float(temperature), top_k, float(top_p), seed,
           GREEDY=temperature == 0, TOP_K=0 < top_k < vocab, TOP_P=top_p < 1.0,
           BLOCK=min(triton.next_power_of_2(vocab), cfg["block"]), num_warps=cfg["num_warps"])
