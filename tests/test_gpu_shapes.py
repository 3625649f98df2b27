"""The CUDA kernels in the shapes of a GPU, on a CPU too: what CPU shapes leave out (tensor cores, warps that
share k, x staged in parts, blocks with several sets of outputs, contexts that are long enough to be
split). tests/test_ops.py runs the ops' own cases in them."""

import pytest
import torch
from test_fused import decode
from test_persistent import agree

from lab import extension
from lab.check import check_case
from lab.contract import DTYPE_CODES
from lab.dispatch import select
from lab.formats import FORMATS
from lab.formats.operand import of_random, pointers
from lab.model.sampling import Sampling
from lab.ops import find

# Sizes that the ops' own cases leave out.
SIZES = {
    "x in several parts": dict(batch=8, n=40, k=4104),
    "an uneven last part": dict(batch=3, n=33, k=7000),
    "several sets of outputs per block": dict(batch=1, n=9000, k=128),
    "wide tensor-core blocks": dict(batch=12, n=8456, k=72),
    "many blocks of warpgroups, stages used again": dict(batch=40, n=330, k=1000),
    "few blocks of warpgroups, stages used again": dict(batch=33, n=150, k=1000),
    "up to 32 rows, many blocks": dict(batch=20, n=330, k=840),
    "up to 32 rows, long rows shared by a cluster": dict(batch=17, n=100, k=8200),
}
# Of packed weights, for which linear and norm_linear_silu_mul have a kernel.
PACKED = {
    "few rows, short ones of w, many sets of outputs for a block": dict(batch=5, n=4300, k=200),
    "few rows, x in several parts": dict(batch=8, n=200, k=9300),
    "up to 16 rows, the rings turn round": dict(batch=16, n=136, k=8200),
    "the fewest rows of warpgroups": dict(batch=9, n=40, k=392),
    "rows of w in no whole blocks of 8, a part of a chunk": dict(batch=17, n=37, k=200),
    "a cluster shares k, the ring turns round": dict(batch=64, n=136, k=5000),
    "three blocks of outputs": dict(batch=23, n=704, k=256),
    "a k of no whole vectors": dict(batch=33, n=20, k=1101),
    "up to 16 rows, a cluster shares k": dict(batch=11, n=304, k=2200),
    "up to 16 rows, no cluster": dict(batch=11, n=1800, k=200),
}
LONG = {
    "a merge of several splits": dict(q_heads=8, kv_heads=2, head_dim=128, splits=4),
    "more splits than are used": dict(q_heads=3, kv_heads=3, head_dim=96, splits=16),
    "two tiles of heads": dict(q_heads=12, kv_heads=1, head_dim=64, splits=3, page_size=64),
}
STREAMS = ("linear", "linear_add", "norm_linear", "norm_linear_silu_mul", "norm_linear_argmax")


BATCHES = [why for why, sizes in SIZES.items() if sizes["batch"] > 2]


pytestmark = pytest.mark.usefixtures("gpu_shapes")


@pytest.fixture
def check(rand, device):
    def check(op, dtype, sizes):
        outcome = check_case(
            op, getattr(select("cuda", device, {op.name: "cuda"}), op.name), rand(dtype), sizes
        )
        assert outcome.error is None, outcome.error

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("why", SIZES)
@pytest.mark.parametrize("name", STREAMS)
def test_sizes_that_only_streams_notice(name, why, dtype, check):
    check(find(name), dtype, SIZES[why])


@pytest.mark.parametrize("why", BATCHES)
@pytest.mark.parametrize("name", ("linear", "linear_add", "norm_linear_silu_mul"))
def test_tensor_cores_before_hopper(name, why, check, monkeypatch):
    monkeypatch.setenv("LAB_HOST_SHAPES", "sm_80")
    check(find(name), torch.bfloat16, SIZES[why])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("why", PACKED)
@pytest.mark.parametrize("name", ("linear", "norm_linear_silu_mul"))
def test_many_rows_of_x_and_packed_weights(name, why, format, check):
    check(find(name), torch.bfloat16, dict(PACKED[why], format=format))


