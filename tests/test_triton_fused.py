"""The fused plan's Triton kernels beyond what every op's cases show: many programs, ties, NaN, and the
machine code."""

import re

import pytest
import torch
from test_triton_compile import TENSOR_CORE, empty

from lab.contract import Rand
from lab.ops import norm_linear, norm_linear_argmax, norm_linear_silu_mul
from triton_kernels import offline, settings
from triton_kernels.common import recording
from triton_kernels.linear_add import linear_add as run_linear_add
from triton_kernels.norm_linear import norm_linear as run_norm_linear
from triton_kernels.norm_linear_argmax import norm_linear_argmax as run_argmax
from triton_kernels.norm_linear_silu_mul import norm_linear_silu_mul as run_silu_mul
from triton_kernels.rope_append_attention import rope_append_attention as run_attention

pytestmark = pytest.mark.usefixtures("kept_listings")
F32, F16, BF16, I32 = torch.float32, torch.float16, torch.bfloat16, torch.int32
SUM = dict(path="sum", BLOCK_N=4, BLOCK_K=128)
DOT = dict(path="dot", BLOCK_N=16, BLOCK_K=32, STAGES=1)


# Programs that take several tiles, one after the other, and programs that take one each.


@pytest.mark.parametrize(
    "chosen", [SUM, dict(SUM, per_multiprocessor=3), DOT, dict(DOT, per_multiprocessor=2)], ids=str
)
@pytest.mark.parametrize("op", [norm_linear, norm_linear_silu_mul], ids=lambda op: op.op.name)
def test_tiles_are_shared_out_without_loss(op, chosen):
    args = op.inputs(Rand("cpu", F16), batch=3, n=37, k=101)
    want, (rtol, atol) = op.reference(*args)[0], op.tolerance(op.op.bound(*args))
    out = op.outputs(*args).fill_(torch.nan)
    with settings.forced(op.op.name, chosen):
        op.op.launchers["triton"](*args, out=out)
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)


def argmax(logits_of, chosen, rows=3, n=200):
    """ids of rows whose logits are `logits_of` [rows, n]: x is the identity, and its norm's weight undoes the
    norm."""
    x, k = torch.eye(rows, 16), 16
    norm_w = torch.full((k,), (x[0] ** 2).mean().rsqrt().reciprocal().item())
    w = torch.zeros(n, k)
    w[:, :rows] = logits_of.T
    scratch, logits = norm_linear_argmax.new_scratch(rows, "cpu"), torch.full((rows, n), torch.nan)
    ids = []
    with settings.forced("norm_linear_argmax", chosen):
        for _ in range(2):  # the second launch finds the ticket as the first one left it
            out = torch.full((rows,), -7, dtype=I32)
            run_argmax(x, norm_w, 0.0, w, logits, scratch, out)
            ids.append(out.tolist())
    assert ids[0] == ids[1]
    return ids[0]


@pytest.mark.parametrize(
    "chosen",
    [
        dict(SUM, BLOCK_K=16),
        dict(SUM, BLOCK_K=16, per_multiprocessor=5),
        dict(DOT, BLOCK_K=16, per_multiprocessor=3),
    ],
    ids=str,
)
def test_argmax_over_many_programs(chosen):
    rand = torch.Generator().manual_seed(1)
    random = torch.randn(3, 200, generator=rand)
    assert argmax(random, chosen) == random.argmax(1).tolist()
    ties = torch.zeros(3, 200)
    ties[0, [31, 47, 199]] = 1.0  # in three programs
    ties[1, [9, 11]] = 1.0  # in one tile
    assert argmax(ties, chosen) == [31, 9, 0]
    assert argmax(torch.full((3, 200), -1.0), chosen) == [0, 0, 0]


@pytest.mark.parametrize(
    "chosen", [dict(SUM, BLOCK_K=16), dict(SUM, BLOCK_K=16, per_multiprocessor=5)], ids=str
)
def test_a_row_with_nan_or_infinity(chosen):
    # One row at a time: 0 * NaN would reach the others.
    for value, index, want in ((torch.nan, 150, -1), (torch.inf, 150, 150)):
        logits = torch.zeros(1, 200)
        logits[0, index] = value
        logits[0, 20] = 3.0
        x, norm_w = torch.ones(1, 1), torch.ones(1)
        scratch, out = norm_linear_argmax.new_scratch(1, "cpu"), torch.full((1,), -7, dtype=I32)
        with settings.forced("norm_linear_argmax", dict(chosen, BLOCK_K=1)):
            run_argmax(x, norm_w, 0.0, logits.T.contiguous(), torch.empty(1, 200), scratch, out)
        assert out.item() == want
    both = torch.zeros(1, 200)
    both[0, 3], both[0, 150] = torch.inf, torch.nan
    with settings.forced("norm_linear_argmax", dict(chosen, BLOCK_K=1)):
        run_argmax(x, norm_w, 0.0, both.T.contiguous(), torch.empty(1, 200), scratch, out)
    assert out.item() == -1


