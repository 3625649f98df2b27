"""What only a second call, or the memory round a tensor, shows: each fault is planted in a kernel and must be
named."""

import ctypes

import pytest
import torch

from lab.arena import Arena, guard_pattern
from lab.check import check_case
from lab.contract import Rand
from lab.dispatch import select
from lab.ops import OPS, find

RIGHT = select("torch", "cpu")


def beyond(t, elements):
    """The element of t's dtype at a distance from t's first element, wherever that lies."""
    raw = (ctypes.c_char * t.element_size()).from_address(t.data_ptr() + elements * t.element_size())
    return torch.frombuffer(raw, dtype=t.dtype)


def outcome_of(name, function, case=0, dtype=torch.float32):
    op = find(name)
    return check_case(op, function, Rand("cpu", dtype), op.cases[case].sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_pattern_is_nan_everywhere_and_varies(dtype):
    pattern = guard_pattern(0, 4096).view(dtype)
    assert bool(pattern.isnan().all()) and len(guard_pattern(0, 4096).view(torch.int16).unique()) > 100


@pytest.mark.parametrize(
    "where, words",
    [
        (lambda n: n, "wrote 1 element past the end of out: element"),
        (lambda n: n + 200, "wrote 1 element past the end of out: element"),
        (lambda n: -1, "wrote 1 element before the start of out: element -1"),
    ],
)
@pytest.mark.parametrize("name", ["silu_mul", "linear", "sample"])
@pytest.mark.parametrize("value", [0, torch.nan])
def test_a_write_outside_the_output(name, where, words, value):
    def wrong(*args, out):
        getattr(RIGHT, name)(*args, out=out)
        beyond(out, where(out.numel())).fill_(-5 if name == "sample" else value)
        return out

    assert words in outcome_of(name, wrong).error


@pytest.mark.parametrize("op", [op for op in OPS if op.name != "decode_step"], ids=lambda op: op.name)
def test_a_write_past_each_argument(op):
    """Every tensor that is handed in, the workspace's too, has guards: one element behind its storage is
    noticed."""
    from lab.arena import tensors_in

    args = op.inputs(Rand("cpu", op.dtypes[0]), **op.cases[1].sizes)
    args = op.with_workspace(*args)
    paths = [path for name, a in zip(op.names, args) for path, _ in tensors_in(name, a)]
    for path in paths:

        def wrong(*args, out=None):
            result = getattr(RIGHT, op.name)(*args, **({} if out is None else {"out": out}))
            t = next(t for name, a in zip(op.names, args) for p, t in tensors_in(name, a) if p == path)
            beyond(t, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()).fill_(1)
            return result

        error = check_case(op, wrong, Rand("cpu", op.dtypes[0]), op.cases[1].sizes).error
        assert error and "past the end of" in error and path in error, (path, error)


def test_memory_between_packed_rows_is_watched():
    """rope's q and k are views of a packed row that holds v, too, which is no argument of the op."""

    def wrong(q, k, positions, cos_sin):
        RIGHT.rope(q, k, positions, cos_sin)
        beyond(k, k.shape[1] * k.shape[2]).fill_(3.0)

    assert "between the rows of q and k was changed" in outcome_of("rope", wrong).error


@pytest.mark.parametrize(
    "key", [lambda args: tuple(args[0].shape), lambda args: args[0].data_ptr()], ids=["shape", "pointer"]
)
@pytest.mark.parametrize("name", ["rmsnorm", "linear", "silu_mul", "decode_attention", "embedding"])
def test_a_remembered_answer_fails(name, key):
    seen = {}

    def wrong(*args, out):
        if key(args) not in seen:
            seen[key(args)] = getattr(RIGHT, name)(*args).clone()
        return out.copy_(seen[key(args)])

    assert "in call 2, with new contents" in outcome_of(name, wrong).error


@pytest.mark.parametrize("name", ["decode_attention", "rope_append_attention", "norm_linear_argmax"])
def test_a_ticket_left_dirty_fails(name):
    """The first call is right; a call that finds a counter not at zero gives NaN, as a last block that never
    comes."""

    def wrong(*args, out):
        (scratch,) = find(name).state
        state = args[find(name).names.index(scratch)]
        state = getattr(state, "tickets", state)
        getattr(RIGHT, name)(*args, out=out)
        if bool(state.any()):
            out.fill_(-1) if out.dtype == torch.int32 else out.fill_(torch.nan)
        state.add_(1)
        return out

    assert (
        check_case(find(name), wrong, Rand("cpu", torch.float32), find(name).cases[0].sizes, calls=1).error
        is None
    )
    assert "in call 2" in outcome_of(name, wrong).error


def test_a_step_left_dirty_fails():
    def wrong(*args, out):
        counters = args[-1].counters
        RIGHT.decode_step(*args, out=out)
        if bool(counters.any()):
            out.fill_(-1)
        counters.add_(1)
        return out

    assert "in call 2" in outcome_of("decode_step", wrong, dtype=torch.float16).error


def test_an_exception_is_the_outcome():
    def wrong(*args, out):
        raise ZeroDivisionError("planted")

    assert outcome_of("silu_mul", wrong).error == "ZeroDivisionError: planted"


def test_an_arena_keeps_views():
    packed = torch.arange(24.0).view(4, 6)
    values = {"left": packed[:, :2], "right": packed[:, 2:], "empty": torch.empty(0, 3), "eps": 1e-5}
    arena = Arena(values)
    got = arena.values()
    assert got["left"].stride() == (6, 1) and got["eps"] == 1e-5 and got["empty"].shape == (0, 3)
    assert torch.equal(got["right"], packed[:, 2:]) and got["left"].data_ptr() % 256 == 0
    assert got["left"].untyped_storage().nbytes() == packed.nbytes  # so that the interpreter sees its ends
    before = arena.remember()
    got["left"].zero_()
    assert arena.damage({"left"}) is None and "left was changed" in arena.damage({"right"})
    assert torch.equal(before["left"], packed[:, :2])
