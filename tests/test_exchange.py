"""What ranks pass to each other, one rank at a time: the others have sent already, or a loopback answers."""

import re

import pytest
import torch
from commands import ROOT

from lab.contract import Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.ops import all_reduce_add, exchange
from lab.ops.exchange import Exchange, new_inbox, simulated, words_of

ORDER = [1e8, 1.0, -1e8, 3.0]  # in float32 the sum depends on the order
LANGUAGES = ["cuda", "triton"]


def op(name: str, backend: str):
    return getattr(select(backend, "cpu", {name: backend}), name)


@pytest.mark.parametrize("backend", LANGUAGES)
def test_all_ranks_add_in_the_order_of_ranks(backend):
    partials = [torch.full((1, 4), value) for value in ORDER]
    want = torch.full((1, 4), 0.5)
    total = torch.zeros(1, 4)
    for partial in partials:
        total += partial
    want += total
    backwards = sum(reversed(partials), torch.zeros(1, 4)) + 0.5
    assert not torch.equal(want, backwards)
    for rank in range(len(ORDER)):
        one = simulated(Rand("cpu", torch.float32, rank), [words_of(p) for p in partials], rank, False)
        residual = torch.full((1, 4), 0.5)
        op("all_reduce_add", backend)(partials[rank], residual, one)
        assert torch.equal(residual, want), f"rank {rank}"


@pytest.mark.parametrize("backend", LANGUAGES)
def test_launches_of_different_sizes_follow_each_other(backend):
    """A tag is used once, whatever the sizes; their number wraps around."""
    add, inbox = op("all_reduce_add", backend), new_inbox(2, 2048, "cpu")
    one = Exchange.of(1, (inbox,), 2)
    one.launches.fill_(-3)
    rand, wide = Rand("cpu", torch.bfloat16), 0
    for n in (64, 4096, 8, 2048, 4096, 4096, 64):
        partial, residual = rand(1, n), rand(1, n)
        want = (residual.float() + 2 * partial.float()).to(torch.bfloat16)
        add(partial, residual, one)
        wide += n == 4096
        assert torch.equal(residual, want), n
    assert one.launches[0] == 4 and one.launches[7] == -3 + wide and not one.launches[8:].ne(-3).any()


def test_both_languages_exchange_by_one_protocol():
    """The same words in the inboxes: a rank may run either."""
    found = {}
    for backend in LANGUAGES:
        inboxes = tuple(new_inbox(2, 600, "cpu") for _ in range(2))
        rand = Rand("cpu", torch.float32, 3)
        sender = Exchange.of(0, inboxes, 2)
        sender.own[1, 1, :600] = 1 << 32  # rank 1 has sent zeros
        op("all_reduce_add", backend)(rand(2, 300), rand(2, 300), sender)
        found[backend] = inboxes[1]
    assert torch.equal(found["cuda"], found["triton"]) and found["cuda"][1, 0].ne(0).all()


def test_the_kernels_have_the_sizes_of_the_protocol():
    source = (ROOT / "cuda_src/core/exchange.cuh").read_text()
    for name, value in {"kExchangeWords": exchange.WORDS, "kExchangeBlocks": exchange.BLOCKS}.items():
        assert int(re.search(rf"{name} = (\d+)", source)[1]) == value


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ranks=3), "each inbox must be"),
        (dict(rank=2), "rank below"),
        (dict(launches=torch.zeros(3, dtype=torch.int32)), "launches must be"),
        (dict(inboxes=(new_inbox(2, 4, "cpu"),)), "a slot of the inbox has 4"),
    ],
)
def test_an_exchange_that_does_not_fit_is_refused(change, message):
    partial, residual, one = all_reduce_add.op.inputs(Rand("cpu", torch.float32), batch=1, n=64)
    for name, value in change.items():
        setattr(one, name, value)
    with pytest.raises(LabError, match=message):
        op("all_reduce_add", "torch")(partial, residual, one)
