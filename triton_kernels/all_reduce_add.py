"""all_reduce_add: residual[i] = T(residual[i] + the sum over ranks of their partial[i]), summed in the order
of ranks

partial, residual [words] pieces of 32 bits: one float32 or two 16-bit elements
mapping   256 words a program and pass, at most 128 programs; word i belongs to the same one in every launch
traffic   partial and residual read once, residual written; over the link 8 bytes a word to each rank, or in
          two shots twice as much a word to one rank on average
contract  lab/ops/all_reduce_add.py          twin  cuda_src/all_reduce_add.cu
"""

import torch
import triton
import triton.language as tl

from lab.ops.exchange import words_of
from triton_kernels import settings
from triton_kernels.common import launch
from triton_kernels.core.exchange import BLOCKS, WORDS, receive, send, send_to
from triton_kernels.core.fused_product import wait_for_inputs

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def numbers(data, TYPE: tl.constexpr):
    """The elements in 32 bits, as float32: the lower and the upper one (of float32: the only one, twice)."""
    if TYPE == tl.float32:
        low = data.to(tl.float32, bitcast=True)
        high = low
    else:
        low = data.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
        high = (data >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def bits(low, high, TYPE: tl.constexpr):
    """The inverse of numbers(), rounded."""
    if TYPE == tl.float32:
        data = low.to(tl.int32, bitcast=True)
    else:
        lower = low.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        data = lower | (high.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return data


@triton.jit
def add_of_ranks(
    inboxes, i, live, before, mine, tag, capacity, TYPE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr
):
    """The bits of `before` + the sum over ranks of words i, summed in the order of ranks and rounded once."""
    low = tl.zeros_like(before).to(tl.float32)
    high = tl.zeros_like(before).to(tl.float32)
    for rank in tl.static_range(RANKS):
        theirs = mine
        if rank != RANK:
            theirs = receive(inboxes, i, live, tag, capacity, rank, RANK, RANKS)
        one, other = numbers(theirs, TYPE)
        low += one
        high += other
    one, other = numbers(before, TYPE)
    return bits(one + low, other + high, TYPE)


@triton.jit
def all_reduce_add_kernel(
    partial,
    residual,
    inboxes,
    launches,
    words,
    capacity,
    TYPE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    # 1. Locate: this program's words.
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    tag = tl.load(launches + program) + 1

    # 2. Send: this rank's values, to all others at once.
    for first in range(program * BLOCK, words, STEP):
        i = first + lane
        data = tl.load(partial + i, mask=i < words, other=0)
        send(inboxes, i, i < words, data, tag, capacity, RANK=RANK, RANKS=RANKS)

    # 3. Receive and add: in the order of ranks, so that all ranks get the same bits. The residual is loaded
    # before the wait.
    for first in range(program * BLOCK, words, STEP):
        i = first + lane
        live = i < words
        before = tl.load(residual + i, mask=live, other=0)
        mine = tl.load(partial + i, mask=live, other=0)
        after = add_of_ranks(inboxes, i, live, before, mine, tag, capacity, TYPE=TYPE, RANK=RANK, RANKS=RANKS)
        tl.store(residual + i, after, mask=live)
    tl.debug_barrier()  # all threads have read the count
    tl.store(launches + program, tag)


@triton.jit
def all_reduce_add_two_shot_kernel(
    partial,
    residual,
    inboxes,
    launches,
    words,
    capacity,
    TYPE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same in two shots, for many bytes among more than two ranks: a word crosses the link twice, and
    each rank sends and receives 2 (ranks - 1) / ranks of the words instead of ranks - 1 times all of them."""
    # 1. Locate: this program's words. In each pass one rank adds them.
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    tag = tl.load(launches + program) + 1

    # 2. Send: this rank's values, each to the rank that adds them.
    for first in range(program * BLOCK, words, STEP):
        i = first + lane
        owner = first // BLOCK % RANKS
        if owner != RANK:
            data = tl.load(partial + i, mask=i < words, other=0)
            send_to(inboxes, owner, i, i < words, data, tag, capacity, RANK=RANK, RANKS=RANKS)

    # 3. Receive and add: this rank's share, in the order of ranks. All others get the new residual.
    for first in range(program * BLOCK, words, STEP):
        i = first + lane
        live = i < words
        if first // BLOCK % RANKS == RANK:
            before = tl.load(residual + i, mask=live, other=0)
            mine = tl.load(partial + i, mask=live, other=0)
            after = add_of_ranks(
                inboxes, i, live, before, mine, tag, capacity, TYPE=TYPE, RANK=RANK, RANKS=RANKS
            )
            send(inboxes, i, live, after, tag, capacity, RANK, RANKS)
            tl.store(residual + i, after, mask=live)

    # 4. Gather: what the other ranks have added.
    for first in range(program * BLOCK, words, STEP):
        i = first + lane
        owner = first // BLOCK % RANKS
        if owner != RANK:
            after = receive(inboxes, i, i < words, tag, capacity, owner, RANK, RANKS)
            tl.store(residual + i, after, mask=i < words)
    tl.debug_barrier()  # all threads have read the count
    tl.store(launches + program, tag)


def all_reduce_add(partial, residual, exchange, two_shot):
    """Launch residual += the sum over ranks of partial."""
    words = words_of(partial)
    launch(
        all_reduce_add_two_shot_kernel if two_shot else all_reduce_add_kernel,
        (min(triton.cdiv(words.numel(), WORDS), BLOCKS),),
        words,
        words_of(residual),
        exchange.table,
        exchange.launches,
        words.numel(),
        exchange.capacity,
        TYPE=TYPES[partial.dtype],
        RANK=exchange.rank,
        RANKS=exchange.ranks,
        BLOCK=WORDS,
        STEP=WORDS * BLOCKS,
        num_warps=1,  # a program polls until all its words are there: without a barrier between warps
        reads=exchange.inboxes,
        **settings.dependent_launch(partial),
    )
