"""The judge of `lab try`: each planted cheat (tests/cheats) is caught and named, honest kernels are not,
whatever happens in the race costs one row, and a time above the ceiling is no win."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import cli
from lab.arena import Arena
from lab.backends import load
from lab.check import values_of
from lab.contract import Rand
from lab.harness import shapes
from lab.judge import child, race, results
from lab.judge.kernel_file import build
from lab.judge.precision import ErrorsByWidth
from lab.judge.race import RacedFile
from lab.judge.verdict import Judge
from lab.learn import own_kernel
from lab.ops import find
from lab.records import compare, schema
from lab.worker import MOST_DEATHS, Worker
from triton_kernels.silu_mul import silu_mul

CHEATS = Path(__file__).parent / "cheats"
ROOT = Path(__file__).parent.parent
# (file, dtype, what its refusal is called, more words for `lab try`)
CAUGHT = (
    ("idle_when_known", "fp32", "no kernel", ()),
    ("old_inputs", "fp32", "remembered result", ()),
    ("half", "fp32", "unwritten output", ()),
    ("overrun", "fp32", "out of bounds", ()),
    ("spoils_input", "fp32", "changed input", ()),
    ("thread", "fp32", "late work", ()),
    ("patches_timer", "fp32", "patched functions", ()),
    ("works_ahead", "fp32", "patched functions", ()),
    ("not_repeatable", "fp32", "not repeatable", ()),
    ("other_kernel", "fp32", "other kernels", ()),
    ("no_kernel", "fp32", "no kernel", ()),
    ("exits", "fp32", "process ended", ()),
    ("hangs", "fp32", "time limit", ()),
    ("hoards", "fp32", "memory limit", ("--memory", "0.5")),
    ("cuts_digits", "bf16", "biased rounding", ()),
    ("rounds_products", "bf16", "low precision", ()),
    ("half_sums", "fp16", "low precision", ()),
)
OF_LINEAR_ADD = {"cuts_digits", "rounds_products", "half_sums"}  # the others are of silu_mul


# These read or write their tensors on the host. With tensors on a GPU that ends their process.
OF_THE_HOST = {f"{name}.cu" for name in ("no_kernel", "not_repeatable", "old_inputs", "overrun", "thread")}
OF_THE_HOST |= {"overrun.py", "spoils_input.cu", "works_ahead.cu"}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.judge])]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("suffix", [".py", ".cu"])
@pytest.mark.parametrize("name, dtype, kind, words", CAUGHT, ids=[name for name, *_ in CAUGHT])
def test_a_cheat_is_caught_by_its_name(name, dtype, kind, words, suffix, on, limited_calls, capsys):
    if name == "hangs":
        limited_calls(2)
    op = "linear_add" if name in OF_LINEAR_ADD else "silu_mul"
    path = CHEATS / f"{name}{suffix}"
    if on == "cuda":
        words = ("--memory", "8") if name == "hoards" else words  # a CUDA context takes some, too
        kind = "process ended" if path.name in OF_THE_HOST else kind
    assert cli.main(["try", str(path), "--op", op, "--device", on, "--dtype", dtype, *words]) == 1
    said = capsys.readouterr().out
    assert f": {kind}: " in said and "right in every case" not in said, said
    assert all(line.isprintable() for line in said.splitlines())


def test_every_cheat_stands_in_both_languages():
    files = {path.name for path in CHEATS.iterdir() if path.suffix != ".h"}
    assert files == {f"{name}{suffix}" for name, *_ in CAUGHT for suffix in (".py", ".cu")}


def test_a_process_that_ends_after_a_wrong_answer_is_named(tmp_path, capsys):
    """Seen on an H100: the thread of thread.cu crashes there once the call has returned, and this was called
    a wrong result."""
    text = (CHEATS / "thread.cu").read_text()
    late = "std::memset(as<char>(a.y), 0, bytes);"
    assert late in text
    include = text.replace('"silu_mul.cu"', f'"{ROOT / "cuda_src/silu_mul.cu"}"')
    path = tmp_path / "crashes.cu"
    path.write_text(include.replace(late, "std::memset(static_cast<char*>(nullptr) + 8, 0, bytes);"))
    assert cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu"]) == 1  # in all dtypes
    said = capsys.readouterr().out
    ended = ": process ended: after the call had returned, the kernel's process was ended by SIG"
    assert said.count(ended) == MOST_DEATHS and "not run: its process has ended" in said, said


def test_on_a_gpu_kernels_of_torch_are_not_the_files(monkeypatch):
    """Seen on an H100: a file that computes with torch passed there, for its call launches kernels."""
    events = [("void at::native::vectorized_elementwise_kernel<4>", 0, 1)]
    monkeypatch.setattr(child, "device_events", lambda run: (run(), events)[1])
    watched = object.__new__(child.Watched)
    watched.device = torch.device("cuda")
    watched.backend = load("triton", torch.device("cpu"))
    x, y = torch.randn(2, 8), torch.empty(2, 4)
    assert watched.launched(lambda: torch.relu(x)) == [events[0][0]] and watched.own == []
    assert watched.launched(lambda: silu_mul(x, y)) == [events[0][0]] and watched.own == ["silu_mul_kernel"]
    judge = Judge(find("silu_mul"), SimpleNamespace(file=None), 0)
    reply = {"launched": {events[0][0]: 2}, "own": False}
    judge.remote = SimpleNamespace(reply=reply, late=False, new_threads=0)
    refusal = judge.refusal(SimpleNamespace(kind=None, error=None), None, None, [], later=False)
    assert refusal.kind == "no kernel" and "the GPU ran 2 x void at::native" in refusal.seen
    reply["own"] = True
    assert judge.refusal(SimpleNamespace(kind=None, error=None), None, None, [], later=False) is None


def test_memory_that_changes_after_the_call_is_noticed_where_the_kernel_ran():
    """On a GPU the parent does not see the memory that a thread still writes."""
    memory = torch.zeros(4)
    child._last.update(memory=memory, at_return=memory.clone())
    try:
        assert child.written_since(None) is False
        memory[1] = 1.0
        assert child.written_since(None) is True
    finally:
        child._last.clear()
    assert child.written_since(None) is False  # no call yet


# Kernels of this repository as files of their own, and variants of them.
VARIANTS = {
    "float64.py": (
        "triton_kernels/silu_mul.py",
        "out = g / (1.0 + tl.exp(-g)) * u",
        "out = g.to(tl.float64) / (1.0 + tl.exp(-g.to(tl.float64))) * u",
    ),
    "small_blocks.py": ("triton_kernels/silu_mul.py", "block=1 << 14", "block=64"),
    "one_element.cu": ("cuda_src/silu_mul.cu", "by_width<T>(", "by_one<T>("),
    "more_threads.cu": ("cuda_src/silu_mul.cu", "dim3(128)", "dim3(64)"),
}
BY_ONE = """
template <typename T, typename F>
static void by_one(F&& f, int) { f(std::integral_constant<int, 1>{}); }
"""
HONEST = [
    *((f"{folder}/{op}{suffix}", op) for folder, suffix in (("triton_kernels", ".py"), ("cuda_src", ".cu"))
      for op in ("silu_mul", "rmsnorm", "rope", "embedding", "kv_append")),
    *((name, "silu_mul") for name in VARIANTS),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name, op", HONEST, ids=[name for name, _ in HONEST])
def test_an_honest_kernel_is_judged_honest(name, op, on, tmp_path, capsys):
    path = ROOT / name
    if name in VARIANTS:
        source, old, new = VARIANTS[name]
        text = (ROOT / source).read_text()
        assert old in text
        text = text.replace(old, new)
        if "by_one" in new:
            text = text.replace("using namespace lab;", "using namespace lab;" + BY_ONE)
        if name == "more_threads.cu":
            text = text.replace("a.cols / N), 128)", "a.cols / N), 64)")
        path = tmp_path / name
        path.write_text(text)
    words = ["--dtype", "fp16", "--check-only"]
    assert cli.main(["try", str(path), "--op", op, "--device", on, *words]) == 0, capsys.readouterr()
    assert "right in every case" in capsys.readouterr().out


# ---- precision ---------------------------------------------------------------------------------------------


def errors_of(got, want, shared=0.0):
    errors = ErrorsByWidth()
    errors.add(got, want, torch.finfo(got.dtype).eps, 1e-6, shared=shared)
    return errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_tell_one_rounding_from_two_and_from_none(dtype):
    want = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    once = want.to(dtype)
    assert errors_of(once, want).refusal() is None
    step = torch.exp2(torch.floor(torch.log2(want.abs()))) * torch.finfo(dtype).eps
    noisy = want + step / 12**0.5 * torch.randn(4096, generator=torch.Generator().manual_seed(2))
    assert errors_of(noisy.to(dtype), want).refusal().kind == "low precision"
    cut = (torch.trunc(want / step) * step).to(dtype)
    assert errors_of(cut, want).refusal().kind == "biased rounding"
    assert errors_of(noisy[:40].to(dtype), want[:40]).refusal() is None  # too few to say


def test_a_rounding_that_the_contract_lets_elements_share_is_no_bias():
    want = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared = 2.0**-8
    shifted = (want * (1 - 0.8 * shared)).bfloat16()
    assert errors_of(shifted, want).refusal().kind == "biased rounding"
    assert errors_of(shifted, want, shared).refusal() is None
    assert errors_of((want * (1 - 2 * shared)).bfloat16(), want, shared).refusal() is not None


@pytest.mark.parametrize("seed", [1, 3, 762443199562809010])
def test_rounding_a_weight_times_its_scale_in_int8_is_no_bias(seed):
    """These seeds gave biases of 0.26, 0.46 and 0.56 for the repository's own kernel, in its contract's case
    of large scores: on an H200 `lab try` refused a copy of it."""
    op = find("decode_attention")
    found = [c for c in op.cases if c.sizes.get("sharp") and c.sizes.get("kv_dtype") == "int8"]
    assert len(found) == 1
    path = str(ROOT / "triton_kernels/decode_attention.py")
    spec = {"module": "lab.judge.child", "file": path, "op": op.name, "device": "cpu", "built": None}
    with Worker({**spec, "what": path}, 60, 1 << 34) as worker:
        refusal, used = Judge(op, worker, seed).case("bf16", found[0])
    assert refusal is None and used <= 1


def test_copied_values_do_not_hide_errors():
    want = torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cut = torch.trunc(want * 256) / 256
    copied = torch.ones(1 << 16, dtype=torch.float64)
    got = torch.cat([cut, copied]).half()
    assert errors_of(got, torch.cat([want, copied])).refusal() is not None


# ---- the race ----------------------------------------------------------------------------------------------


def raced(path, tmp_path, monkeypatch, batch="1", seconds=60):
    """The rows of a race on the CPU, where only the path is worth something: `lab try` itself does not race
    there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op, out = find("silu_mul"), tmp_path / "out"
    args = SimpleNamespace(file=path, out=str(out), model="smollm2-135m", batch=batch, context="16")
    request = dataclasses.replace(own_kernel.race_of(op, args, ["fp32"]), backends=("torch",))
    built = str(build(path, op, "cpu", tmp_path / "b", 300)) if path.suffix == ".cu" else None
    spec = {"module": "lab.judge.child", "file": str(path), "op": op.name, "device": "cpu", "built": built}
    with Worker({**spec, "what": path.name}, seconds, 1 << 30) as worker:
        worker.start()
        own_kernel.race(path.name, RacedFile(op, worker), request)
    rows = [r for r in schema.read(out).rows if r.kind == "op"]
    return [r for r in rows if r.backend == path.name], [r for r in rows if r.backend == "torch"]