@pytest.mark.parametrize("format", ("int4-g128", "fp8"))
@pytest.mark.parametrize("batch", (16, 33))
@pytest.mark.parametrize("name", ("linear", "norm_linear_silu_mul"))
def test_many_rows_of_x_in_fp16_and_packed_weights(name, batch, format, check):
    check(find(name), torch.float16, dict(batch=batch, n=136, k=1000, format=format))


@pytest.mark.parametrize(
    "multiprocessors, n, k, blocks, cluster",
    [
        (132, 4096, 1536, 16, 6),
        (132, 6144, 1024, 24, 4),
        (132, 8192, 1024, 32, 3),
        (132, 28672, 1024, 112, 1),
        (4, 136, 5000, 1, 6),
    ],
)
def test_a_cluster_shares_k_where_blocks_are_few(multiprocessors, n, k, blocks, cluster):
    """The last one: as the cases above are emulated."""
    w = of_random(torch.ones(n, k), "int4-g128")
    host = extension.load("_host")
    host.record_launches(multiprocessors, 9)
    try:
        select("cuda", "cpu", {"linear": "cuda"}).linear(torch.ones(33, k, dtype=torch.bfloat16), w)
    finally:
        tiles, launch = host.take_launches()
        host.record_launches(0)
    assert (tiles["kernel"], launch["kernel"]) == ("tile_rows_kernel", "linear_packed_kernel")
    assert (launch["grid"][0], launch["cluster"]) == (blocks * cluster, cluster)


def test_many_rows_of_x_and_packed_weights_need_room_for_tiles():
    x, y = (torch.zeros(9, columns, dtype=torch.bfloat16) for columns in (64, 8))
    w = of_random(torch.ones(8, 64), "fp8")
    with pytest.raises(ValueError, match="more than 8 rows and packed weights need `tiled`"):
        extension.load("_host").linear(
            x=x.data_ptr(),
            tiled=0,
            w=pointers(w),
            bias=0,
            y=y.data_ptr(),
            rows=9,
            n=8,
            k=64,
            dtype=DTYPE_CODES[x.dtype],
            out_dtype=DTYPE_CODES[y.dtype],
            stream=0,
        )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ("linear", "norm_linear_silu_mul"))
def test_many_rows_and_packed_weights_before_hopper(name, format, check, monkeypatch):
    monkeypatch.setenv("LAB_HOST_SHAPES", "sm_80")
    check(find(name), torch.bfloat16, dict(batch=23, n=300, k=1000, format=format))


@pytest.mark.parametrize(
    "batch, n, k", [(1, 300, 64), (3, 37, 101), (16, 1000, 64), (40, 700, 128), (64, 128, 8200)]
)
def test_argmax_leaves_its_scratch_ready(batch, n, k, rand, device):
    """One row, rows that are not aligned, narrow and wide blocks of tensor cores, a cluster that shares k."""
    op = find("norm_linear_argmax")
    run = select("cuda", device).norm_linear_argmax
    x, norm_w, eps, w, logits, scratch = op.inputs(rand(torch.bfloat16), batch, n, k)
    for _ in range(2):
        assert run(x, norm_w, eps, w, logits, scratch).tolist() == logits.argmax(1).tolist()
        assert not scratch[:, -4:].any()
    w[7] = torch.nan
    assert run(x, norm_w, eps, w, logits, scratch).tolist() == [-1] * batch
    w.zero_()
    assert run(x, norm_w, eps, w, logits, scratch).tolist() == [0] * batch


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("why", LONG)
def test_long_contexts(why, dtype, check):
    check(
        find("rope_append_attention"), dtype, dict(positions=(699, 255, -1, 256), qk_norm=True, **LONG[why])
    )
    check(find("decode_attention"), dtype, dict(lengths=(700, 256, 0, 257), **LONG[why]))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("batch", [1, 9])
def test_plans_agree(batch, sampling, device):
    assert (
        decode("qwen3", "fused", "cuda", device, batch, sampling=sampling)[0]
        == decode("qwen3", "basic", "torch", device, batch, sampling=sampling)[0]
    )


def test_the_persistent_plan_agrees(device):
    agree("qwen3", torch.bfloat16, "cuda", device)
