"""all_reduce_add: residual += the sum over all ranks of `partial`, in place

  partial, residual [batch, n] of one dtype; batch * n fills whole pairs of words (lab/ops/exchange.py)
Every rank calls it with its own partial sums and the same residual, and all get the same bits: each rank adds
the values of rank 0, 1, ... in this order, in float32, then the residual, and rounds once.
Each rank sends all its values to all others (one-shot): the fastest way for the few KB of a decode step.
Many bytes among more than two ranks take two shots: each rank adds a share of the words, in the same order,
and sends the new residual to all others, so the bits are the same. On the torch backend it is
torch.distributed's all_reduce, which rounds the sum to the dtype, too, and leaves it in `partial`.
Kernels: cuda_src/all_reduce_add.cu, triton_kernels/all_reduce_add.py
"""

import torch

from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse
from lab.ops.exchange import Exchange, check_exchange, owners, simulated, words_of

PAIR = 8  # bytes of two words' data, which a thread exchanges at a time
# From so many bytes of `partial` on, two ranks, and more than two, take two shots.
#
# Two ranks were measured on H100s, bf16, us (one shot, two shots), November 2026: 64 KB CUDA 2.7, 3.4, Triton
# 2.8, 3.6; 256 KB 4.9, 4.8 and 4.3, 4.6; 1 MB 11.2, 10.0 and 10.9, 9.0. The link carries the same either way,
# but with two shots a rank adds half as much.
#
# More ranks were not measured. Two shots save (R - 1) (1 - 2 / R) times the bytes, twice that with the tags,
# and cost one more crossing of the link, about 1 us. At 369 GB/s both are equal at 120 KB with 4 ranks and at
# 280 KB with 3.
TWO_SHOT_BYTES_OF_TWO, TWO_SHOT_BYTES = 512 << 10, 256 << 10


def in_two_shots(exchange: Exchange, nbytes: int) -> bool:
    """Whether a call with so many bytes of `partial` takes two shots: on all ranks alike."""
    if exchange.loopback:
        return False
    if exchange.two_shot_bytes is None:
        return nbytes >= (TWO_SHOT_BYTES if exchange.ranks > 2 else TWO_SHOT_BYTES_OF_TWO)
    return nbytes >= exchange.two_shot_bytes