@pytest.mark.parametrize("suffix", [".py", ".cu"])
def test_an_honest_file_is_raced(suffix, tmp_path, monkeypatch):
    path = ROOT / ("triton_kernels/silu_mul.py" if suffix == ".py" else "cuda_src/silu_mul.cu")
    (mine,), (other,) = raced(path, tmp_path, monkeypatch)
    assert mine.error is None and mine.us > 0 and "torch" in mine.verdict
    assert other.us > 0 and path.name in other.verdict


def test_the_others_are_measured_on_buffers_as_the_file_has_them():
    for name in ("silu_mul", "linear", "decode_attention", "rmsnorm"):
        op = find(name)
        (point, *_) = shapes.points(("smollm2-135m",), (2,), (64,), [name])
        args, _ = shapes.arguments(op, point, Rand("cpu", torch.float32, 1), 4)
        (mine, others), (out, _) = RacedFile.laid_out(op, args, "cpu", 2)
        want = op.outputs(*args)
        assert (out is None) == (want is None) and (out is None or out.shape == want.shape)
        tensors = [(t, m, o) for t, m, o in zip(args, mine, others) if isinstance(t, torch.Tensor)]
        assert len(mine) == len(args) and tensors
        first_of_mine, first_of_others = tensors[0][1].data_ptr(), tensors[0][2].data_ptr()
        assert first_of_mine != first_of_others
        arena = Arena(values_of(op, args))
        places = [arena.region_of(n).start for n, t in zip(op.names, args) if isinstance(t, torch.Tensor)]
        for at, (_, m, o) in zip(places, tensors, strict=True):
            assert m.data_ptr() - first_of_mine == o.data_ptr() - first_of_others == at - places[0]
        assert all(torch.equal(t, m) and t.stride() == m.stride() for t, m, _ in tensors)


