"""The Triton interpreter: what the stock one gets wrong on bfloat16 is right, and nothing leaks into the
process.

Rounding points are pinned with float16, which NumPy computes itself; bfloat16 against torch, bit by bit."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from lab.errors import LabError
from triton_kernels import offline
from triton_kernels.common import config, launch, recording, set_trace, take_trace
from triton_kernels.interpreter import SEMANTIC, interpreting, launches_noted
from triton_kernels.rmsnorm import rmsnorm
from triton_kernels.silu_mul import silu_mul

ROOT = pathlib.Path(__file__).parent.parent
BF16 = torch.bfloat16


@triton.jit
def cast_kernel(src, dst, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(dst + i, tl.load(src + i).to(dst.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i)
    y = tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + BLOCK + i, x - y)
    tl.store(out + 2 * BLOCK + i, x * y)
    tl.store(out + 3 * BLOCK + i, tl.where(x < y, x, y))
    tl.store(out + 4 * BLOCK + i, -x)
    tl.store(out + 5 * BLOCK + i, tl.maximum(x, y))
    tl.store(out + 6 * BLOCK + i, tl.full([BLOCK], 1.5, tl.bfloat16) * x)
    tl.store(out + 7 * BLOCK + i, tl.abs(x))


@triton.jit
def reduce_kernel(a, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    x = tl.load(a + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])
    i = tl.arange(0, ROWS)
    tl.store(out + i, tl.sum(x, axis=1))
    tl.store(out + ROWS + i, tl.max(x, axis=1).to(x.dtype))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def count_kernel(length, out, STEP: tl.constexpr):
    """Stores how many steps a range over a loaded length takes, and ~ of it as an unsigned number."""
    n = tl.load(length)
    steps = 0
    for _ in range(0, n, STEP):
        steps += 1
    tl.store(out, steps)
    tl.store(out + 1, (~n.to(tl.uint32)).to(tl.int32, bitcast=True))


@triton.jit
def overrun_kernel(src, dst, n, BLOCK: tl.constexpr, STORE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if STORE:
        tl.store(dst + i, i.to(tl.float32))
    else:
        tl.store(dst + i, tl.load(src + i), mask=i < n)


@triton.jit
def meet_kernel(counter, out, ALL: tl.constexpr):
    """Each program waits until ALL have come, and writes how many have."""
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < ALL:
        pass
    tl.store(out + tl.program_id(0), tl.load(counter))


@triton.jit
def indirect_kernel(addresses, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(tl.load(addresses).to(out.dtype) + i))


def awkward_floats():
    """Ties, carries into the exponent, the largest finite value, subnormals, infinities, NaN; 4000 random
    patterns."""
    special = torch.tensor(
        [
            0x3F808000,
            0x3F818000,
            0x3F807FFF,
            0x3F808001,
            0x3FFFFFFF,
            0x7F7FFFFF,
            0x7F7F8000,
            0x7F7F7FFF,
            0x00000001,
            0x00008000,
            0x00018000,
            0x007FFFFF,
            0x7F800000,
            0x7FC00000,
            0x7F800001,
            0,
            0x477FE000,
        ]
    )
    bits = torch.cat([special, torch.randint(0, 1 << 31, (4096 - 2 * len(special),)), special - (1 << 31)])
    return bits.to(torch.int32).view(torch.float32)


def same_bits(got, want):
    """Equal bit for bit, except that any NaN equals any NaN."""
    got, want = got.float().view(torch.int32), want.float().view(torch.int32)
    nan = want.view(torch.float32).isnan()
    return torch.equal(got.view(torch.float32).isnan(), nan) and torch.equal(got[~nan], want[~nan])


def test_cast_to_bf16_rounds_to_nearest_even():
    torch.manual_seed(0)
    x = awkward_floats()
    got = torch.empty(4096, dtype=BF16)
    launch(cast_kernel, (1,), x, got, BLOCK=4096)
    assert same_bits(got, x.to(BF16))
    assert not same_bits(
        (x.view(torch.int32) & ~0xFFFF).view(torch.float32), x.to(BF16)
    )  # truncation would fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_cast_from_bf16(dtype):
    x = torch.randn(256).mul(100).to(BF16)
    got = torch.empty(256, dtype=dtype)
    launch(cast_kernel, (1,), x, got, BLOCK=256)
    assert torch.equal(got, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_cast_of_other_types_to_bf16(dtype):
    x = (torch.randn(256) * 1000).to(dtype)
    got = torch.empty(256, dtype=BF16)
    launch(cast_kernel, (1,), x, got, BLOCK=256)
    assert torch.equal(got, x.to(BF16))


def test_bf16_arithmetic_rounds_once():
    torch.manual_seed(1)
    a, b = torch.randn(2, 512).to(BF16)
    out = torch.empty(8, 512, dtype=BF16)
    launch(arithmetic_kernel, (1,), a, b, out, BLOCK=512)
    want = torch.stack([a + b, a - b, a * b, torch.minimum(a, b), -a, torch.maximum(a, b), a * 1.5, a.abs()])
    assert torch.equal(out, want)


def test_bf16_reductions():
    torch.manual_seed(2)
    x = torch.randn(16, 64).to(BF16)
    out = torch.empty(2, 16, dtype=BF16)
    launch(reduce_kernel, (1,), x, out, ROWS=16, COLS=64)
    assert torch.equal(out[1], x.amax(1))
    torch.testing.assert_close(out[0].double(), x.double().sum(1), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32(dtype):
    torch.manual_seed(3)
    a, b = torch.randn(2, 64, 64).to(dtype)
    out = torch.empty(64, 64)
    launch(dot_kernel, (1,), a, b, out, N=64)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=64 * 8 * 2**-23)


def test_range_over_a_loaded_length_and_unsigned_not():
    length, out = torch.tensor([70], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    launch(count_kernel, (1,), length, out, STEP=32)
    assert out.tolist() == [3, ~70]


def test_rmsnorm_rounds_before_the_weight():
    torch.manual_seed(4)
    x, w, y = torch.randn(7, 200).half(), torch.randn(200).half(), torch.empty(7, 200).half()
    rmsnorm(x, w, 1e-5, None, y)
    normed = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5)
    twice, once = (normed.half().float() * w.float()).half(), (normed * w.float()).half()
    assert (y == twice).float().mean() > 0.999 > (y == once).float().mean()


def test_silu_mul_rounds_once():
    torch.manual_seed(5)
    gate_up, y = torch.randn(5, 400).half(), torch.empty(5, 200).half()
    silu_mul(gate_up, y)
    gate, up = gate_up.double().chunk(2, 1)
    once = (torch.nn.functional.silu(gate) * up).half()
    twice = (torch.nn.functional.silu(gate).half().double() * up).half()
    assert (y == once).float().mean() > 0.999 > (y == twice).float().mean()


def norm_arguments(device="cpu"):
    x = torch.randn(2, 64, device=device)
    return x, torch.ones(64, device=device), 1e-5, None, torch.empty(2, 64, device=device)


def compiled_ptx():
    with recording("sm_90") as launches:
        rmsnorm(*norm_arguments())
    return offline.compile(launches[0], "sm_90").asm["ptx"]


def test_interprets_beside_compilation():
    language = dict(vars(tl)), dict(vars(tl.core.tensor)), dict(vars(tl.math)), JITFunction.__call__
    before = compiled_ptx()
    arguments = norm_arguments()
    rmsnorm(*arguments)
    x, y = arguments[0], arguments[-1]
    torch.testing.assert_close(y, x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5))
    assert compiled_ptx() == before and "ld.global" in before
    assert language == (dict(vars(tl)), dict(vars(tl.core.tensor)), dict(vars(tl.math)), JITFunction.__call__)


@pytest.mark.parametrize("store", [False, True])
def test_an_address_outside_every_tensor_is_an_error(store):
    src, dst = torch.zeros(64), torch.zeros(64)
    language = dict(vars(tl))
    with pytest.raises(RuntimeError, match="overrun_kernel, program .*outside every tensor"):
        launch(overrun_kernel, (1,), src, dst, 64, BLOCK=1 << 20, STORE=store)
    assert dict(vars(tl)) == language  # restored after an error too


def test_programs_of_a_cooperative_launch_wait_for_each_other():
    out = torch.zeros(5, dtype=torch.int32)
    launch(meet_kernel, (5,), torch.zeros(1, dtype=torch.int32), out, ALL=5, launch_cooperative_grid=True)
    assert out.tolist() == [5] * 5
    with pytest.raises(RuntimeError, match=r"meet_kernel, program \(.*every program waits"):
        launch(meet_kernel, (5,), torch.zeros(1, dtype=torch.int32), out, ALL=6, launch_cooperative_grid=True)


def test_what_a_kernel_finds_by_address_has_to_be_named():
    values = torch.arange(4, dtype=torch.float32)
    addresses, out = torch.tensor([values.data_ptr()]), torch.empty(4)
    launch(indirect_kernel, (1,), addresses, out, BLOCK=4, reads=(values,))
    assert torch.equal(out, values)
    with pytest.raises(RuntimeError, match="outside every tensor"):
        launch(indirect_kernel, (1,), addresses, out, BLOCK=4)


def test_missing_arguments_are_named():
    with pytest.raises(TypeError, match="cast_kernel.*'dst'"):
        launch(cast_kernel, (1,), torch.zeros(4), BLOCK=4)


def test_trace_names_the_kernels_launched():
    set_trace(True)
    try:
        rmsnorm(*norm_arguments())
        silu_mul(torch.zeros(1, 8), torch.empty(1, 4))
        assert take_trace() == ["rmsnorm_kernel", "silu_mul_kernel"] and take_trace() == []
    finally:
        set_trace(False)
    rmsnorm(*norm_arguments())
    assert take_trace() == []


def test_recording_runs_nothing():
    arguments = norm_arguments()
    arguments[-1].fill_(7)
    with recording("sm_90") as launches:
        rmsnorm(*arguments)
    assert [entry.kernel.fn.__name__ for entry in launches] == ["rmsnorm_kernel"] and bool(
        (arguments[-1] == 7).all()
    )


def test_config_takes_the_nearest_lower_architecture():
    table, x = {"sm_80": 80, "sm_90": 90, "interpreter": 0}, torch.zeros(1)
    assert config(table, x) == 0
    for name, want in (("sm_80", 80), ("sm_86", 80), ("sm_89", 80), ("sm_90", 90), ("sm_120", 90)):
        with recording(name):
            assert config(table, x) == want
    with recording("sm_75"), pytest.raises(LabError, match="sm_75.*sm_80"):
        config(table, x)


def test_works_with_triton_interpret_set():
    """A user may have set the variable; triton.jit then returns other objects, and the result must be the
    same."""
    code = (
        "import torch; from triton_kernels.rmsnorm import rmsnorm; x = torch.full((2, 64), 3.0).bfloat16(); "
        "y = torch.empty_like(x); rmsnorm(x, x[0], 0.0, None, y); assert (y == 3).all(), y"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_is_made_once_keeps_the_types_apart():
    """Constants that compare equal have types of their own, and 16.0 is no size although 16 is."""
    with interpreting():
        made = [SEMANTIC.to_tensor(value).dtype for value in (True, 1, 1.0, 2**40, False, 0, 0.0)]
        assert made == [tl.int1, tl.int32, tl.float32, tl.int64, tl.int1, tl.int32, tl.float32]
        assert tl.full([16], 1.0, tl.float32).type == tl.block_type(tl.float32, [16])
        assert tl.full([16], 1.0, tl.bfloat16).type != tl.full([16], 1.0, tl.float32).type
        with pytest.raises(TypeError, match="Shape element 0 must have type"):
            tl.full([16.0], 1.0, tl.float32)
        with pytest.raises(ValueError, match="power of 2"):
            tl.full([24], 1.0, tl.float32)


def test_launches_on_a_gpu_are_noted(monkeypatch):
    """Without a GPU: what would launch is made up."""
    compiled, ran, names = object.__new__(CompiledKernel), [], []
    compiled.name = "a_kernel"
    monkeypatch.setattr(CompiledKernel, "run", property(lambda kernel: lambda *given: ran.append(given)))
    before = CompiledKernel.run

    def launch_later(grid_x):  # what CompiledKernel.__getitem__ returns looks `run` up when it is called
        return lambda: compiled.run(grid_x, 1, 1, 0)

    kept = launch_later(2)
    with launches_noted(names):
        launch_later(3)  # never called
        assert not names
        kept()
        launch_later(0)()
        assert names == ["a_kernel"] and ran == [(2, 1, 1, 0), (0, 1, 1, 0)]
    with launches_noted(None):
        kept()
    assert names == ["a_kernel"] and len(ran) == 3 and CompiledKernel.run is before


def test_triton_launches_by_the_property_that_is_noted():
    for launcher in (CompiledKernel.__getitem__, JITFunction.run):
        assert re.search(r"\b(self|kernel)\.run\(\s*grid", inspect.getsource(launcher))
    assert isinstance(CompiledKernel.run, property)
