"""The dispatcher: who is chosen, what is refused, what is counted, and what a call costs."""

import json
import statistics
import time
import timeit

import pytest
import torch

from lab.dispatch import Trace, select
from lab.errors import LabError
from lab.ops import BASIC, find


def test_backend_and_overrides_choose_each_op():
    ops = select("torch", "cpu", ["rope=triton"])
    assert ops.chosen["rope"] == "triton" and set(ops.chosen.values()) == {"torch", "triton"}
    assert select("torch", "cpu", {"rope": "triton"}).chosen == ops.chosen


def test_environment_chooses_when_the_call_does_not(monkeypatch):
    monkeypatch.setenv("LAB_BACKEND", "torch")
    monkeypatch.setenv("LAB_OVERRIDE", "rope=triton,sample=triton")
    assert select(None, "cpu").chosen == {
        **select("torch", "cpu", {"x": "y"} and {"rope": "torch"}).chosen,
        "rope": "triton",
        "sample": "triton",
    }
    assert select("triton", "cpu", {"rope": "torch"}).chosen["rope"] == "torch"  # the call goes first


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: select("cuad", "cpu"), "unknown backend 'cuad': did you mean cuda?"),
        (lambda: select("torch", "cpu", ["roep=triton"]), "unknown op 'roep': did you mean rope?"),
        (lambda: select("torch", "cpu", ["rope=fortran"]), "unknown backend 'fortran'"),
        (lambda: select("torch", "cpu", ["rope"]), "write OP=BACKEND"),
        (lambda: find("gemm"), "unknown op 'gemm'"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(call, said):
    with pytest.raises(LabError, match=said.replace("?", r"\?")):
        call()


def test_no_backend_is_an_error_not_a_default(monkeypatch):
    monkeypatch.delenv("LAB_BACKEND", raising=False)
    with pytest.raises(LabError, match="no backend chosen"):
        select(None, "cpu")


def test_a_missing_build_is_an_error_that_says_what_to_do(monkeypatch):
    import lab.backends
    import lab.extension

    def missing(name):
        raise ImportError("no such module")

    monkeypatch.setattr(lab.extension, "import_module", missing)
    lab.backends.load.cache_clear()
    try:
        with pytest.raises(LabError, match="lab._host is not built.*make setup"):
            select("torch", "cpu", ["rope=cuda"])
    finally:
        lab.backends.load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_device_cuda_without_a_gpu_is_refused():
    with pytest.raises(LabError, match="no usable NVIDIA GPU"):
        select("torch", "cuda")


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_trace_counts_what_ran(backend, rand, device):
    trace = Trace()
    ops = select(backend, device, {"silu_mul": "torch"}, trace)
    x, w = rand()(2, 64), rand()(64)
    for _ in range(3):
        ops.rmsnorm(x, w, 1e-5)
    ops.silu_mul(x)
    kernel = "torch:rmsnorm" if backend == "torch" else "rmsnorm_kernel"
    assert trace.rows() == [
        {"op": "rmsnorm", "backend": backend, "kernel": kernel, "calls": 3},
        {"op": "silu_mul", "backend": "torch", "kernel": "torch:silu_mul", "calls": 1},
    ]


def spoiled(x, w):
    yield "transposed", (x.T, w), {}
    yield "another dtype", (x, w.half()), {}
    yield "columns that differ", (x, w[:32].contiguous()), {}
    yield "misaligned", (torch.zeros(129)[1:].view(2, 64), w), {}
    yield "three rows out", (x, w), {"out": torch.empty(3, 64)}
    yield "out in another dtype", (x, w), {"out": torch.empty(2, 64, dtype=torch.float16)}
    yield "strided out", (x, w), {"out": torch.empty(2, 128)[:, ::2]}


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_shapes_dtypes_and_strides_that_a_kernel_does_not_take(backend):
    ops = select(backend, "cpu", {"rope": backend})
    for what, (x, w), options in spoiled(torch.ones(2, 64), torch.ones(64)):
        with pytest.raises(LabError, match="^rmsnorm: "):
            ops.rmsnorm(x, w, 1e-5, **options)
            pytest.fail(what)


def test_limits_are_refused_by_name(rand):
    ops = select("torch", "cpu", {"rope": "torch"})
    r = rand()
    refused = [
        (lambda: ops.linear(r(65, 8), r(8, 8)), "1 to 64 rows"),
        (
            lambda: ops.rope(r(1, 2, 80), r(1, 1, 80), torch.zeros(1, dtype=torch.int32), r(4, 80)),
            "head_dim 80",
        ),
        (lambda: ops.embedding(torch.zeros(1), r(4, 8)), "ids must be int32"),
        (lambda: ops.sample(r(1, 9), torch.zeros(1, dtype=torch.int32), top_p=0.0), "top_p 0.0"),
        (
            lambda: ops.sample(r(1, 9), torch.zeros(1, dtype=torch.int32), temperature=-1.0),
            "temperature -1.0",
        ),
        (
            lambda: ops.decode_attention(
                r(1, 3, 64),
                r(2, 2, 16, 64),
                r(2, 2, 16, 64),
                torch.zeros(1, 1, dtype=torch.int32),
                torch.ones(1, dtype=torch.int32),
                1.0,
            ),
            "3 query heads",
        ),
        (
            lambda: ops.kv_append(
                r(1, 2, 64),
                r(1, 2, 64),
                r(2, 2, 24, 64),
                r(2, 2, 24, 64),
                torch.zeros(1, 1, dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
            ),
            "page_size 24",
        ),
    ]
    for call, said in refused:
        with pytest.raises(LabError, match=said):
            call()


TABLE = {
    "rope": [
        {"batch": 1, "context": None, "backend": "triton"},
        {"batch": 16, "context": None, "backend": "cuda"},
    ],
    "decode_attention": [
        {"batch": 1, "context": 1024, "backend": "cuda"},
        {"batch": 1, "context": 8192, "backend": "triton"},
    ],
}


def test_a_dispatch_table_gives_each_op_its_nearest_cell(tmp_path):
    from lab.dispatch_table import from_table, read_table

    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    table = read_table(str(path))
    assert from_table(table, 1, 2000) == {"rope": "triton", "decode_attention": "cuda"}
    assert from_table(table, 12, 7000) == {"rope": "cuda", "decode_attention": "triton"}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is no dispatch table"),
        ("[]", "is no dispatch table"),
        ('{"rope": [{"batch": 1}]}', "is no dispatch table"),
        ('{"gemm": []}', "unknown op 'gemm'"),
        ('{"rope": [{"batch": 1, "context": null, "backend": "vulkan"}]}', "unknown backend 'vulkan'"),
        ('{"rope": [{"batch": 0, "context": null, "backend": "cuda"}]}', "batch 0"),
    ],
)
def test_what_is_no_dispatch_table_is_refused(tmp_path, content, said):
    from lab.dispatch_table import read_table

    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(LabError, match=said):
        read_table(str(path))
    with pytest.raises(LabError, match="absent.json is missing"):
        read_table(str(tmp_path / "absent.json"))