def validate(
    partial: torch.Tensor, residual: torch.Tensor, exchange: Exchange, out: torch.Tensor | None = None
) -> None:
    if out is not None:
        refuse("all_reduce_add", "adds into the residual; out= is not taken")
    if partial.dtype not in FLOATS or partial.dim() != 2:
        refuse("all_reduce_add", "partial must be [batch, n] in float32, float16 or bfloat16")
    if residual.shape != partial.shape or residual.dtype != partial.dtype:
        refuse("all_reduce_add", "residual must have the shape and dtype of partial")
    if partial.nbytes % PAIR:
        refuse(
            "all_reduce_add", f"batch * n elements must be a multiple of {PAIR} bytes, not {partial.nbytes}"
        )
    dense("all_reduce_add", partial.get_device(), partial, residual)
    check_exchange("all_reduce_add", exchange, partial.nbytes // 4, partial.get_device())


def of_all_ranks(partial, exchange):
    """What each rank adds, in ranks that one process simulates."""
    found = exchange.gathered(words_of(partial))
    return [words.view(partial.dtype).view(partial.shape) for words in found]


def reference(partial, residual, exchange):
    each = [one.double() for one in of_all_ranks(partial, exchange)]
    total = residual.double() + sum(each)
    if in_two_shots(exchange, partial.nbytes):  # the others send the residual of the words that they add
        owner = of_elements(owners(partial.nbytes // 4, exchange.ranks, partial.device), partial)
        for rank in set(range(exchange.ranks)) - {exchange.rank}:
            total = torch.where(owner == rank, each[rank], total)
    return (total,)


def of_elements(of_words, partial):
    """Of each element what a tensor [words] says of its word."""
    return of_words.repeat_interleave(4 // partial.itemsize).view(partial.shape)


def cuda(k, partial, residual, exchange, out=None):
    k.all_reduce_add(
        partial=partial.data_ptr(),
        residual=residual.data_ptr(),
        peers=exchange.pointers,
        words=partial.nbytes // 4,
        two_shot=in_two_shots(exchange, partial.nbytes),
        dtype=DTYPE_CODES[partial.dtype],
        stream=k.stream(),
    )


def triton(partial, residual, exchange, out=None):
    from triton_kernels.all_reduce_add import all_reduce_add

    all_reduce_add(partial, residual, exchange, in_two_shots(exchange, partial.nbytes))


def torch_(partial, residual, exchange, out=None):
    if exchange.group is not None:
        torch.distributed.all_reduce(partial, group=exchange.group)
        residual.add_(partial)
        return
    if in_two_shots(exchange, partial.nbytes):
        residual.copy_(reference(partial, residual, exchange)[0])
        return
    total = sum(one.float() for one in of_all_ranks(partial, exchange))
    residual.copy_(residual.float() + total)


def inputs(rand, batch, n, ranks=2, rank=0, arrived=False, two_shot=False):
    """arrived: what the other ranks send has arrived already, and each sends other values. Otherwise the
    rank is alone, and a loopback sends its own values back as those of the others: then a call may be
    repeated. two_shot: the same in two shots, where the others send what they have added."""
    partials, residual = [rand(batch, n) for _ in range(ranks)], rand(batch, n)
    sent = [words_of(one) for one in partials]
    if two_shot:
        owner = owners(sent[0].numel(), ranks, rand.device)
        after = words_of((residual.float() + sum(one.float() for one in partials)).to(residual.dtype))
        for peer in range(ranks):
            to_this = torch.where(owner == rank, sent[peer], 0)
            sent[peer] = torch.where(owner == peer, after, to_this) if peer != rank else sent[peer]
    exchange = simulated(rand, sent, rank, loopback=not arrived)
    exchange.two_shot_bytes = 0 if two_shot else None
    return partials[rank], residual, exchange


def tolerance(a):
    """One rounding to T; before it `ranks` additions in float32."""
    largest = sum(one.double().abs() for one in of_all_ranks(a.partial, a.exchange)) + a.residual.abs()
    return torch.finfo(a.partial.dtype).eps, a.exchange.ranks * EPS32 * float(largest.max())


def nbytes(a):
    """partial once, residual twice, and the words that arrive, which are half tags."""
    ranks = a.exchange.ranks
    arriving = 2 * (ranks - 1) / ranks if in_two_shots(a.exchange, a.partial.nbytes) else ranks - 1
    return int((1 + 2 * arriving) * a.partial.nbytes) + 2 * a.residual.nbytes


op = Op(
    name="all_reduce_add",
    summary="residual += the sum of partial over all ranks, in place",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=nbytes,
    flops=lambda a: a.exchange.ranks * a.partial.numel(),
    tolerance=tolerance,
    mutates=("residual", "exchange"),
    between_ranks=True,
    direction="copy",
    color="#332288",
    inspect_sizes=dict(batch=1, n=4096),
    cases=(
        case("two ranks, one row, by loopback", batch=1, n=576),
        case("values have arrived: rank 0 of 2", batch=1, n=576, arrived=True),
        case(
            "rank 2 of 4, no whole block, a sum whose order counts",
            batch=3,
            n=200,
            ranks=4,
            rank=2,
            arrived=True,
        ),
        case("rank 7 of 8 by loopback", batch=1, n=520, ranks=8, rank=7),
        case("a rank alone", batch=2, n=64, ranks=1),
        case("more than one pass of a block", batch=64, n=1040, rank=1, arrived=True),
        case("two shots, rank 1 of 3", batch=3, n=1000, ranks=3, rank=1, arrived=True, two_shot=True),
        case("two shots, several passes", batch=64, n=1040, ranks=2, arrived=True, two_shot=True),
    ),
)
