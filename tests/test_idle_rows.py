"""Rows without a sequence, and slots without a token: neither may show in the result of a live row, on any
backend."""

import ctypes
import mmap

import pytest
import torch

from lab.contract import BACKENDS, Rand
from lab.dispatch import select
from lab.model.prefill import attend
from lab.ops import OPS, decode_attention, decode_step, find, rope_append_attention, step_layout
from lab.ops.decode_attention import Workspace

EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)


def chosen(backend, device):
    return select(backend, device, dict.fromkeys((op.name for op in OPS), backend))


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@EVERYWHERE
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["idle last", "idle first"])
def test_an_idle_row_does_not_undo_a_write_to_its_old_page(backend, order, rand, device):
    """Row 1 has ended; its table still names page 3, which row 0 was given and writes now."""
    k, v = (rand()(2, 2, 64) for _ in range(2))
    cache = [rand(seed=i)(4, 2, 16, 64) for i in (1, 2)]
    before = [c.clone() for c in cache]
    table, positions = (
        int32([[2, 3], [3, 0]], device)[order].contiguous(),
        int32([16, -1], device)[order].contiguous(),
    )
    chosen(backend, device).kv_append(k, v, *cache, table, positions)
    live = order.index(0)
    for got, old, new in zip(cache, before, (k, v)):
        assert torch.equal(got[3, :, 0], new[live])
        old[3, :, 0] = new[live]
        assert torch.equal(got, old)


@EVERYWHERE
def test_only_idle_rows_write_nothing(backend, rand, device):
    k, v, *cache = rand()(2, 2, 64), rand()(2, 2, 64), rand()(4, 2, 16, 64), rand()(4, 2, 16, 64)
    before = [c.clone() for c in cache]
    chosen(backend, device).kv_append(
        k, v, *cache, int32([[99, -7], [3, 0]], device), int32([-1, -1], device)
    )
    assert all(map(torch.equal, cache, before))


@EVERYWHERE
def test_the_fused_append_does_not_undo_it_either(backend, rand, device):
    args = list(rope_append_attention.inputs(rand(), (16, -1), 4, 2, 64))
    positions, (k_cache, v_cache), v = args[6], args[8:10], args[2]
    assert args[10][1, 0] == args[10][0, 1], "the idle row names the page that row 0 writes"
    held = k_cache.clone(), v_cache.clone()
    page = int(args[10][0, 1])
    out = chosen(backend, device).rope_append_attention(*args)
    assert torch.equal(v_cache[page, :, 0], v[0]) and not torch.equal(
        k_cache[page, :, 0], held[0][page, :, 0]
    )
    v_cache[page, :, 0], k_cache[page, :, 0] = held[1][page, :, 0], held[0][page, :, 0]
    assert torch.equal(k_cache, held[0]) and torch.equal(v_cache, held[1])
    assert not out[1].any() and positions.tolist() == [16, -1]


@EVERYWHERE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_past_the_context_is_not_multiplied(backend, bad, rand, device):
    """Bit for bit the same result as with zeros there."""
    outs = []
    for fill in (0.0, bad):
        q, k, v, table, lengths, *rest = decode_attention.inputs(
            rand(torch.float16), (5, 0, 33), 4, 2, 64, splits=2
        )
        for b, length in enumerate((5, None, 33)):
            if length is not None:
                page, slot = int(table[b, length // 16]), length % 16
                k[page, :, slot:], v[page, :, slot:] = fill, fill
        outs.append(chosen(backend, device).decode_attention(q, k, v, table, lengths, *rest))
    assert outs[1].isfinite().all() and torch.equal(*outs)


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 9, 19])
def test_a_prompt_shows_an_overflow_only_to_the_tokens_that_see_it(start, bad, at, rand):
    """Prefill gives each token what it would get if the prompt ended there."""
    q, k, v = rand()(20 - start, 4, 64), rand()(20, 2, 64), rand()(20, 2, 64)
    v[at, 1, 3] = bad
    k[at, 0, 5] = bad
    got = attend(q, k, v)
    for i in range(20 - start):
        seen = start + i + 1
        alone = attend(q[i : i + 1], k[:seen], v[:seen])[0]
        torch.testing.assert_close(got[i], alone, equal_nan=True)
        assert got[i].isfinite().all() == (seen <= at)


