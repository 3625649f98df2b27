"""The Triton kernels with packed weights, beyond what every op's cases show: every code of every format,
programs of other shapes than the interpreter's, and the machine code."""

import re

import pytest
import torch
import triton
import triton.language as tl
from test_triton_compile import empty

from lab.contract import Rand
from lab.formats import FORMATS, PackedMatrix, q4_k, q6_k
from lab.ops import linear, linear_add, norm_linear, norm_linear_argmax, norm_linear_silu_mul
from triton_kernels import offline, settings
from triton_kernels.common import launch, recording, set_trace, take_trace
from triton_kernels.core.packed_rows import first_lines
from triton_kernels.core.packed_splits import sum_splits_kernel
from triton_kernels.embedding import embedding
from triton_kernels.linear import linear as run_linear
from triton_kernels.linear_add import linear_add as linear_add_kernel

F32, F16, BF16, I32 = torch.float32, torch.float16, torch.bfloat16, torch.int32
K_QUANTS = ("q4_k", "q6_k")
PRODUCTS = (linear, linear_add, norm_linear, norm_linear_silu_mul, norm_linear_argmax)


def every_code(name):
    """A matrix whose rows have every code in every place of a segment, with other scales in each row."""
    f = FORMATS[name]
    usable = [c for c in range(1 << f.bits) if not (name.startswith("fp8") and c & 127 == 127)]  # are NaN
    rows = torch.tensor([[usable[(i + j) % len(usable)] for j in range(256)] for i in range(len(usable))])
    generator = torch.Generator().manual_seed(3)
    shape = len(rows), f.pieces(256), f.items
    scales = torch.rand(*shape, generator=generator)
    if name == "mxfp4":
        # Every exponent whose products with the codes float32 can hold, the subnormal ones included.
        count = scales.numel()
        scales = (torch.arange(count) * 251 // count + 1).reshape(scales.shape)
        scales[0] = 0
    elif name == "q4_k":
        d = torch.randn(*shape[:2], 2, generator=generator).half()
        scales = q4_k.pieces(d, *torch.randint(0, 64, (2, *shape[:2], 8), generator=generator).byte())
    elif name == "q6_k":
        d = torch.randn(*shape[:2], 1, generator=generator).half()
        integers = torch.randint(-128, 128, (*shape[:2], 16), generator=generator)
        scales = q6_k.pieces(d, integers.to(torch.int8))
    elif f.second == "zero":
        scales[:, :, 1] = torch.arange(scales[:, :, 1].numel()).reshape(scales.shape[:2]) % 17
    return f.from_codes(rows.to(torch.uint8), scales.to(f.scale_dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_unpacked_exactly(name):
    table = every_code(name)
    out = torch.full(table.shape, torch.nan)
    embedding(torch.arange(table.rows, dtype=I32), table, out)
    assert torch.equal(out, table.double().float())  # at most the last step is rounded


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products_multiply_every_code_exactly(name, dtype):
    """x picks out one column at a time, so a sum has one term: its code, zero and scale must be exact."""
    table = every_code(name)
    for first in (0, 64, 192):
        x = torch.zeros(64, 256, dtype=dtype)
        x[torch.arange(64), first + torch.arange(64)] = 1
        y = torch.full((64, table.rows), torch.nan)
        run_linear(x, table, None, y)
        torch.testing.assert_close(
            y.double(), table.double()[:, first : first + 64].T, rtol=torch.finfo(F32).eps, atol=0
        )


def check_with(chosen, op, args):
    """Launches a product with these settings, and compares what it wrote with the reference."""
    bound = op.op.bound(*args)
    with settings.forced(op.op.name, chosen):
        out = op.op.outputs(*args)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        op.op.launchers["triton"](*args, out=out)
    if op is norm_linear_argmax:
        assert op.verify(out, bound) is None
        return
    got = args[2] if op is linear_add else out
    rtol, atol = op.tolerance(op.op.bound(*before))
    torch.testing.assert_close(got.double(), op.reference(*before)[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "chosen",
    [dict(BLOCK_N=16, SEGMENTS=2, STAGES=1), dict(BLOCK_N=16, SEGMENTS=1, STAGES=1)],
    ids=["warps divide k", "warps divide rows"],
)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.op.name)
def test_tiles_are_shared_out_without_loss(op, name, chosen):
    """As on a GPU: several programs, several steps along k, the last ones of each not full."""
    check_with(chosen, op, op.inputs(Rand("cpu", F16), batch=3, n=37, k=424, format=name))


@pytest.mark.parametrize("splits", (2, 3, 8), ids=lambda n: f"{n} shares of k")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("op", (linear, linear_add, norm_linear), ids=lambda op: op.op.name)
def test_programs_divide_k_without_loss(op, name, splits):
    """Shares of k are not equal, and with 8 of them some have none: 424 columns are 4 or 7 segments."""
    args = op.inputs(Rand("cpu", F16), batch=19, n=37, k=424, bias=True, format=name)
    chosen = dict(BLOCK_N=16, SEGMENTS=1, STAGES=1, num_warps=4, SPLITS=splits)
    set_trace(True)
    try:
        check_with(chosen, op, args)
        assert take_trace()[-2:] == ["packed_split_kernel", "sum_splits_kernel"]
    finally:
        set_trace(False)


@triton.jit
def first_lines_kernel(
    row, at, n, k, BITS: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, LINES: tl.constexpr
):
    i = tl.arange(0, ROWS)
    rows = tl.load(row + i)
    lines = first_lines(rows, rows < n, k, BITS=BITS, SEGMENTS=SEGMENTS)
    tl.store(at + i[:, None] * LINES + tl.arange(0, LINES)[None, :], lines)


@pytest.mark.parametrize("name, k", [("int4-g128", 4096), ("int8", 4096), ("int8", 320), ("int4-g32", 128)])
def test_what_is_asked_for_ahead_is_what_the_first_steps_read(name, k):
    """Lines of 128 bytes: every segment of the first four steps is in one of them, and no other is."""
    f, n, segments = FORMATS[name], 64, 4
    rows = torch.cat([torch.arange(16, 24), torch.arange(40, 48)]).to(I32)  # as of gate and up
    at = torch.full((16, 2 * segments), -1)
    launch(
        first_lines_kernel, (1,), rows, at, n, k, BITS=f.bits, ROWS=16, SEGMENTS=segments, LINES=2 * segments
    )
    asked = torch.zeros(f.codes_shape(n, k), dtype=torch.uint8)
    asked.view(-1, 128)[at.flatten() * 4 // 128] = 1
    wanted = torch.zeros_like(asked)
    wanted[[2, 5], : 4 * segments] = 1
    assert bool((at * 4 % 128 == 0).all()) and torch.equal(asked, wanted)


def packed(name, n, k):
    """A matrix of which only the sizes are known."""
    f = FORMATS[name]
    codes = torch.empty(f.codes_shape(n, k), dtype=torch.uint8, device="meta")
    scales = torch.empty(f.scales_shape(n, k), dtype=f.scale_dtype, device="meta")
    return PackedMatrix(name, n, k, codes, scales)


def compiled(architecture, run):
    """The last product that `run` launches, and its machine code: no register spills, and there is enough
    shared memory."""
    with recording(architecture) as launches:
        run()
    (*_, product) = (one for one in launches if one.kernel is not sum_splits_kernel)
    code = offline.compile(product, architecture)
    usage = offline.usage(code)
    assert usage["local"] == usage["stack"] == 0, f"spills: {usage}"
    assert usage["shared"] <= {"sm_90": 227, "sm_80": 163}[architecture] << 10
    return code, offline.sass(code)


def check_product(code, sass, bits=4):
    """16-byte copies run ahead of the arithmetic on tensor cores, a warp's ones of weights being the segments
    of 8 rows, and no unpacked weights are stored. (The upper two of 6 bits may be copied in 8 bytes.)"""
    copies = re.findall(r"\bLDGSTS\S*", sass)
    wide = ".128" if bits != 6 else (".128", ".64")
    assert copies and all(copy.endswith(wide) for copy in copies) and re.search(r"\bHG?MMA\b", sass)
    layouts = re.findall(r"async_copy_global_to_local .*!tt.ptr<i32>, (#\w+)>", code.asm["ttgir"])
    assert layouts
    for layout in set(layouts):
        threads = re.search(rf"^{layout} = .*", code.asm["ttgir"], re.M)[0]
        if bits == 6 and "threadsPerWarp = [1, 16, 2]" in threads:
            continue  # of the upper two bits
        assert "sizePerThread = [1, 1, 4], threadsPerWarp = [1, 8, 4]" in threads  # segment, row, word
    # Registers are stored only to add up the warps' sums: float32. Unpacked weights are bfloat16.
    stored = re.findall(r"ttg\.local_alloc %.*bf16|ttg\.local_store.*bf16", code.asm["ttgir"])
    assert not stored, "unpacked weights pass through shared memory"


@pytest.mark.parametrize(
    "architecture, name, rows, n",
    [
        *(("sm_90", name, 1, 28672) for name in FORMATS),
        *(
            ("sm_90", name, 64, 28672)
            for name in ("int4-g128", "int4-g32-min", "int8", "fp8-g128", *K_QUANTS)
        ),
        *(("sm_90", name, 16, 28672) for name in ("int4-g32-min", *K_QUANTS)),
        *(("sm_90", "int4-g128", rows, n) for rows, n in ((1, 4096), (16, 28672), (16, 4096), (64, 4096))),
        *(("sm_80", name, rows, 28672) for name in ("int4-g128", "fp8") for rows in (1, 64)),
    ],
)
def test_codes_go_from_wide_loads_to_tensor_cores(architecture, name, rows, n):
    x, y = empty(rows, 4096, dtype=BF16), empty(rows, n, dtype=BF16)
    found = compiled(architecture, lambda: run_linear(x, packed(name, n, 4096), None, y))
    check_product(*found, FORMATS[name].bits)


def test_programs_that_divide_k_are_compiled_as_the_others():
    x, y, w = empty(64, 14336, dtype=BF16), empty(64, 4096, dtype=BF16), packed("int4-g128", 4096, 14336)
    chosen = dict(BLOCK_N=128, SEGMENTS=1, STAGES=4, num_warps=8, SPLITS=4)
    with settings.forced("linear", chosen), recording("sm_90") as launches:
        run_linear(x, w, None, y)
    product, total = launches
    assert (product.grid, total.grid) == ((32, 4), (256,))
    usages = [offline.usage(offline.compile(launch, "sm_90")) for launch in launches]
    assert [usage["local"] + usage["stack"] for usage in usages] == [0, 0]


@pytest.mark.parametrize("name", ("int4-g128", "fp8"))
def test_settings_that_divide_k_are_for_more_than_16_rows(name):
    """linear_add was tuned at 64 rows, whose settings serve fewer rows, too, where they say nothing of k."""
    w = packed(name, 4096, 14336)
    for rows, kernels in (16, 1), (17, 2):
        with recording("sm_90") as launches:
            linear_add_kernel(empty(rows, 14336, dtype=BF16), w, None, empty(rows, 4096, dtype=BF16))
        assert len(launches) == kernels


@pytest.mark.parametrize("rows", (1, 64))
@pytest.mark.parametrize("op", PRODUCTS[1:], ids=lambda op: op.op.name)
def test_the_fused_products_do_not_wait_before_they_ask_for_weights(op, rows):
    k, n = 4096, 4096
    x, norm_w = empty(rows, k, dtype=BF16), empty(k, dtype=BF16)
    logits, scratch = empty(rows, n, dtype=F32), norm_linear_argmax.new_scratch(rows, "meta")
    w = packed("int4-g32-min", 2 * n if op is norm_linear_silu_mul else n, k)
    args = {
        linear_add: (x, w, empty(rows, n, dtype=BF16)),
        norm_linear: (x, norm_w, 1e-5, w),
        norm_linear_silu_mul: (x, norm_w, 1e-5, w),
        norm_linear_argmax: (x, norm_w, 1e-5, w, logits, scratch),
    }[op]
    out = op.op.outputs(*args)
    code, sass = compiled("sm_90", lambda: op.op.launchers["triton"](*args, out=out))
    check_product(code, sass)
    ptx = code.asm["ptx"]
    assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait") < ptx.index("cp.async")


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_reads_codes_16_bytes_at_a_time(name):
    table, ids, out = packed(name, 128256, 4096), empty(4, dtype=I32), empty(4, 4096, dtype=BF16)
    _, sass = compiled("sm_90", lambda: embedding(ids, table, out))
    assert re.search(r"\bLDG\S*\.128", sass)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_stays_off_the_tensor_cores(name):
    """They would round x to TF32."""
    x, y = empty(4, 4096, dtype=F32), empty(4, 4096, dtype=F32)
    _, sass = compiled("sm_90", lambda: run_linear(x, packed(name, 4096, 4096), None, y))
    assert not re.search(r"\bHG?MMA\b.*TF32", sass)
