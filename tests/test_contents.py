"""Integers in tensors that would lead a kernel astray: one clear error on every backend, where it is asked
for."""

import pytest
import torch

from lab.contract import BACKENDS, Rand, case
from lab.dispatch import select
from lab.errors import LabError
from lab.ops import OPS, decode_attention, decode_step, embedding, kv_append, rope, rope_append_attention

EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)
MODULES = dict(
    kv_append=kv_append,
    rope=rope,
    decode_attention=decode_attention,
    decode_step=decode_step,
    rope_append_attention=rope_append_attention,
)
SIZES = dict(
    kv_append=dict(positions=(20, -1, 3), q_heads=4, kv_heads=2, head_dim=64),
    rope=dict(batch=3, q_heads=2, kv_heads=1, head_dim=64, max_positions=40),
    decode_attention=dict(lengths=(21, 0, 4), q_heads=4, kv_heads=2, head_dim=64),
    rope_append_attention=dict(positions=(20, -1, 3), q_heads=4, kv_heads=2, head_dim=64),
    decode_step=dict(
        layers=1, hidden=72, intermediate=64, vocab=83, q_heads=2, kv_heads=1, head_dim=64, position=20
    ),
)
# Where the arguments of each op are.
TABLE = dict(kv_append=4, decode_attention=3, rope_append_attention=10, decode_step=5)
TOKENS = dict(kv_append=5, rope=2, decode_attention=4, rope_append_attention=6, decode_step=1)


def spoil(name, what):
    """The op's arguments with one integer that is wrong, and what the error must say."""
    dtype = torch.bfloat16 if name == "decode_step" else torch.float32
    args = MODULES[name].inputs(Rand("cpu", dtype), **SIZES[name])
    table, tokens = args[TABLE[name]] if name in TABLE else None, args[TOKENS[name]]
    at = "context_lens" if name == "decode_attention" else "positions"
    pages = {"decode_step": 2}.get(name, 6)
    if what == "page -1":
        table[0, 1] = -1
        return args, f"^{name}: block_table\\[0, 1\\] is -1, and the cache has pages 0 to {pages - 1}"
    if what == "page == pages":
        table[0, 0] = pages
        return args, f"^{name}: block_table\\[0, 0\\] is {pages}, and the cache has pages 0 to {pages - 1}"
    if what == "past the table":
        tokens[0] = 33 if at == "context_lens" else 32
        if name == "decode_step":
            return args, f"^{name}: positions\\[0\\] is 32, and cos_sin ends after 21 positions"
        return (
            args,
            f"^{name}: {at}\\[0\\] is {int(tokens[0])}, and a row of block_table ends after 32 tokens",
        )
    if what == "past cos_sin":
        tokens[0] = 512 if name == "rope_append_attention" else 40
        return (
            args,
            f"^{name}: positions\\[0\\] is {int(tokens[0])}, and cos_sin ends after {int(tokens[0])} "
            "positions",
        )
    if what == "one page twice":
        table[0, 0] = table[0, 1]
        return (
            args,
            f"^{name}: row 0 writes page .* block_table\\[0, 0\\] and block_table\\[0, 1\\] both name",
        )
    assert what == "a page of two rows"
    table[2, 0] = table[0, 1]
    return args, f"^{name}: row 0 writes page .* block_table\\[0, 1\\] and block_table\\[2, 0\\] both name"


WRONG = (
    [(name, what) for name in TABLE for what in ("page -1", "page == pages", "past the table")]
    + [(name, "past cos_sin") for name in ("rope", "rope_append_attention")]
    + [(name, "one page twice") for name in ("kv_append", "rope_append_attention", "decode_step")]
    + [(name, "a page of two rows") for name in ("kv_append", "rope_append_attention")]
)


@EVERYWHERE
@pytest.mark.parametrize("name, what", WRONG)
def test_wrong_contents_are_one_clear_error_before_anything_is_launched(name, what, backend):
    args, said = spoil(name, what)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    ops = select(backend, "cpu", dict.fromkeys(MODULES, backend), check_contents=True)
    with pytest.raises(LabError, match=said):
        getattr(ops, name)(*args)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(args, before)
        if isinstance(a, torch.Tensor)
    )


def test_what_rows_do_not_use_may_hold_anything():
    """An idle row's entries, and those past a live row's last token."""
    for name in TABLE:
        args, _ = spoil(name, "page -1")
        args[TOKENS[name]][0] = 16 if name == "decode_attention" else 15  # the last token of the first page
        args[TABLE[name]][1:2] = 1 << 30
        getattr(select("cuda", "cpu", dict.fromkeys(MODULES, "cuda"), check_contents=True), name)(*args)


