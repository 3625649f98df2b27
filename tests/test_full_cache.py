"""A step that cannot run changes nothing: no row's length, no page."""

import pytest
import torch
from tiny_models import LLAMA

from lab.dispatch import select
from lab.errors import LabError
from lab.model.decoder import Decoder
from lab.model.sources.random import RandomSource
from lab.model.weights import load


def decoder(batch=3, check_contents=False, **options):
    weights = load(RandomSource(LLAMA, seed=1), torch.float32, "cpu")
    return Decoder(weights, select("torch", "cpu", check_contents=check_contents), batch, **options)


def state(d):
    return (
        list(d.cache.lengths),
        [list(held) for held in d.cache.held],
        list(d.cache.free),
        d.cache.block_table.tolist(),
        d.state.tolist(),
        d.ids.tolist(),
    )


@pytest.mark.parametrize("lengths", [(5, 16, 7), (16, 5, 7), (16, 16, 16)])
def test_a_full_pool_leaves_every_row_as_it_was(lengths):
    """Pages for all three, but none for the row whose next token begins a page."""
    d = decoder(max_context=64, pages=3)
    for row, length in enumerate(lengths):
        d.admit(row, [1] * (length + 1))
    before = state(d)
    for _ in range(3):
        with pytest.raises(LabError, match="the KV cache is full: sequence .* needs 1 more page"):
            d.step()
        assert state(d) == before
    full = lengths.index(16)
    if lengths.count(16) == 1:  # the others go on once it has ended
        d.finish(full)
        d.step()
        assert [d.cache.lengths[row] for row in range(3) if row != full] == [6, 8]


def test_the_last_free_page_goes_to_one_row_only():
    d = decoder(batch=2, max_context=64, pages=3)
    for row in (0, 1):
        d.admit(row, [1] * 17)
    before = state(d)
    with pytest.raises(LabError, match="needs 1 more page.* and 0 of 3 are free"):
        d.step()
    assert state(d) == before


def test_a_row_at_its_limit_leaves_the_others_as_they_were():
    d = decoder(batch=2, max_context=8)
    d.admit(0, [1] * 3), d.admit(1, [1] * 8)
    d.step()
    before = state(d)
    with pytest.raises(LabError, match="sequence 1 would hold 9 tokens and its limit is 8"):
        d.step()
    assert state(d) == before


def test_a_step_that_fails_in_an_op_can_be_repeated():
    d, fresh = (decoder(batch=1, max_context=40, check_contents=True) for _ in range(2))
    for one in (d, fresh):
        one.admit(0, [1, 2, 3])
    held = d.cache.block_table.clone()
    d.cache.block_table.fill_(-1)
    for _ in range(2):
        with pytest.raises(LabError, match="block_table"):
            d.step()
    d.cache.block_table.copy_(held)
    assert d.cache.lengths == fresh.cache.lengths
    assert [d.step().tolist() for _ in range(3)] == [fresh.step().tolist() for _ in range(3)]
    assert torch.equal(d.logits, fresh.logits) and d.cache.lengths == [5]


def test_a_prompt_that_fails_leaves_its_row_empty(monkeypatch):
    from lab.model import prefill

    d = decoder(batch=1, max_context=40)
    before = state(d)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(prefill, "attend_to_finite", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        d.admit(0, [1] * 20)
    assert d.cache.lengths == [0] and sorted(d.cache.free) == sorted(before[2]) and not d.live_rows
