"""all_reduce_add: residual += the sum over all ranks of `partial`, in place

  partial, residual [batch, n] of one dtype; batch * n fills whole pairs of words (lab/ops/exchange.py)
Every rank calls it with its own partial sums and the same residual, and all get the same bits: each rank adds
the values of rank 0, 1, ... in this order, in float32, then the residual, and rounds once.
Each rank sends all its values to all others (one-shot): the fastest way for the few KB of a decode step. On
the torch backend it is torch.distributed's all_reduce, which rounds the sum to the dtype, too.
Kernels: cuda_src/all_reduce_add.cu, triton_kernels/all_reduce_add.py
"""

import torch

from lab.contract import DTYPE_CODES, EPS32, FLOATS, Op, case, dense, refuse
from lab.ops.exchange import Exchange, check_exchange, simulated, words_of

PAIR = 8  # bytes of two words' data, which a thread exchanges at a time


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
    return (residual.double() + sum(one.double() for one in of_all_ranks(partial, exchange)),)


def cuda(k, partial, residual, exchange, out=None):
    k.all_reduce_add(
        partial=partial.data_ptr(),
        residual=residual.data_ptr(),
        peers=exchange.pointers,
        words=partial.nbytes // 4,
        dtype=DTYPE_CODES[partial.dtype],
        stream=k.stream(),
    )


def triton(partial, residual, exchange, out=None):
    from triton_kernels.all_reduce_add import all_reduce_add

    all_reduce_add(partial, residual, exchange)


def torch_(partial, residual, exchange, out=None):
    if exchange.group is not None:
        total = partial.clone()
        torch.distributed.all_reduce(total, group=exchange.group)
        residual.add_(total)
        return
    total = sum(one.float() for one in of_all_ranks(partial, exchange))
    residual.copy_(residual.float() + total)


def inputs(rand, batch, n, ranks=2, rank=0, arrived=False):
    """arrived: what the other ranks send has arrived already, and each sends other values. Otherwise the
    rank is alone, and a loopback sends its own values back as those of the others: then a call may be
    repeated."""
    partials = [rand(batch, n) for _ in range(ranks)]
    exchange = simulated(rand, [words_of(one) for one in partials], rank, loopback=not arrived)
    return partials[rank], rand(batch, n), exchange


def tolerance(a):
    """One rounding to T; before it `ranks` additions in float32."""
    largest = sum(one.double().abs() for one in of_all_ranks(a.partial, a.exchange)) + a.residual.abs()
    return torch.finfo(a.partial.dtype).eps, a.exchange.ranks * EPS32 * float(largest.max())


op = Op(
    name="all_reduce_add",
    summary="residual += the sum of partial over all ranks, in place",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: (1 + 2 * (a.exchange.ranks - 1)) * a.partial.nbytes + 2 * a.residual.nbytes,
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
    ),
)