START = """
from triton_kernels.silu_mul import silu_mul as honest

CALLS = []


def silu_mul(gate_up, y):
    CALLS.append(1)
    import ctypes, os, time, torch
"""
# In a race of 3 buffer sets the first 7 calls come before the first replay that is timed.
RACE_CHEATS = {
    "no kernel": """
    if len(CALLS) <= 3:
        honest(gate_up, y)
    else:
        gate, up = gate_up.float().chunk(2, dim=-1)
        y.copy_(torch.nn.functional.silu(gate) * up)
""",
    "empty graph": """
    if len(CALLS) <= 4:
        honest(gate_up, y)
""",
    "other kernels": """
    honest(gate_up, y)
    if len(CALLS) > 5:
        honest(gate_up, y)
""",
    "unwritten output": """
    kernel[(1,)](gate_up, y, 768 if len(CALLS) > 7 else 1536, 1536, BLOCK=2048)
""",
    "remembered result": """
    seen = SEEN.setdefault(y.data_ptr(), gate_up.clone())
    honest(seen if len(CALLS) > 7 else gate_up, y)
""",
    "out of bounds": """
    honest(gate_up, y)
    if len(CALLS) > 7:
        ctypes.c_ubyte.from_address(y.data_ptr() + y.nbytes).value ^= 1
""",
    "process ended": """
    honest(gate_up, y)
    if len(CALLS) > 8:
        os.kill(os.getpid(), 11)
""",
    "time limit": """
    while len(CALLS) > 8:
        pass
    honest(gate_up, y)
""",
    "patched functions": """
    honest(gate_up, y)
    if len(CALLS) > 8:
        time.perf_counter = lambda: 0.0
""",
    "error": """
    if len(CALLS) > 8:
        raise ValueError("planted")
    honest(gate_up, y)
""",
    "not repeatable": """
    honest(gate_up, y)
    if len(CALLS) > 7:
        y.view(torch.int32)[0] ^= len(CALLS) // 3 & 1
""",
    "forged times": """
    honest(gate_up, y)


    import gc
    for found in gc.get_objects():  # what the judge holds is no function of its modules
        if type(found).__name__ == "Replays" and "replay" not in vars(found):
            found.replay = lambda seed, real=found.replay: real(seed) / 1000
""",
}
KERNEL = """import triton
import triton.language as tl

SEEN = {}


@triton.jit
def kernel(gate_up, y, n, cols, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    g = tl.load(gate_up + i, mask=i < n, other=0.0)
    u = tl.load(gate_up + cols + i, mask=i < n, other=0.0)
    tl.store(y + i, g / (1 + tl.exp(-g)) * u, mask=i < n)


"""


