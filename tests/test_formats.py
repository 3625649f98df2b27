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


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_refused_where_zeros_would_be_hardly_worse(name, monkeypatch):
    f = FORMATS[name]
    monkeypatch.setattr("lab.formats.format.QUANTISED_AT_ONCE", 16 * 512)  # 16 rows at once
    w = torch.randn(40, 512, generator=torch.Generator().manual_seed(3))
    refused = 0
    for exponent in range(0, -150, -7):
        small = w * 2.0**exponent
        try:
            lost = f.quantise(small).double() - small
            # Of the sum of squares: the worst format loses a hundredth with scales as they should be.
            assert lost.square().sum() < small.double().square().sum() / 2, exponent
            assert not refused
        except LabError as error:
            assert (
                f"format {name}: the weights, {float(small.abs().max()):.1g} at most, are too small"
                in str(error)
            )
            refused += 1
    assert refused
    assert not f.quantise(torch.zeros(40, 512)).double().any()
    # Only the whole matrix counts, not the rows that are rounded at once: the last 20 may become zeros.
    w[20:] *= 1e-30
    assert (f.quantise(w).double() - w).square().sum() < 0.02 * w.double().square().sum()


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-min", "int8"])
def test_scales_that_their_dtype_cannot_hold_are_refused(name):
    f = FORMATS[name]
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    scales = torch.full((8, f.pieces(64), f.items), 0.25, dtype=torch.float64)
    assert float(f.from_codes(codes, scales).scales.max()) == 0.25
    scales[3, 0, 0] = 1e300
    with pytest.raises(LabError, match=rf"format {name}: a scale of 1e\+300 is too large for (fp16|fp32)"):
        f.from_codes(codes, scales)
    scales[3, 0, 0] = 1e-60
    with pytest.raises(LabError, match=rf"format {name}: a scale of 1e-60 is too small for (fp16|fp32)"):
        f.from_codes(codes, scales)
    scales[3, 0, 0] = 0.0
    assert float(f.from_codes(codes, scales).scale_values().min()) == 0
    with pytest.raises(LabError, match="scales must be"):
        f.from_codes(codes, scales.int())


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