# The machine code.


def attention(t, rows, n, k):
    q, key, v = t(rows, 48 * 128).unflatten(1, (48, 128)).split((32, 8, 8), dim=1)
    ints, cache, norm = (lambda *s: empty(*s, dtype=I32)), t(64, 8, 16, 128), t(128)
    run_attention(
        q,
        key,
        v,
        norm,
        norm,
        1e-6,
        ints(rows),
        empty(4096, 128, dtype=F32),
        cache,
        cache,
        ints(rows, 64),
        0.1,
        16,
        empty(rows, 8, 16, 4, 130, dtype=F32),
        ints(rows, 8),
        t(rows, 32, 128),
    )


RUNS = {
    "norm_linear": (
        lambda t, rows, n, k: run_norm_linear(t(rows, k), t(k), 1e-5, t(n, k), None, t(rows, n)),
        6144,
        4096,
    ),
    "norm_linear_silu_mul": (
        lambda t, rows, n, k: run_silu_mul(t(rows, k), t(k), 1e-5, t(2 * n, k), t(rows, n)),
        14336,
        4096,
    ),
    "linear_add": (lambda t, rows, n, k: run_linear_add(t(rows, k), t(n, k), None, t(rows, n)), 4096, 14336),
    "norm_linear_argmax": (
        lambda t, rows, n, k: run_argmax(
            t(rows, k),
            t(k),
            1e-5,
            t(n, k),
            empty(rows, n, dtype=F32),
            empty(rows, norm_linear_argmax.SCRATCH, dtype=I32),
            empty(rows, dtype=I32),
        ),
        128256,
        4096,
    ),
    "rope_append_attention": (attention, 0, 0),
}


def launched(name, rows, dtype, architecture):
    run, n, k = RUNS[name]
    with recording(architecture) as launches:
        run(lambda *s: empty(*s, dtype=dtype), rows, n, k)
    return launches


def compiled(name, rows, dtype, architecture):
    *before, product = launched(name, rows, dtype, architecture)
    normed = name.startswith("norm_") and product.kernel.fn.__name__.endswith("_dot_kernel")
    assert [one.kernel.fn.__name__ for one in before] == ["rmsnorm_kernel"] * normed
    code = offline.compile(product, architecture)
    usage = offline.usage(code)
    assert usage["local"] == usage["stack"] == 0, f"spills: {usage}"
    return product.meta, offline.sass(code)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_weights_are_on_their_way_before_the_wait_and_activations_are_not(name, rows):
    """sm_90: ACQBULK is the wait for the kernel before, PREEXIT lets the next one start."""
    meta, code = compiled(name, rows, BF16, "sm_90")
    assert meta["launch_pdl"] and meta["PDL"]
    before, wait, after = code.partition("ACQBULK")
    assert wait and "ACQBULK" not in after and "PREEXIT" not in before and after.count("PREEXIT") == 1
    assert "STG" not in before, "something is written before the wait"
    streamed = r"\bLDG\.E\.EF\S*128|CCTL\.E\.PF2"  # weights (evict_first); the cache, brought to L2
    assert re.search(streamed, before), "no weights are asked for before the wait"
    assert re.search(r"\bLDG\S*", after), "no activations are read after it"
    # x and the norm's weight are both kept (evict_last). Only the weight, a row's worth, may come before.
    early, late = (len(re.findall(r"\bLDG\.E\.EL", part)) for part in (before, after))
    assert early <= late and (early == 0 or name.startswith("norm")), f"{early} loads before, {late} after"
    if rows == 64:
        assert re.search(r"\bLDGSTS\S*128", after) and re.search(TENSOR_CORE, after)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rows", [1, 64])
def test_sm_80_has_no_dependent_launch(name, rows):
    for launch in launched(name, rows, BF16, "sm_80"):
        assert "launch_pdl" not in launch.meta and not launch.meta.get("PDL")


@pytest.mark.parametrize(
    "name, rows",
    [
        ("norm_linear", 64),
        ("norm_linear_silu_mul", 1),
        ("linear_add", 64),
        ("norm_linear_argmax", 1),
        ("rope_append_attention", 64),
    ],
)
def test_compiles_for_sm_80(name, rows):
    _, code = compiled(name, rows, BF16, "sm_80")
    assert "ACQBULK" not in code and re.search(r"\bLDG\S*128", code)


@pytest.mark.parametrize("name", RUNS)
def test_float32_stays_off_the_tensor_cores(name):
    """At 64 rows, which go through them in the other dtypes."""
    assert not re.search(TENSOR_CORE, compiled(name, 64, F32, "sm_90")[1])
