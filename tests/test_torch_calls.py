"""The torch backend's small ops: few kernels (each costs about 2 us in a CUDA graph), right for idle rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.contract import Rand
from lab.dispatch import select
from lab.ops import find, kv_append

HEADS = dict(q_heads=9, kv_heads=3, head_dim=64)
UNCOUNTED = tuple("empty view slice select unsqueeze split unbind expand alias".split())  # no kernel


class Calls(TorchDispatchMode):
    """The names of the torch ops called that launch a kernel. Fails at one that no CUDA graph can hold."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").split(".")[0]
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select"), name
        for index in args[1] if name in ("index", "index_put_") else ():
            assert index is None or index.dtype == torch.int64, (
                "a boolean mask, or one more kernel to convert it"
            )
        self.names += [] if name.strip("_").startswith(UNCOUNTED) else [name]
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name, sizes, most",
    [
        ("embedding", dict(batch=1, vocab=300, hidden=64), 4),
        ("embedding", dict(batch=8, vocab=300, hidden=64), 4),
        ("rope", dict(batch=1, **HEADS), 10),
        ("rope", dict(batch=4, idle=(1,), **HEADS), 10),
        ("kv_append", dict(positions=(15,), **HEADS), 13),
        ("kv_append", dict(positions=(15, -1, 3), **HEADS), 19),
    ],
)
def test_a_small_op_makes_few_calls(name, sizes, most, dtype):
    args = find(name).inputs(Rand("cpu", dtype), **sizes)
    out = find(name).outputs(*args)
    function = getattr(select("torch", "cpu"), name)
    with Calls() as calls:
        function(*args, **({} if out is None else {"out": out}))
    assert 0 < len(calls.names) <= most, calls.names


@pytest.mark.parametrize("page_size", kv_append.PAGE_SIZES)
@pytest.mark.parametrize("seed", range(8))
def test_idle_rows_in_any_place_append_nothing(seed, page_size):
    """Tables of idle rows name pages of live ones, or pages that there are not."""
    chooser = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 3 * page_size, (6,), generator=chooser)
    positions[torch.rand(6, generator=chooser) < 0.5] = -1
    args = kv_append.inputs(Rand("cpu", torch.bfloat16, seed), positions.tolist(), 2, 2, 64, page_size)
    table = args[4]
    if seed % 2:
        table[positions < 0] = torch.tensor([1 << 30, -7, 99]).int()[: table.shape[1]]
    want = kv_append.reference(*args)
    select("torch", "cpu").kv_append(*args)
    for got, exact in zip(args[2:4], want, strict=True):
        assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rope_leaves_idle_rows_as_they_are(bad):
    q, k, positions, table = find("rope").inputs(Rand("cpu", torch.bfloat16), batch=3, idle=(1,), **HEADS)
    q[1, :, ::7], k[1, :, 5:], q[1, 0, 3] = bad, bad, -0.0
    before = [x[1].clone() for x in (q, k)]
    select("torch", "cpu").rope(q, k, positions, table)
    for x, old in zip((q, k), before, strict=True):
        torch.testing.assert_close(x[1], old, rtol=0, atol=0, equal_nan=True)
        assert x[[0, 2]].isfinite().all()
    assert q[1, 0, 3].signbit()
