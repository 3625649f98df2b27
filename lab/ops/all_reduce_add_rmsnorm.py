"""all_reduce_add_rmsnorm: residual += the sum over all ranks of `partial`, in place, and y = T(residual *
rsqrt(mean(residual^2) + eps)) * w

  partial, residual [batch, n], w [n] of one dtype; n fills whole pairs of words (lab/ops/exchange.py)
  out may be partial
all_reduce_add and the rmsnorm that follows it in one launch: residual gets the same bits as from
all_reduce_add, and y is rounded as rmsnorm's. One block has a whole row, of at most MOST_WORDS words, and all
rows together have at most the words that all blocks of an exchange send at a time: fits() tells. Larger ones
are two calls.
Kernels: cuda_src/all_reduce_add_rmsnorm.cu, triton_kernels/all_reduce_add_rmsnorm.py
"""

from types import SimpleNamespace

import torch

from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, refuse
from lab.ops import all_reduce_add, rmsnorm
from lab.ops.exchange import BLOCKS, WORDS, Exchange, check_exchange, simulated, words_of

MOST_WORDS = 8192  # of a row: 1024 threads keep 8 words each in registers


def slot_words(batch: int, row_bytes: int) -> int:
    """Words that a call takes of a slot: each row begins with words of another block's count."""
    return batch * -(-row_bytes // 4 // WORDS) * WORDS


def fits(batch: int, row_bytes: int) -> bool:
    """Whether a call takes so many rows of this length."""
    pairs = row_bytes % all_reduce_add.PAIR == 0
    return pairs and row_bytes <= 4 * MOST_WORDS and slot_words(batch, row_bytes) <= BLOCKS * WORDS


def validate(
    partial: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor,
    eps: float,
    exchange: Exchange,
    out: torch.Tensor | None = None,
) -> None:
    name = "all_reduce_add_rmsnorm"
    if partial.dtype not in FLOATS or partial.dim() != 2:
        refuse(name, "partial must be [batch, n] in float32, float16 or bfloat16")
    if residual.shape != partial.shape or residual.dtype != partial.dtype:
        refuse(name, "residual must have the shape and dtype of partial")
    if w.shape != partial.shape[1:] or w.dtype != partial.dtype:
        refuse(name, "w must be [n], with n and the dtype of partial")
    if out is not None and (out.shape != partial.shape or out.dtype != partial.dtype):
        refuse(name, "out must look like partial")
    batch, row_bytes = partial.shape[0], w.nbytes
    if row_bytes % all_reduce_add.PAIR:
        refuse(name, f"a row must be a multiple of {all_reduce_add.PAIR} bytes, not {row_bytes}")
    if not fits(batch, row_bytes):
        refuse(
            name,
            f"takes rows of at most {4 * MOST_WORDS} bytes in {BLOCKS * WORDS} words of a slot, not {batch} "
            f"of {row_bytes} bytes; use all_reduce_add and rmsnorm",
        )
    device = partial.get_device()
    dense(name, device, partial, residual, w, *(() if out is None else (out,)))
    check_exchange(name, exchange, slot_words(batch, row_bytes), device)


def laid_out(t: torch.Tensor) -> torch.Tensor:
    """int32 [words of a slot]: the words of t's rows where a slot has them, with zeros after each."""
    rows = words_of(t).view(t.shape[0], -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % WORDS)).reshape(-1)


def of_all_ranks(partial, exchange):
    """What each rank adds, in ranks that one process simulates."""
    batch, words = partial.shape[0], partial.shape[1] * partial.itemsize // 4
    found = exchange.gathered(laid_out(partial))
    return [
        one.view(batch, -1)[:, :words].contiguous().view(partial.dtype).view(partial.shape) for one in found
    ]


def added(partial, residual, exchange):
    """The new residual: in float32 the sum in the order of ranks, then the residual, rounded once."""
    return (residual.float() + sum(one.float() for one in of_all_ranks(partial, exchange))).to(residual.dtype)


def reference(partial, residual, w, eps, exchange):
    v = added(partial, residual, exchange)
    return (*rmsnorm.reference(v, w, eps), v.double())


def tolerance(a):
    """The order of the sum is part of the contract, so residual is exact, and y as near as rmsnorm's."""
    v = added(a.partial, a.residual, a.exchange)
    return [rmsnorm.tolerance(SimpleNamespace(x=v, w=a.w, eps=a.eps, residual=None)), (0.0, 0.0)]


def cuda(k, partial, residual, w, eps, exchange, out=None):
    k.all_reduce_add_rmsnorm(
        partial=partial.data_ptr(),
        residual=residual.data_ptr(),
        w=w.data_ptr(),
        y=out.data_ptr(),
        peers=exchange.pointers,
        rows=partial.shape[0],
        words=w.nbytes // 4,
        cols=w.numel(),
        eps=eps,
        dtype=DTYPE_CODES[partial.dtype],
        stream=k.stream(),
    )


def triton(partial, residual, w, eps, exchange, out=None):
    from triton_kernels.all_reduce_add_rmsnorm import all_reduce_add_rmsnorm

    all_reduce_add_rmsnorm(partial, residual, w, eps, exchange, out)


def torch_(partial, residual, w, eps, exchange, out=None):
    if exchange.group is not None:
        all_reduce_add.torch_(partial, residual, exchange)
    else:
        residual.copy_(added(partial, residual, exchange))
    rmsnorm.torch_(residual, w, eps, out=out)


def inputs(rand, batch, n, ranks=2, rank=0, arrived=False, kind="normal"):
    """arrived: as in all_reduce_add.py. kind: of rmsnorm.py's inputs, of what each rank adds."""
    partials = [rmsnorm.shaped(rand(batch, n), kind) for _ in range(ranks)]
    exchange = simulated(rand, [laid_out(one) for one in partials], rank, loopback=not arrived)
    return partials[rank], rand(batch, n), rand(n), 1e-5, exchange


op = Op(
    name="all_reduce_add_rmsnorm",
    summary="residual += the sum of partial over all ranks; y = rmsnorm(residual)",
    dtypes=FLOATS,
    validate=validate,
    outputs=lambda partial, *_: torch.empty_like(partial),
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: (2 + 2 * (a.exchange.ranks - 1)) * a.partial.nbytes + 2 * a.residual.nbytes + a.w.nbytes,
    flops=lambda a: (4 + a.exchange.ranks) * a.partial.numel(),
    tolerance=tolerance,
    mutates=("residual", "exchange"),
    between_ranks=True,
    direction="copy",
    color="#332288",
    inspect_sizes=dict(batch=1, n=4096),
    cases=(
        case("two ranks, one row, by loopback", batch=1, n=576),
        case("values have arrived: rank 0 of 2", batch=1, n=576, arrived=True),
        case("rank 2 of 4, rows that fill no block", batch=3, n=200, ranks=4, rank=2, arrived=True),
        case("rank 7 of 8 by loopback, Llama-1B's width", batch=1, n=2048, ranks=8, rank=7),
        case("a rank alone", batch=2, n=64, ranks=1),
        case("the longest rows of float32", batch=2, n=8192, rank=1, arrived=True),
        case("the most rows", batch=64, n=264, rank=1, arrived=True),
        case("one large term among many small ones", batch=1, n=4096, kind="peak", arrived=True),
    ),
)
