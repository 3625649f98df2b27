"""all_reduce_add_rmsnorm: residual[r,:] = T(residual[r,:] + the sum over ranks of their partial[r,:]), summed
in the order of ranks, then y[r,:] = T(residual[r,:] * rsqrt(mean(residual[r,:]^2) + eps)) * w

partial, residual, y [rows, words] pieces of 32 bits: one float32 or two 16-bit elements   w [words]
mapping   one program per row; the row stays in registers
traffic   partial and residual read once, residual and y written, w once per row; over the link 8 bytes a
          word to each rank
contract  lab/ops/all_reduce_add_rmsnorm.py          twin  cuda_src/all_reduce_add_rmsnorm.cu
"""

import triton
import triton.language as tl

from lab.ops.exchange import words_of
from triton_kernels import settings
from triton_kernels.all_reduce_add import TYPES, add_of_ranks, bits, numbers
from triton_kernels.common import launch
from triton_kernels.core.exchange import WORDS, send
from triton_kernels.core.fused_product import wait_for_inputs


@triton.jit
def all_reduce_add_rmsnorm_kernel(
    partial,
    residual,
    w,
    y,
    inboxes,
    launches,
    words,
    counts,
    cols,
    eps,
    capacity,
    TYPE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTS: tl.constexpr,
    STEP: tl.constexpr,
):
    # 1. Locate: program r owns row r. In a slot of the inbox a row begins with words of which no other row's
    # program counts the launches. The weight depends on no earlier kernel, so its load is issued before the
    # wait.
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    live = lane < words
    at = row.to(tl.int64) * words + lane
    slot = row * counts * STEP + lane
    weight = tl.load(w + lane, mask=live, other=0)
    wait_for_inputs(PDL)
    count = launches + row * counts
    tag = tl.load(count + lane // STEP, mask=live, other=0) + 1

    # 2. Send: this rank's values, to all others at once.
    mine = tl.load(partial + at, mask=live, other=0)
    send(inboxes, slot, live, mine, tag, capacity, RANK, RANKS)

    # 3. Receive and add: in the order of ranks, so that all ranks get the same bits. The residual is loaded
    # before the wait, and gets the sum, rounded to T.
    before = tl.load(residual + at, mask=live, other=0)
    after = add_of_ranks(inboxes, slot, live, before, mine, tag, capacity, TYPE=TYPE, RANK=RANK, RANKS=RANKS)
    tl.store(residual + at, after, mask=live)

    # 4. Reduce: the sum of squares in float32; masked lanes add zero. The twin has shuffles and shared memory
    # written out.
    low, high = numbers(after, TYPE)
    squares = low * low
    if TYPE != tl.float32:  # of which there is one in a word
        squares += high * high
    squares = tl.where(live, squares, 0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / cols + eps)

    # 5. Scale and store: rounded to T before the weight, as in Hugging Face Llama. When all threads have read
    # the counts of launches, those grow.
    one, other = numbers(bits(low * scale, high * scale, TYPE), TYPE)
    low, high = numbers(weight, TYPE)
    tl.store(y + at, bits(one * low, other * high, TYPE), mask=live)
    each = tl.arange(0, COUNTS)
    grown = tl.load(count + each, mask=each < counts, other=0) + 1
    tl.debug_barrier()
    tl.store(count + each, grown, mask=each < counts)


def all_reduce_add_rmsnorm(partial, residual, w, eps, exchange, y):
    """Launch residual += the sum over ranks of partial, y = rmsnorm(residual) * w."""
    rows, cols = partial.shape
    words = words_of(w).numel()
    counts, block = triton.cdiv(words, WORDS), triton.next_power_of_2(words)
    launch(
        all_reduce_add_rmsnorm_kernel,
        (rows,),
        words_of(partial),
        words_of(residual),
        words_of(w),
        words_of(y),
        exchange.table,
        exchange.launches,
        words,
        counts,
        cols,
        eps,
        exchange.capacity,
        TYPE=TYPES[partial.dtype],
        RANK=exchange.rank,
        RANKS=exchange.ranks,
        BLOCK=block,
        COUNTS=triton.next_power_of_2(counts),
        STEP=WORDS,
        num_warps=min(max(block // 256, 1), 16),
        reads=exchange.inboxes,
        **settings.dependent_launch(partial),
    )