class Nothing:
    """A backend that does nothing: what remains of a call is the dispatcher."""

    name = "nothing"

    def launcher(self, op):
        return lambda *args, **options: None


def test_tensors_of_another_device_are_refused():
    from lab.dispatch import bind

    call = bind(find("rmsnorm"), Nothing(), "cuda:1")
    with pytest.raises(LabError, match="these ops run on cuda:1, and the tensors are on cpu"):
        call(torch.ones(2, 64), torch.ones(64), 1e-5)


def test_a_stream_belongs_to_the_current_gpu(monkeypatch):
    """A kernel runs on the current GPU, even when it is given a stream of another one."""
    from lab.backends.cuda import stream_of

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    stream = stream_of(torch.device("cuda", 1))
    current = 1
    assert stream() == 101
    current = 0
    with pytest.raises(LabError, match=r"the current GPU is cuda:0, .* torch.cuda.device\(1\)"):
        stream()


def dispatch_us(name, args, options, rounds=100, repeats=200):
    """The least microseconds per dispatched call, without the launch; the least is what load from elsewhere
    spares."""
    from lab.dispatch import bind

    call = bind(find(name), Nothing(), "cpu")
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(rounds):
            call(*args, **options)
        best = min(best, time.thread_time() - began)
    return best / rounds * 1e6


def decode_calls():
    """One call of each op as the decoder makes it: buffers given, so nothing is allocated."""
    from lab.contract import Rand
    from lab.ops.decode_attention import Workspace

    one_row = {"kv_append": {"positions": (130,)}, "decode_attention": {"lengths": (131,)}}
    for op in BASIC:
        args = list(op.inputs(Rand("cpu", op.dtypes[0]), **{**op.cases[0].sizes, **one_row.get(op.name, {})}))
        if op.name == "decode_attention":
            q, splits = args[0], args[6]
            args.append(Workspace.empty(q.shape[0], q.shape[1], args[1].shape[1], q.shape[2], splits, "cpu"))
        out = op.outputs(*args)
        yield op.name, args, {} if out is None else {"out": out}


@pytest.mark.parametrize(
    "name, args, options", list(decode_calls()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_call_costs_ten_microseconds(name, args, options):
    """Loose, and by the pace of this core, which others may share; the average over a layer, below, is the
    claim."""
    cost = dispatch_us(name, args, options)
    assert cost < 10 * max(1.0, validation_us(torch.ones(2, 3)) / 0.58)


def validation_us(x):
    """The least microseconds of a function of the kind that validation is made of."""

    def check(a, b):
        shape = a.shape
        return (
            len(shape) == 2
            and shape == b.shape
            and a.dtype == b.dtype
            and a.get_device() == b.get_device()
            and a.is_contiguous()
            and not a.data_ptr() & 15
        )

    return min(timeit.repeat(lambda: check(x, x), number=100, repeat=200)) / 100 * 1e6


def test_a_decode_step_pays_under_three_microseconds_a_call(record_property):
    """The claim is of an idle core of 2025, where validation_us is 0.58. A core that others share changes its
    pace by half
    within seconds: both are measured five times, and the median of their ratios counts."""
    layer = {"rmsnorm": 2, "linear": 4, "rope": 1, "kv_append": 1, "decode_attention": 1, "silu_mul": 1}
    x, calls, means = torch.ones(2, 3), list(decode_calls()), []
    for _ in range(5):
        costs = {name: dispatch_us(name, args, options) for name, args, options in calls}
        mean = sum(costs[name] * times for name, times in layer.items()) / sum(layer.values())
        slowdown = max(1.0, validation_us(x) / 0.58)
        means.append(mean / slowdown)
        print(
            {name: round(us, 2) for name, us in costs.items()}, f"mean {mean:.2f} us, slowdown {slowdown:.2f}"
        )
    record_property("dispatch_us", means)
    assert statistics.median(means) < 3, means
