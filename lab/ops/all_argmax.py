"""all_argmax: ids[b] = the index of the largest logit of all ranks, in place

  logits float32 [batch, n]: this rank's share of the vocabulary, which begins at row `first` of lm_head
  ids int32 [batch]: on entry the index of the largest of them, as sample and norm_linear_argmax give it (-1
  for a row with NaN); on exit the index in the whole vocabulary, the same on all ranks
Shares follow each other in the order of ranks. The lowest index wins a tie, and a row in which any rank has
NaN gives -1. Batch 1 to 64.
Kernels: cuda_src/all_argmax.cu, triton_kernels/all_argmax.py
"""

import torch

from lab.contract import Op, case, dense, refuse
from lab.ops import sample
from lab.ops.exchange import Exchange, check_exchange, simulated

MOST_ROWS = 64


def validate(
    logits: torch.Tensor, ids: torch.Tensor, first: int, exchange: Exchange, out: torch.Tensor | None = None
) -> None:
    if out is not None:
        refuse("all_argmax", "changes ids in place; out= is not taken")
    if logits.dim() != 2 or logits.dtype != torch.float32 or not 1 <= logits.shape[0] <= MOST_ROWS:
        refuse("all_argmax", f"logits must be float32 [batch, n], batch 1 to {MOST_ROWS}")
    if ids.shape != logits.shape[:1] or ids.dtype != torch.int32:
        refuse("all_argmax", "ids must be int32 [batch]")
    if first < 0:
        refuse("all_argmax", f"first {first}: a share begins at 0 or later")
    dense("all_argmax", logits.get_device(), logits, ids)
    check_exchange("all_argmax", exchange, 2 * ids.numel(), logits.get_device())


def contents(a):
    if bool(((a.ids < -1) | (a.ids >= a.logits.shape[1])).any()):
        refuse("all_argmax", "ids must be -1 or an index of the logits")


def candidates(logits, ids, first):
    """int32 [2 * batch], what a rank sends: of each row the bits of its largest logit, and the index of that
    in the vocabulary, or -1."""
    value = logits.gather(1, ids.clamp(min=0)[:, None].long())[:, 0]
    index = torch.where(ids < 0, -1, ids + first)
    return torch.stack([value.view(torch.int32), index], -1).view(-1)


def best(each):
    """ids of the whole vocabulary, from what each rank has sent."""
    values = torch.stack([one.view(-1, 2)[:, 0].contiguous().view(torch.float32) for one in each], -1)
    index = torch.stack([one.view(-1, 2)[:, 1] for one in each], -1)
    winner = sample.greedy(values.nan_to_num(nan=-torch.inf)).long()  # of equal ones the first rank
    found = index.gather(1, winner[:, None])[:, 0]
    return torch.where((index < 0).any(-1), -1, found).to(torch.int32)


def reference(logits, ids, first, exchange):
    return (best(exchange.gathered(candidates(logits, ids, first))),)


def cuda(k, logits, ids, first, exchange, out=None):
    k.all_argmax(
        logits=logits.data_ptr(),
        ids=ids.data_ptr(),
        rows=ids.numel(),
        n=logits.shape[1],
        first=first,
        peers=exchange.pointers,
        stream=k.stream(),
    )


def triton(logits, ids, first, exchange, out=None):
    from triton_kernels.all_argmax import all_argmax

    all_argmax(logits, ids, first, exchange)


def torch_(logits, ids, first, exchange, out=None):
    mine = candidates(logits, ids, first)
    if exchange.group is None:
        each = exchange.gathered(mine)
    else:
        each = [torch.empty_like(mine) for _ in range(exchange.ranks)]
        torch.distributed.all_gather(each, mine, group=exchange.group)
    ids.copy_(best(each))


def inputs(rand, batch, n, ranks=2, rank=0, tie=False, nan=(), arrived=False):
    """tie: every rank has the same logits, so that the first must win. nan: ranks whose first row has NaN.
    arrived: as in all_reduce_add.py."""
    shares = [rand(batch, n, dtype=torch.float32) for _ in range(ranks)]
    shares = [shares[0].clone() if tie else one for one in shares]
    for one in nan:
        shares[one][0, n // 2] = torch.nan
    ids = [sample.greedy(one) for one in shares]
    sent = [candidates(*of_rank) for of_rank in zip(shares, ids, range(0, ranks * n, n))]
    exchange = simulated(rand, sent, rank, loopback=not arrived)
    return shares[rank], ids[rank], rank * n, exchange


op = Op(
    name="all_argmax",
    summary="ids = index of the largest logit of all ranks, in place",
    dtypes=(torch.float32,),
    validate=validate,
    contents=contents,
    outputs=lambda *args: None,
    reference=reference,
    inputs=inputs,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    nbytes=lambda a: 16 * a.exchange.ranks * a.ids.numel(),
    flops=lambda a: a.exchange.ranks * a.ids.numel(),
    tolerance=lambda a: (0.0, 0.0),
    mutates=("ids", "exchange"),
    between_ranks=True,
    direction="copy",
    color="#882255",
    inspect_sizes=dict(batch=1, n=64128),
    cases=(
        case("two ranks, one row, by loopback: a tie, which rank 0 wins", batch=1, n=272),
        case("values have arrived: rank 0 of 2", batch=5, n=101, arrived=True),
        case("rank 3 of 4, the largest batch", batch=64, n=37, ranks=4, rank=3, arrived=True),
        case("equal logits: the first rank wins", batch=3, n=64, ranks=3, rank=2, tie=True, arrived=True),
        case("another rank has NaN", batch=3, n=64, ranks=3, rank=0, nan=(1,), arrived=True),
        case("this rank has NaN", batch=3, n=64, rank=1, nan=(1,), arrived=True),
    ),
)
