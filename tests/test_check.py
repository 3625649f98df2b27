"""The check must fail what is wrong: zeros, NaN, unwritten outputs, a dropped tail, a changed input, a wrong shape."""
import pytest
import torch

from lab.check import check_case, compare
from lab.contract import Rand
from lab.dispatch import select
from lab.ops import OPS, find

FLOAT_OPS = [op for op in OPS if op.verify is None]
IN_PLACE = ("rope", "kv_append", "linear_add")
OUTPUT_OPS = [op for op in FLOAT_OPS if op.name not in IN_PLACE]


def outcome_of(op, spoil, dtype=torch.float32):
    """The check's outcome for the torch backend followed by `spoil(args, out)`, on the op's first case."""
    right = getattr(select("torch", "cpu"), op.name)

    def wrong(*args, out=None):
        result = right(*args) if out is None else right(*args, out=out)
        spoil(args, out)
        return result

    return check_case(op, wrong, Rand("cpu", dtype), op.cases[0].sizes)


@pytest.mark.parametrize("op", FLOAT_OPS, ids=lambda op: op.name)
def test_the_right_answer_passes(op):
    assert outcome_of(op, lambda args, out: None).error is None


@pytest.mark.parametrize("op", OUTPUT_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoil", [
    lambda args, out: out.zero_(),
    lambda args, out: out.fill_(torch.nan),
    lambda args, out: out.view(-1)[-1:].fill_(torch.nan),        # the last element never written
    lambda args, out: out.view(-1)[-1:].zero_(),
    lambda args, out: out.copy_(out.roll(1, -1)),                # off by one
], ids=["zeros", "nan", "unwritten tail", "zeroed tail", "shifted"])
def test_wrong_outputs_fail(op, dtype, spoil):
    assert outcome_of(op, spoil, dtype).error is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_that_drops_the_tail_of_k_fails(dtype):
    """One vector of 16 bytes left out of each dot product: the tolerance is far tighter than that."""
    op, vector = find("linear"), 16 // dtype.itemsize
    for case in op.cases:
        keep = case.sizes["k"] - min(vector, case.sizes["k"] // 2)
        outcome = check_case(op, lambda x, w, *rest, out: select("torch", "cpu").linear(
            x[:, :keep].contiguous().clone(), w[:, :keep].contiguous().clone(), *rest, out=out), Rand("cpu", dtype), case.sizes)
        assert outcome.error is not None, case


def test_attention_that_drops_a_token_fails():
    op = find("decode_attention")
    for case in op.cases:
        outcome = check_case(op, lambda q, k, v, table, lens, *rest, out: select("torch", "cpu").decode_attention(
            q, k, v, table, lens - 1, *rest, out=out), Rand("cpu", torch.bfloat16), case.sizes)
        assert outcome.error is not None, case


def test_in_place_ops_that_do_nothing_fail():
    for name in IN_PLACE:
        op = find(name)
        assert check_case(op, lambda *args: None, Rand("cpu", torch.float32), op.cases[1].sizes).error is not None


def test_a_changed_input_fails():
    assert "was changed" in outcome_of(find("linear"), lambda args, out: args[1][0].add_(1)).error


def test_a_wrong_token_fails():
    op = find("sample")
    for case in op.cases:
        outcome = check_case(op, lambda logits, *rest, out: out.copy_(logits.argmin(-1)), Rand("cpu", torch.float32), case.sizes)
        assert outcome.error is not None, case
        unwritten = check_case(op, lambda *args, out: out, Rand("cpu", torch.float32), case.sizes)
        assert unwritten.error is not None, case


def test_compare_says_where():
    want = torch.arange(6.0).view(2, 3)
    got = want.clone()
    got[1, 2] = 9
    assert "1 of 6 elements are off, first at [1, 2]: 9, not 5" in compare(got, want, 1e-6, 0).error
    assert compare(want, want, 0, 0).error is None
    assert "shape" in compare(want[:1], want, 1, 1).error