@pytest.mark.parametrize("kind", RACE_CHEATS)
def test_a_cheat_in_the_race_costs_its_row_alone(kind, limited_calls, tmp_path, monkeypatch):
    if kind == "time limit":
        limited_calls(3)
    path = tmp_path / "cheat.py"
    path.write_text(KERNEL + START + RACE_CHEATS[kind])
    (mine,), (other,) = raced(path, tmp_path, monkeypatch)
    assert mine.error.startswith(f"{kind}: "), mine.error
    assert mine.us is None and other.us > 0 and not other.verdict
    (line,) = results.verdicts([mine], "cheat.py")
    assert "failed: " in line and "faster" not in line


def test_a_held_up_burst_hides_no_forged_time(monkeypatch):
    now, held_up = [0.0], iter([0, 0.04, 0, 0, 0, 0.02])  # seconds, on a machine that does other things, too
    asked = []

    def ask(what, replays):
        asked.append(replays)
        now[0] += replays * 0.001 + next(held_up)

    monkeypatch.setattr(race.time, "perf_counter", lambda: now[0])
    timed = SimpleNamespace(ask=ask)
    assert race.RaceTimed.burst_us(timed, 30, tries=3) == pytest.approx(1000) and asked == [1] * 3 + [31] * 3


def test_where_another_program_uses_the_device_no_file_is_accused(tmp_path, monkeypatch):
    """Seen on an H100 that two other programs used: an honest kernel reported 380 us for 523."""
    path = tmp_path / "cheat.py"
    path.write_text(KERNEL + START + RACE_CHEATS["forged times"])
    monkeypatch.setattr(race, "disturbed", lambda device, us, count: True)
    (mine,), (other,) = raced(path, tmp_path, monkeypatch)
    assert mine.error.startswith("disturbed: ") and "run this again" in mine.error and mine.us is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (make gpu-check runs these)")
