"""What processes pass to each other: sums in one shot, in two, and with the norm that follows have the same
bits, on all ranks and in both languages, which the ranks mix."""

import sys
from pathlib import Path

import pytest
import torch
from exchange_child import CALLS

from lab.contract import Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.model import ranks
from lab.ops import all_reduce_add, all_reduce_add_rmsnorm
from lab.ops.exchange import Exchange, new_inbox

CHILD = Path(__file__).with_name("exchange_child.py")


@pytest.mark.parametrize("count", [2, 3])
def test_all_kinds_of_sums_have_the_same_bits_on_all_ranks(count, tmp_path):
    ranks.start([sys.executable, str(CHILD), str(tmp_path / "found")], count)
    each = [(tmp_path / f"found-{rank}").read_text().splitlines() for rank in range(count)]
    assert all(one == each[0] for one in each) and len(each[0]) == len(CALLS)
    assert len(set(each[0][:12])) == 3  # one for all kinds of the same sizes
    assert each[0][12] == each[0][13]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sums_of_other_kinds_share_an_exchange(backend):
    """Rows begin with words of another block, so a launch counts for the blocks that have its words alone."""
    ops, rand = select(backend, "cpu"), Rand("cpu", torch.bfloat16)
    one = Exchange.of(1, (new_inbox(2, 2048, "cpu"),), 2)
    for batch, n, with_norm in ((2, 520, True), (1, 1040, False), (1, 520, True), (3, 64, True)):
        partial, residual, w = rand(batch, n), rand(batch, n), rand(n)
        want = (residual.float() + 2 * partial.float()).to(torch.bfloat16)
        if with_norm:
            given = partial.clone()
            ops.all_reduce_add_rmsnorm(given, residual, w, 1e-5, one, out=given)
            assert (given - ops.rmsnorm(want, w, 1e-5)).abs().max() <= 0.05
        else:
            ops.all_reduce_add(partial, residual, one)
        assert torch.equal(residual, want)
    # 520 elements are 2 blocks' words for each row, 1040 of one row 3 blocks', 64 a single one's.
    assert one.launches[:6].tolist() == [4, 4, 3, 1, 0, 0]


def test_rows_that_do_not_fit_one_launch_are_refused():
    rand = Rand("cpu", torch.float32)
    for batch, n in ((1, 8194), (65, 264), (129, 8)):
        assert not all_reduce_add_rmsnorm.fits(batch, 4 * n)
        with pytest.raises(LabError, match="use all_reduce_add and rmsnorm$"):
            select("torch", "cpu").all_reduce_add_rmsnorm(*all_reduce_add_rmsnorm.op.inputs(rand, batch, n))
    assert all_reduce_add_rmsnorm.fits(128, 32) and not all_reduce_add_rmsnorm.fits(1, 6)


def test_two_shots_are_for_many_bytes():
    least = {3: all_reduce_add.TWO_SHOT_BYTES, 2: all_reduce_add.TWO_SHOT_BYTES_OF_TWO}

    def of(count):
        inboxes = tuple(new_inbox(count, 2, "cpu") for _ in range(count))
        return Exchange.of(0, inboxes, count)

    for count, nbytes in least.items():
        assert all_reduce_add.in_two_shots(of(count), nbytes)
        assert not all_reduce_add.in_two_shots(of(count), nbytes - 8)
