"""The weight formats: every code, in the layout and in the kernels of each language."""

import pytest
import torch

from lab.dispatch import select
from lab.errors import LabError
from lab.formats import FORMATS, PackedMatrix, q4_k, q6_k
from lab.formats.format import pack, unpack

EVERY = sorted(FORMATS)
# Refused where they are read, so no kernel must know them.
NAN_CODES = dict.fromkeys(("fp8", "fp8-g128"), (0x7F, 0xFF))


def every_code(name: str, rows: int = 24, k: int = 300) -> PackedMatrix:
    """A matrix that holds every code of a format, with scales of every size that its numbers may have."""
    f = FORMATS[name]
    codes = torch.arange(rows * k).view(rows, k) % (1 << f.bits)
    for code in NAN_CODES.get(name, ()):
        codes[codes == code] = 0
    pieces = f.pieces(k)
    generator = torch.Generator().manual_seed(1)

    def integers(first, end, *shape):
        return torch.randint(first, end, (rows, pieces, *shape), generator=generator)

    if f.scale_dtype == torch.uint8:
        scales = integers(110, 140, 1).to(torch.uint8)
    elif name == "q4_k":
        d = torch.randn(rows, pieces, 2, generator=generator).half()
        scales = q4_k.pieces(d, integers(0, 64, 8).byte(), integers(0, 64, 8).byte())
    elif name == "q6_k":
        d = torch.randn(rows, pieces, 1, generator=generator).half()
        scales = q6_k.pieces(d, integers(-128, 128, 16).to(torch.int8))
    else:
        scales = torch.rand(rows, pieces, f.items, generator=generator) + 0.01
        if f.second == "zero":
            scales[:, :, 1] = integers(0, 17)
        scales = scales.to(f.scale_dtype)
    return f.from_codes(codes.to(torch.uint8), scales)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packing_loses_nothing(bits):
    codes = torch.randint(0, 1 << bits, (16, 3 * 128), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_a_code_lies(bits):
    """As the docstring of lab/formats/format.py says: code j of run i of lane t."""
    columns = 512 // bits
    for column in range(columns):
        one = torch.zeros(1, columns, dtype=torch.uint8)
        one[0, column] = (1 << bits) - 1
        words = pack(one, bits).view(torch.int32)[0].tolist()
        run, half, t, e = column // 32, column % 32 // 16, column % 16 // 4, column % 4
        j = 4 * half + e
        if bits == 4:
            word, shift = 4 * t + run, 16 * (j % 2) + 4 * (j // 2)
        else:
            word, shift = 4 * t + 2 * run + half, 8 * (0, 2, 1, 3)[e]
        found = {i: w & 0xFFFFFFFF for i, w in enumerate(words) if w}
        assert found == {word: ((1 << bits) - 1) << shift}


def test_where_the_bits_of_a_six_bit_code_lie():
    """The lower four as those of 4 bits, the upper two in the words behind them."""
    for column in range(128):
        one = torch.zeros(1, 128, dtype=torch.uint8)
        one[0, column] = 63
        packed = pack(one, 6)
        assert torch.equal(packed[:, :64], pack(one & 15, 4))
        run, half, t, e = column // 32, column % 32 // 16, column % 16 // 4, column % 4
        p, h = (4 * half + e) // 2, e % 2
        high = packed[:, 64:].contiguous().view(torch.int32)[0].tolist()
        want = 3 << (16 * h + 8 * (run % 2) + 2 * p)
        assert {i: w & 0xFFFFFFFF for i, w in enumerate(high) if w} == {2 * t + run // 2: want}


@pytest.mark.parametrize("name", EVERY)
def test_rounding_is_to_the_nearest_number(name):
    """No other code of the same scale is nearer to a weight."""
    f = FORMATS[name]
    w = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    packed = f.quantise(w)
    assert packed.nbytes == f.bytes_of(5, 300)
    error = (packed.double() - w).abs()
    every = torch.arange(1 << f.bits, dtype=torch.uint8)
    numbers = f.decode(every)
    width = f.group or 300
    group = torch.arange(300) // width
    scales = packed.scale_values()[:, group]
    scale = scales[:, :, :1]
    best = numbers - (scales[:, :, 1:] if f.second == "zero" else 0)
    best = best * scale + (scales[:, :, 1:] if f.second == "minimum" else 0)
    nearest = (best - w[:, :, None]).abs().nan_to_num(torch.inf).amin(-1)
    # The rounded scale decides; the float32 quotient may be a tie's other side.
    assert bool((error <= nearest + 1e-6 * scale[..., 0]).all())


@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize("name", EVERY)
def test_every_code_is_worth_the_same_everywhere(name, backend):
    table = every_code(name)
    ids = torch.arange(table.rows, dtype=torch.int32)
    got = select(backend, "cpu").embedding(ids, table, torch.float32).double()
    # Exact, but for the addition of a minimum in float32.
    slack = 2.0**-22 if FORMATS[name].second == "minimum" else 2.0**-24
    assert torch.allclose(got, table.double(), rtol=slack, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", EVERY)
def test_tensor_cores_get_every_code_exactly(name, dtype, gpu_shapes):
    """Rows of the identity times the matrix are its columns, so nothing is rounded but sums of one number."""
    w, ops = every_code(name), select("cuda", "cpu")
    for first in range(0, w.k, 64):
        some = min(64, w.k - first)
        x = torch.zeros(some, w.k, dtype=dtype)
        x[torch.arange(some), first + torch.arange(some)] = 1
        got = ops.linear(x, w, None, torch.float32).double()
        assert torch.allclose(got, w.double().T[first : first + some], rtol=2.0**-22, atol=0)


FLOAT16_SCALES = [f for f in FORMATS.values() if f.name not in ("int8", "fp8", "fp8-g128", "mxfp4")]


@pytest.mark.parametrize("f", FLOAT16_SCALES, ids=lambda f: f.name)
def test_weights_that_are_too_small_for_float16_scales_are_refused(f):
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    with pytest.raises(
        LabError, match="too small for its scales: the largest is .*choose a format"
    ) as caught:
        f.quantise(w * 1e-8)
    assert "\n" not in str(caught.value)
    assert not f.quantise(torch.zeros(16, 256)).double().any()
    for size in (1e-2, 1e-3):  # a few groups or a row that is lost say nothing about the others
        some = w * size
        some[3], some[5, :64] = some[3] * 1e-7, 0
        assert (f.quantise(some).double() - some).norm() < 0.15 * some.norm()


@pytest.mark.parametrize("name", ("int8", "fp8", "fp8-g128", "mxfp4"))
def test_small_weights_in_formats_with_wide_scales(name):
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)) * 1e-30
    got = FORMATS[name].quantise(w).double()
    assert (got - w).norm() < 0.15 * w.double().norm()


@pytest.mark.parametrize("scale", (1e-9, 1e6, 1.0001))
def test_scales_that_a_format_cannot_hold_are_refused(scale):
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.full((4, 2, 1), scale)
    with pytest.raises(LabError, match="cannot hold scales in torch.float32 exactly in torch.float16"):
        FORMATS["int4-g32"].from_codes(codes, scales)
    held = FORMATS["int4-g32"].from_codes(codes, torch.full((4, 2, 1), 0.25))
    assert (held.double() == -8 * 0.25).all()


def test_what_does_not_belong_together_is_refused():
    f = FORMATS["int4-g32"]
    with pytest.raises(LabError, match="do not fit codes"):
        f.from_codes(torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 3, 1))
    with pytest.raises(LabError, match="NaN or inf"):
        f.quantise(torch.full((2, 64), torch.nan))
    with pytest.raises(LabError, match="too large for its scale"):
        f.quantise(torch.full((2, 64), 1e7))
    ops, w = select("torch", "cpu"), f.quantise(torch.randn(8, 64))
    with pytest.raises(LabError, match="must agree in k"):
        ops.linear(torch.randn(1, 128), w)
    w.scales = w.scales[:, :, :, :2].contiguous()
    with pytest.raises(LabError, match="scales of int4-g32"):
        ops.linear(torch.randn(1, 64), w)