@pytest.mark.parametrize("us", [100.0, 1000.0])
def test_an_idle_device_is_not_disturbed(us):
    assert not race.disturbed("cuda", us, 20)


def test_the_next_size_gets_a_new_process(tmp_path, monkeypatch):
    """With one row of y the process dies in the race; with two the file is measured."""
    path = tmp_path / "cheat.py"
    path.write_text(
        START + "    honest(gate_up, y)\n    if y.shape[0] == 1 and len(CALLS) > 8:\n        os._exit(0)\n"
    )
    mine, others = raced(path, tmp_path, monkeypatch, batch="1,2")
    assert "process ended: in the race" in mine[0].error and mine[1].error is None and mine[1].us > 0
    assert all(other.us > 0 for other in others)


# ---- above the ceiling -------------------------------------------------------------------------------------

ROW = schema.OpRow(
    "r", "silu_mul", "mine.cu", "bf16", 1, {"cols": 1536}, us=1.4, us_p10=1.39, us_p90=1.41, n=60,
    bytes=9216, gbps=9e3, of_ceiling=1.99, flag="above the ceiling", verdict={"cuda": "faster"},
)  # fmt: skip


def test_a_time_above_the_ceiling_is_no_win():
    (line,) = results.verdicts([ROW], "mine.cu")
    assert "above the ceiling" in line and "no win" in line and "faster" not in line
    slow = dataclasses.replace(ROW, us=3.0, us_p10=2.99, us_p90=3.01, of_ceiling=0.9, flag=None)
    (pair,), _, _ = compare.match([slow], [ROW])
    assert pair.verdict == compare.AMBIGUOUS
    (pair,), _, _ = compare.match([ROW], [slow])
    assert pair.verdict == compare.AMBIGUOUS
    (pair,), _, _ = compare.match([slow], [dataclasses.replace(ROW, of_ceiling=0.95, flag=None)])
    assert pair.verdict == compare.FASTER