def test_the_environment_asks_for_it(monkeypatch):
    args, said = spoil("kv_append", "past the table")
    monkeypatch.setenv("LAB_CHECK", "1")
    assert select("torch", "cpu").check_contents
    with pytest.raises(LabError, match=said):
        select("torch", "cpu").kv_append(*args)
    assert not select("torch", "cpu", check_contents=False).check_contents
    monkeypatch.setenv("LAB_CHECK", "yes")
    with pytest.raises(LabError, match="unknown value of LAB_CHECK 'yes': choose from 0, 1"):
        select("torch", "cpu")
    monkeypatch.delenv("LAB_CHECK")
    assert not select("torch", "cpu").check_contents


def test_lab_check_and_lab_try_validate_contents(monkeypatch, tmp_path, capsys):
    """A case with a wrong page is refused by both, though nobody set LAB_CHECK."""
    from pathlib import Path

    from lab import cli

    op = next(op for op in OPS if op.name == "kv_append")

    def inputs(rand, **sizes):
        args = kv_append.inputs(rand, **sizes)
        args[4][0, 0] = -1
        return args

    object.__setattr__(op, "inputs", inputs)
    object.__setattr__(
        op, "cases", (case("a wrong page", positions=(3,), q_heads=1, kv_heads=1, head_dim=64),)
    )
    try:
        own = tmp_path / "own.py"
        own.write_text((Path(__file__).parent.parent / "triton_kernels/kv_append.py").read_text())
        for words in (
            ["check", "--op", "kv_append", "--device", "cpu"],
            ["try", str(own), "--op", "kv_append"],
        ):
            assert cli.main(words) != 0
            said = "".join(capsys.readouterr())
            assert "block_table[0, 0] is -1, and the cache has pages 0 to 0" in said
    finally:
        object.__setattr__(op, "inputs", kv_append.inputs)
        object.__setattr__(op, "cases", KV_CASES)


KV_CASES = kv_append.op.cases


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_dtypes_that_no_kernel_takes_are_refused_alike(backend, dtype):
    ops, zeros = select(backend, "cpu", dict.fromkeys((op.name for op in OPS), backend)), torch.zeros
    cache, q, heads = (
        zeros(2, 2, 16, 64, dtype=dtype),
        zeros(1, 2, 64, dtype=dtype),
        zeros(1, 1, dtype=torch.int32),
    )
    one, w, x = heads[0], zeros(64, 64, dtype=dtype), zeros(1, 64, dtype=dtype)
    calls = [
        lambda: ops.embedding(one, w),
        lambda: ops.rmsnorm(x, w[0], 1e-5),
        lambda: ops.linear(x, w),
        lambda: ops.rope(q, q, one, zeros(4, 64)),
        lambda: ops.kv_append(q, q, cache, cache, heads, one),
        lambda: ops.decode_attention(q, cache, cache, heads, one, 1.0),
        lambda: ops.silu_mul(x),
        lambda: ops.linear_add(x, w, x),
        lambda: ops.norm_linear(x, w[0], 1e-5, w),
        lambda: ops.norm_linear_silu_mul(x, w[0], 1e-5, w),
        lambda: ops.rope_append_attention(
            q, q, q, None, None, 1e-5, one, zeros(4, 64), cache, cache, heads, 1.0
        ),
    ]
    for call in calls:
        with pytest.raises(LabError, match=f"takes no {dtype}"):
            call()


@EVERYWHERE
@pytest.mark.parametrize("wrong", [torch.int64, torch.float32, torch.int16])
def test_integer_tensors_are_int32(backend, wrong):
    ops = select(backend, "cpu", dict.fromkeys(MODULES, backend))
    for name, at in (*TABLE.items(), *TOKENS.items()):
        dtype = torch.bfloat16 if name == "decode_step" else torch.float32
        args = list(MODULES[name].inputs(Rand("cpu", dtype), **SIZES[name]))
        args[at] = args[at].to(wrong)
        with pytest.raises(LabError, match="int32"):
            getattr(ops, name)(*args)
    with pytest.raises(LabError, match="int32"):
        ops.embedding(torch.zeros(1, dtype=wrong), torch.zeros(4, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 40])
def test_an_id_outside_the_vocabulary_gives_a_row_of_nan(backend, vocab, rand, device):
    """Before and behind the table lie numbers, so that a row read there is no NaN by chance."""
    ops, table = select(backend, device, {"embedding": backend}), rand()(vocab + 2, 24)[1:-1]
    ids = torch.tensor([vocab, vocab - 1, -1, 0], dtype=torch.int32, device=device)
    out = ops.embedding(ids, table)
    assert out[[0, 2]].isnan().all() and torch.equal(out[[1, 3]], table[[vocab - 1, 0]])
    assert embedding.reference(ids, table)[0][[0, 2]].isnan().all()
