"""all_argmax: ids[r] = the index in the whole vocabulary of the largest logit that any rank has

logits [rows, n], this rank's share   ids [rows]: of the largest of them, or -1
mapping   one program: two words for each row, the logit and its index
traffic   one logit and one index of each row; over the link 16 bytes a row to each rank
contract  lab/ops/all_argmax.py          twin  cuda_src/all_argmax.cu
"""

import triton
import triton.language as tl

from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.exchange import receive, send
from triton_kernels.core.fused_product import wait_for_inputs


@triton.jit
def all_argmax_kernel(
    logits,
    ids,
    inboxes,
    launches,
    rows,
    n,
    first,
    capacity,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Locate: one program for all rows.
    r = tl.arange(0, BLOCK)
    live = r < rows
    wait_for_inputs(PDL)
    tag = tl.load(launches) + 1

    # 2. Send: the largest logit of this rank's share, and its index in the vocabulary.
    found = tl.load(ids + r, mask=live, other=0)
    value = tl.load(logits + r.to(tl.int64) * n + tl.maximum(found, 0), mask=live, other=0.0)
    mine = value.to(tl.int32, bitcast=True)
    index = tl.where(found < 0, -1, found + first)
    send(inboxes, 2 * r, live, mine, tag, capacity, RANK, RANKS)
    send(inboxes, 2 * r + 1, live, index, tag, capacity, RANK, RANKS)

    # 3. Receive and compare: in the order of ranks, so that the lowest index wins a tie.
    best = tl.zeros([BLOCK], tl.float32)
    winner = tl.zeros([BLOCK], tl.int32)
    for rank in tl.static_range(RANKS):
        logit = value
        at = index
        if rank != RANK:
            theirs = receive(inboxes, 2 * r, live, tag, capacity, rank, RANK, RANKS)
            logit = theirs.to(tl.float32, bitcast=True)
            at = receive(inboxes, 2 * r + 1, live, tag, capacity, rank, RANK, RANKS)
        if rank == 0:
            best = logit
            winner = at
        else:
            better = (logit > best) & (at >= 0)
            best = tl.where(better, logit, best)
            winner = tl.where((winner < 0) | (at < 0), -1, tl.where(better, at, winner))
    tl.store(ids + r, winner, mask=live)
    tl.debug_barrier()  # all threads have read the count
    tl.store(launches, tag)


def all_argmax(logits, ids, first, exchange):
    """Launch ids = index of the largest logit of all ranks."""
    rows, n = logits.shape
    launch(
        all_argmax_kernel,
        (1,),
        logits,
        ids,
        exchange.table,
        exchange.launches,
        rows,
        n,
        first,
        exchange.capacity,
        RANK=exchange.rank,
        RANKS=exchange.ranks,
        BLOCK=triton.next_power_of_2(rows),
        num_warps=1,
        reads=exchange.inboxes,
        **settings.dependent_launch(logits),
    )
