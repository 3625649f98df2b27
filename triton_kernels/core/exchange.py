"""Device code of the ops that pass words between ranks: see lab/ops/exchange.py for what a word is and where
it lies."""

import triton
import triton.language as tl

from lab.ops import exchange

WORDS, BLOCKS = exchange.WORDS, exchange.BLOCKS
MOST_POLLS = tl.constexpr(1 << 28)  # some minutes; of the interpreter: see its before_poll()


@triton.jit
def tagged(data, tag):
    """int32 data with its tag, as int64."""
    return (tag.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def send_to(inboxes, to, i, live, data, tag, capacity, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Stores words i with these data in the inbox of rank `to`. Each word is one 64-bit store; past the
    caches (.wt), because the reader is another GPU."""
    slot = ((tag & 1) * RANKS + RANK).to(tl.int64) * capacity
    inbox = tl.load(inboxes + to).to(tl.pointer_type(tl.int64))
    tl.store(inbox + slot + i, tagged(data, tag), mask=live, cache_modifier=".wt")


@triton.jit
def send(inboxes, i, live, data, tag, capacity, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The same in the inboxes of all other ranks."""
    for other in tl.static_range(1, RANKS):
        send_to(inboxes, (RANK + other) % RANKS, i, live, data, tag, capacity, RANK=RANK, RANKS=RANKS)


@triton.jit
def receive(inboxes, i, live, tag, capacity, source, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The data of words i of rank `source`, int32; waits until all have arrived."""
    inbox = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64))
    at = inbox + ((tag & 1) * RANKS + source).to(tl.int64) * capacity + i
    word = tl.load(at, mask=live, other=0, volatile=True)
    polls = 0
    while tl.max(tl.where(live & ((word >> 32).to(tl.int32) != tag), 1, 0), axis=0) == 1:
        word = tl.load(at, mask=live, other=0, volatile=True)
        polls += 1
        if polls == MOST_POLLS:  # a rank whose peer has gone does not wait for ever
            tl.inline_asm_elementwise("trap; mov.u32 $0, $1;", "=r,r", [polls], tl.int32, False, 1)
    return word.to(tl.int32)


@triton.jit
def send_sums(peers, i, live, sums, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Stores float32 sums as words i in the inboxes of all ranks, its own included.

    peers: (inboxes, capacity, tag).
    """
    inboxes, capacity, tag = peers
    data = sums.to(tl.int32, bitcast=True)
    send(inboxes, i, live, data, tag=tag, capacity=capacity, RANK=RANK, RANKS=RANKS)
    own = tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64))
    slot = ((tag & 1) * RANKS + RANK).to(tl.int64) * capacity
    tl.store(own + slot + i, tagged(data, tag), mask=live, cache_modifier=".wt")


@triton.jit
def add_sums(peers, residual, y, first, end, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """y[i] = residual[i] + the sums i of all ranks, in their order, for i from `first` to `end`."""
    inboxes, capacity, tag = peers
    for begin in range(first, end, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        live = i < end
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(RANKS):
            data = receive(inboxes, i, live, tag, capacity=capacity, source=rank, RANK=RANK, RANKS=RANKS)
            total += data.to(tl.float32, bitcast=True)
        before = tl.load(residual + i, mask=live, other=0.0).to(tl.float32)
        tl.store(y + i, (before + total).to(y.dtype.element_ty), mask=live)
