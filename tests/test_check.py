"""The check must fail what is wrong: zeros, NaN, unwritten outputs, a dropped tail, a changed input, a wrong
shape."""

import pytest
import torch

from lab.check import check_case, compare, quick_cases
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
@pytest.mark.parametrize(
    "spoil",
    [
        lambda args, out: out.zero_(),
        lambda args, out: out.fill_(torch.nan),
        lambda args, out: out.view(-1)[-1:].fill_(torch.nan),  # the last element never written
        lambda args, out: out.view(-1)[-1:].zero_(),
        lambda args, out: out.copy_(out.roll(1, -1)),  # off by one
    ],
    ids=["zeros", "nan", "unwritten tail", "zeroed tail", "shifted"],
)
def test_wrong_outputs_fail(op, dtype, spoil):
    assert outcome_of(op, spoil, dtype).error is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_that_drops_the_tail_of_k_fails(dtype):
    """One vector of 16 bytes left out of each dot product: the tolerance is far tighter than that."""
    op, vector = find("linear"), 16 // dtype.itemsize
    for case in op.cases:
        keep = case.sizes["k"] - min(vector, case.sizes["k"] // 2)
        outcome = check_case(
            op,
            lambda x, w, *rest, out: select("torch", "cpu").linear(
                x[:, :keep].contiguous().clone(), w[:, :keep].contiguous().clone(), *rest, out=out
            ),
            Rand("cpu", dtype),
            case.sizes,
        )
        assert outcome.error is not None, case


def test_attention_that_drops_a_token_fails():
    op = find("decode_attention")
    for case in op.cases:
        outcome = check_case(
            op,
            lambda q, k, v, table, lens, *rest, out: select("torch", "cpu").decode_attention(
                q, k, v, table, lens - 1, *rest, out=out
            ),
            Rand("cpu", torch.float32),
            case.sizes,
        )
        assert outcome.error is not None, case


def test_in_place_ops_that_do_nothing_fail():
    for name in IN_PLACE:
        op = find(name)
        assert (
            check_case(op, lambda *args: None, Rand("cpu", torch.float32), op.cases[1].sizes).error
            is not None
        )


def test_a_changed_input_fails():
    assert "was changed" in outcome_of(find("linear"), lambda args, out: args[1][0].add_(1)).error


def test_a_wrong_token_fails():
    op = find("sample")
    for case in op.cases:
        outcome = check_case(
            op,
            lambda logits, *rest, out: out.copy_(logits.argmin(-1)),
            Rand("cpu", torch.float32),
            case.sizes,
        )
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


INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    "got, want, dtype, right",
    [
        (NAN, NAN, torch.float32, True),
        (NAN, 1.0, torch.float32, False),
        (1.0, NAN, torch.float32, False),
        (INF, INF, torch.float32, True),
        (-INF, -INF, torch.bfloat16, True),
        (INF, -INF, torch.float32, False),
        (5.0, INF, torch.float32, False),
        (3e38, INF, torch.float32, False),
        (INF, 5.0, torch.float32, False),
        (INF, NAN, torch.float32, False),
        (NAN, INF, torch.float32, False),
        (INF, 65520.0, torch.float16, True),  # half way between fp16's largest and the next: it rounds to inf
        (INF, 65504.0, torch.float16, False),
        (-INF, 65520.0, torch.float16, False),
        (65504.0, 65520.0, torch.float16, True),
    ],
)
@pytest.mark.parametrize("rtol, atol", [(0.0, 0.0), (1e-3, 1e-6)])
def test_not_finite_is_right_only_where_it_is_wanted(got, want, dtype, right, rtol, atol):
    if not rtol and (got, want) == (65504.0, 65520.0):
        right = False  # no tolerance at all
    if rtol and want == 65504.0:
        right = True  # 65504 (1 + 1e-3) rounds to inf
    outcome = compare(
        torch.tensor([1.0, got], dtype=dtype), torch.tensor([1.0, want], dtype=torch.float64), rtol, atol
    )
    assert (outcome.error is None) is right


def test_the_bits_of_an_input_are_compared():
    """A NaN overwritten by 0, or an inf by the largest number, is a change; a NaN that stays is none."""
    from lab.check import same_bits

    a = torch.tensor([NAN, INF, -0.0, 1.0])
    assert same_bits(a, a.clone())
    for i, other in enumerate((0.0, torch.finfo(torch.float32).max, 0.0, 2.0)):
        b = a.clone()
        b[i] = other
        assert not same_bits(a, b)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_case_may_hold_nan_and_inf(bad):
    """One row of a linear with a NaN or inf: the right kernel passes, one that is off in another row does
    not."""
    from dataclasses import replace

    op = find("linear")

    def inputs(rand, **sizes):
        x, w, bias, out_dtype = op.inputs(rand, **sizes)
        x[0, 0] = bad
        return x, w, bias, out_dtype

    poisoned, right, sizes = (
        replace(op, inputs=inputs),
        select("torch", "cpu").linear,
        dict(batch=3, n=9, k=40),
    )
    assert check_case(poisoned, right, Rand("cpu", torch.float32), sizes).error is None
    for row, value in ((0, 0.0), (1, NAN), (2, 3.0)):

        def wrong(*args, out):
            right(*args, out=out)[row, 4] = value
            return out

        assert check_case(poisoned, wrong, Rand("cpu", torch.float32), sizes).error is not None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_quick_takes_the_first_two_cases_and_each_format(op):
    """compute-sanitizer sees these alone."""
    cases = quick_cases(op)
    assert cases[:2] == list(op.cases[:2]) and len(set(map(id, cases))) == len(cases)
    for name in ("format", "kv_dtype"):
        formats = {case.sizes.get(name) for case in op.cases} - {None}
        assert {case.sizes.get(name) for case in cases} - {None} == formats