@EVERYWHERE
@pytest.mark.parametrize("splits", [2, 7, 18])
@pytest.mark.parametrize("name", ["decode_attention", "rope_append_attention"])
def test_a_workspace_serves_again(name, splits, backend, rand, device):
    """Tickets are zero after a call of any number of splits, and another call's answer is as right as the
    first."""
    module, ops = (
        {"decode_attention": decode_attention, "rope_append_attention": rope_append_attention}[name],
        chosen(backend, device),
    )
    workspace = Workspace.empty(2, 4, 2, 64, splits, device)
    for seed in (0, 1):
        args = module.inputs(rand(seed=seed), (1199, 39), 4, 2, 64, splits=splits)
        want = module.reference(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))[0]
        rtol, atol = module.tolerance(module.op.bound(*args))
        got = getattr(ops, name)(*args, workspace)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
        assert not workspace.tickets.any()


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_a_step_leaves_its_workspace_ready(backend, rand, device):
    """CUDA's rows carry a tag, and the next launch must count on: with the old one it would take the old rows
    for new."""
    ops = chosen(backend, device)
    sizes = find("decode_step").cases[0].sizes
    args = decode_step.inputs(rand(torch.bfloat16), **sizes)
    ids, counters, tags = args[0], args[7].counters, set()
    for token in (1, 2, 3):
        ids.fill_(token)
        want = decode_step.reference(*args)[3]
        ops.decode_step(*args)
        assert (args[6] - want).abs().max() <= decode_step.tolerance(decode_step.op.bound(*args))[1]
        tags.add(int(counters[step_layout.TAG]))
        rest = counters.clone()
        rest[step_layout.TAG] = 0
        assert not rest.any()
    assert len(tags) == (3 if backend == "cuda" else 1)


# ---- no load or store outside a tensor ---------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)


class Fenced:
    """Copies of tensors that lie between two pages that nobody may touch: at the first byte, or up to the
    last one."""

    def __init__(self, at_end):
        self.at_end, self.maps = at_end, []

    def __call__(self, t):
        if not isinstance(t, torch.Tensor):
            return t
        storage = t.new_empty(0).set_(
            t.untyped_storage(), 0, (t.untyped_storage().nbytes() // t.itemsize,), (1,)
        )
        size, page = -(-storage.nbytes // 16) * 16, mmap.PAGESIZE
        inner = -(-size // page) * page
        area = mmap.mmap(-1, inner + 2 * page)
        self.maps.append(area)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for fence in (base, base + page + inner):
            assert LIBC.mprotect(ctypes.c_void_p(fence), page, 0) == 0
        offset = page + (inner - size if self.at_end else 0)
        new = torch.frombuffer(area, dtype=t.dtype, count=storage.numel(), offset=offset)
        new.copy_(storage)
        return new.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.mark.skipif(not hasattr(LIBC, "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("op", [op for op in OPS if op.name != "decode_step"], ids=lambda op: op.name)
def test_cuda_touches_nothing_outside_its_tensors(op, at_end):
    """On the CPU; a GPU's kernels have compute-sanitizer. An index of -1 for an idle row is such a fault."""
    function = getattr(select("cuda", "cpu"), op.name)
    for case in op.cases:
        sizes, fenced = case.sizes, Fenced(at_end)
        if sizes.get("vocab", 0) > 1 << 18:
            continue
        args = [fenced(a) for a in op.inputs(Rand("cpu", op.dtypes[-1]), **sizes)]
        out = op.outputs(*args)
        if out is None:
            function(*args)
        else:
            function(*args, out=fenced(out.contiguous()))
