"""The tuner's choices, by a made-up clock; its candidates, by the compiler; the table that launchers read."""

import concurrent.futures
import concurrent.futures.process
import json
import math
import time
import types
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from lab import cli
from lab.backends import cuda
from lab.contract import Rand
from lab.errors import LabError
from lab.harness import ops_bench, shapes
from lab.inspect.call import Blank, packed
from lab.ops import find, linear, norm_linear
from lab.tune import tuned, tuner
from lab.tune.tuner import candidates
from triton_kernels import offline, settings
from triton_kernels.common import recording

GOOD = dict(regs=40, stack=0, local=0, shared=0)
POINT = shapes.Point("norm_linear", "qkv", 1, None, {"n": 3072, "k": 2048}, ("llama-3.2-1b",))


class FakeRace:
    """Microseconds by label of the first race and of the final; errors by settings' number."""

    def __init__(self, first, final=None, wrong=()):
        self.rounds, self.wrong, self.seen, self.checked = [first, final or first], wrong, [], []

    def times(self, entrants, seconds):
        self.seen.append(set(entrants))
        return {label: us for label, us in self.rounds[len(self.seen) - 1].items() if label in entrants}

    def error(self, chosen):
        self.checked.append(chosen.get("i"))
        return "zeros" if chosen.get("i") in self.wrong else None


def chosen(count):
    return [dict(i=i) for i in range(count)]


def test_the_fastest_of_the_final_wins_not_of_the_first_race():
    race = FakeRace(
        {tuner.BY_HAND: 9.0, 0: 5.0, 1: 6.0, 2: 7.0, 3: 8.0, 4: 8.5},
        {tuner.BY_HAND: 9.0, 0: 7.0, 1: 6.0, 2: 7.0, 3: 8.0},
    )
    winner, times, dropped = tuner.tune_point(race, chosen(5), [GOOD] * 5)
    assert winner == dict(i=1) and times[0] == 7.0 and not dropped
    assert race.seen[1] == {tuner.BY_HAND, 0, 1, 2, 3}  # the four fastest, and the settings by hand


def test_what_spills_does_not_compile_or_cannot_be_launched_is_not_raced():
    usages = [dict(GOOD, local=8), {"error": "no"}, GOOD, GOOD]
    race = FakeRace({tuner.BY_HAND: 9.0, 0: 1.0, 1: 1.0, 3: 5.0})  # 2 fails to launch
    winner, times, dropped = tuner.tune_point(race, chosen(4), usages)
    assert winner == dict(i=3) and race.seen[0] == {tuner.BY_HAND, 2, 3}
    assert [(c["i"], why) for c, why in dropped] == [
        (0, "spills 8 bytes a thread"),
        (1, "no"),
        (2, "cannot be launched"),
    ]


def test_a_wrong_result_never_wins():
    race = FakeRace({tuner.BY_HAND: 9.0, 0: 1.0, 1: 2.0, 2: 3.0}, wrong=(0, 1))
    winner, _, dropped = tuner.tune_point(race, chosen(3), [GOOD] * 3)
    assert (
        winner == dict(i=2)
        and race.checked == [0, 1, 2]
        and [why for _, why in dropped] == ["wrong: zeros"] * 2
    )


def test_settings_by_hand_stay_unless_beaten_by_more_than_noise(tmp_path):
    race = FakeRace({tuner.BY_HAND: 9.0, 0: 8.95})
    assert tuner.tune_point(race, chosen(1), [GOOD])[0] is None
    entry = tuner.Table(tmp_path / "t.json", "a GPU", "3.7").add(
        POINT, 2, None, {tuner.BY_HAND: 9.0, 0: 8.95}
    )
    assert entry["settings"] == {} and entry["us"] == entry["us_by_hand"] == 9.0


def future(usage=None):
    f = concurrent.futures.Future()
    if usage:
        f.set_result(usage)
    return f


def test_points_are_tuned_in_order_until_the_budget_is_spent():
    kept = []
    points = [shapes.Point("norm_linear", None, rows, None, POINT.shape) for rows in (1, 4, 16)]
    jobs = [("triton", [p], chosen(2), [future(GOOD), future(GOOD)]) for p in points[:2]]
    jobs += [("triton", points[2:], chosen(1), [future()])]

    def keep(backend, group, winner, times, dropped):
        kept.append((group[0].batch, winner))

    def race(backend, group):
        return FakeRace({tuner.BY_HAND: 9.0, 0: 5.0, 1: float(group[0].batch)})

    assert tuner.tune(jobs, race, keep, time.monotonic() + 0.3) == 2  # the third never finishes to compile
    assert kept == [(1, dict(i=1)), (4, dict(i=1))]
    assert tuner.tune(jobs, race, keep, time.monotonic() - 1) == 0 and len(kept) == 2


def test_a_compiler_that_dies_is_an_error():
    broken = concurrent.futures.Future()
    broken.set_exception(concurrent.futures.process.BrokenProcessPool())
    with pytest.raises(LabError, match="a compiler process died over norm_linear"):
        tuner.tune([("triton", [POINT], chosen(1), [broken])], FakeRace, None, time.monotonic() + 5)


@pytest.mark.parametrize(
    "op, right",
    [
        ("norm_linear", dict(path="sum", BLOCK_N=32, BLOCK_K=1024)),
        ("linear_add", dict(path="dot", BLOCK_N=64, BLOCK_K=64, STAGES=1)),
    ],
)
def test_a_race_sees_what_is_wrong(op, right):
    """Here on the interpreter. Whole rows in tiles that are too narrow for them lose their tail."""
    rig = ops_bench.make_rig(ops_bench.load_backends(["triton"], "cpu", True)[0], "cpu", None)
    point = next(p for p in shapes.points(("smollm2-135m",), (2,), (1024,), [op]))
    race = tuner.Race(rig, "triton", point, "fp32")
    race.bound.sets[0][0].fill_(torch.nan)  # what the races leave behind is not what is checked
    assert race.error(right) is None and race.error(None) is None
    if op == "norm_linear":
        assert "elements are off" in race.error(dict(right, BLOCK_K=512))


HEADS = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "page_size": 16}


@pytest.mark.parametrize("op", tuner.tunable())
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
def test_every_candidate_of_cuda_is_right(op, rows, gpu_shapes):
    """Here in the host build, which takes the GPU's shapes: tiles, splits and how the blocks walk differ."""
    rig = ops_bench.make_rig(ops_bench.load_backends(["cuda"], "cpu", True)[0], "cpu", None)
    attends = "attention" in op
    shape = (
        HEADS if attends else {"n": 83 if op == "norm_linear_argmax" else 200, "k": 4616 if rows == 1 else 72}
    )  # a ring of weights goes round there
    point = shapes.Point(op, None, rows, 700 if attends else None, shape, ("made up",))
    if attends and rows > 2:
        pytest.skip("the splits are those of two rows")
    race = tuner.Race(rig, "cuda", point, "bf16")
    for chosen in candidates("cuda", op, rows, 2, point.shape, 40) + [dict(resident=1)]:
        assert race.error(chosen) is None, chosen


def new_table(path, entries):
    """entries: (rows, settings, shape) of norm_linear, on an imaginary GPU."""
    table = tuner.Table(path, "a GPU", "3.7")
    for rows, won, shape in entries:
        point = shapes.Point("norm_linear", "qkv", rows, None, shape)
        table.add(point, 2, won, {tuner.BY_HAND: 2.0, 0: 1.0})


QKV = {"n": 3072, "k": 2048}


def launched(rows, n=3072, k=2048):
    x, w = torch.empty(rows, k, dtype=torch.float16), torch.empty(n, k, dtype=torch.float16)
    with recording("sm_90") as launches:
        norm_linear.triton(x, w[0], 1e-5, w, out=torch.empty(rows, n, dtype=torch.float16))
    return launches[-1].meta


def test_launches_read_the_table(tmp_path, monkeypatch):
    with settings.forced("norm_linear", settings.BY_HAND):
        by_hand = launched(1)
    won = dict(path="sum", BLOCK_N=8, BLOCK_K=2048, num_warps=8, per_multiprocessor=2)
    narrow = {"n": 960, "k": 576}
    new_table(
        tmp_path / "sm_90.json",
        [
            (2, won, QKV),
            (16, dict(won, path="dot", STAGES=3, BLOCK_K=64), QKV),
            (1, {}, narrow),
            (64, dict(won, path="dot", STAGES=3, BLOCK_K=64), narrow),
        ],
    )
    monkeypatch.setitem(tuned.FOLDERS, "triton", tmp_path)
    settings.forget()
    try:
        assert by_hand["BLOCK_N"] != 8
        assert (launched(1)["BLOCK_N"], launched(1)["num_warps"], launched(1)["BLOCK_B"]) == (8, 8, 1)
        assert (
            launched(2)["BLOCK_B"] == 2 and launched(3)["STAGES"] == 3
        )  # the least number of rows that holds 3
        assert launched(17)["num_warps"] != 8 and launched(1, 960, 576)["BLOCK_N"] != 8
        assert (
            launched(5, 960, 576)["BLOCK_N"] == 8 != launched(4, 960, 576)["BLOCK_N"]
        )  # 64 rows say nothing of 4
        with settings.forced("norm_linear", settings.BY_HAND):
            assert launched(1) == by_hand
        # Beside the tuned table the interpreter keeps its own settings.
        args = norm_linear.inputs(Rand("cpu", torch.float16), batch=1, n=16, k=64)
        norm_linear.triton(*args, out=norm_linear.outputs(*args))
    finally:
        monkeypatch.undo()
        settings.forget()


def test_cuda_launches_read_the_table(tmp_path, monkeypatch, gpu_shapes):
    """The host build records what it would launch on a GPU of 132 multiprocessors."""
    from lab.backends import cuda, load

    backend = load("cuda", torch.device("cpu"))
    monkeypatch.setitem(tuned.FOLDERS, "cuda", tmp_path)
    new_table(
        tuned.path_of("cuda", "sm_90"),
        [
            (1, dict(share=4, resident=1), QKV),
            (8, dict(share=1, resident=64), QKV),
            (16, dict(share=4, resident=1), {"n": 960, "k": 576}),
        ],
    )

    def grid(rows, n=3072, k=2048):
        x, w = torch.empty(rows, k, dtype=torch.float16), torch.empty(n, k, dtype=torch.float16)
        backend.extension.record_launches(132)
        try:
            norm_linear.cuda(backend.kernels, x, w[0], 1e-5, w, out=torch.empty(rows, n, dtype=torch.float16))
            return backend.extension.take_launches()[-1]["grid"][0]
        finally:
            backend.extension.record_launches(0)

    by_rule, narrow = grid(1), grid(1, 960, 576)
    backend.extension.set_settings(cuda.measured_settings("sm_90"))
    try:
        assert by_rule == 384 and grid(1) == 132 and grid(2) == grid(8) == 192
        assert grid(1, 960, 576) == narrow  # 16 rows say nothing of 1
        with backend.forced("norm_linear", {}):
            assert grid(1) == by_rule
    finally:
        backend.forget()
    assert grid(1) == by_rule
    with pytest.raises(ValueError, match="no launch setting is called warps"):
        backend.extension.force_settings("norm_linear", {"warps": 4})


def test_settings_that_divide_k_say_nothing_of_few_rows():
    entry = dict(op="linear", itemsize=2, rows=64, shape={"n": 64, "k": 256}, format="fp8")
    entry["settings"] = dict(BLOCK_N=64, SPLITS=4)
    found = [tuned.lookup([entry], "linear", 2, rows, entry["shape"], "fp8") for rows in (16, 17, 64)]
    assert found == [None, entry["settings"], entry["settings"]]


def test_the_table_is_written_so_that_it_can_be_read(tmp_path):
    path = tmp_path / "sm_90.json"
    new_table(path, [(16, dict(BLOCK_N=1), QKV), (1, dict(BLOCK_N=2), QKV)])
    assert [e["rows"] for e in tuned.read(path)] == [1, 16]
    assert len(path.read_text().splitlines()) == 4 and list(tmp_path.iterdir()) == [path]
    for bad in ("{", "[]", json.dumps({"entries": [{"op": "linear"}]})):
        path.write_text(bad)
        with pytest.raises(LabError, match="is no table of `lab tune`"):
            tuned.read(path)


POINTS = shapes.points(("smollm2-135m", "llama-3.1-8b"), (1, 4, 64), (1024,), tuner.tunable())


@pytest.mark.parametrize(
    "point", POINTS, ids=lambda p: f"{p.op}-{p.batch}-{'-'.join(map(str, tuner.key_shape(p).values()))}"
)
def test_every_shape_has_candidates_and_no_more_than_asked(point):
    found = candidates("triton", point.op, point.batch, 2, tuner.key_shape(point), 30)
    assert 10 <= len(found) <= 30 and found == candidates(
        "triton", point.op, point.batch, 2, tuner.key_shape(point), 30
    )
    assert len({json.dumps(c) for c in found}) == len(found)
    of_cuda = candidates("cuda", point.op, point.batch, 2, tuner.key_shape(point), 30)
    assert len(of_cuda) == len({json.dumps(c) for c in of_cuda}) and (len(of_cuda) > 1) == (
        point.batch <= 2 or point.batch <= 16 and point.op != "norm_linear" or "attention" in point.op
    )


@pytest.mark.parametrize(
    "op, batch",
    [
        ("norm_linear", 1),
        ("linear_add", 4),
        ("norm_linear_silu_mul", 16),
        ("linear", 1),
        ("rope_append_attention", 1),
    ],
)
def test_a_candidate_compiles_without_a_gpu(op, batch):
    point = next(p for p in shapes.points(("llama-3.2-1b",), (batch,), (1024,), [op]))
    found = candidates("triton", op, batch, 2, tuner.key_shape(point), 2)
    usage = tuner.compile_candidate(point, "bf16", "sm_90", 132, found[0])
    assert usage.get("error") is None and usage["regs"] > 16
    assert "error" in tuner.compile_candidate(point, "bf16", "sm_90", 132, dict(found[0], num_warps=3))


def test_a_candidate_is_compiled_at_each_of_its_contexts(monkeypatch):
    usages = {1024: dict(GOOD, regs=90), 8192: dict(GOOD, local=8), 32768: {"error": "too large"}}
    monkeypatch.setattr(tuner, "compile_candidate", lambda point, *_: usages[point.context])
    points = [shapes.Point("decode_attention", None, 1, context, {}) for context in usages]
    assert tuner.compile_at_all(points[:2], "bf16") == dict(GOOD, regs=90, local=8)
    assert tuner.compile_at_all(points, "bf16") == {"error": "too large"}


def test_attention_is_compiled_with_the_fewest_rows_that_an_entry_serves_too():
    """Seen on an H100: settings that won with 16 sequences spill with fewer, which have more splits."""

    def taking(rows, entries):
        """The numbers of rows that take the settings of the entry for `rows`."""
        table = [dict(entry, rows=r, settings={"tile": r}) for r in entries]
        found = {n: tuned.lookup(table, "decode_attention", 2, n, {}) for n in range(1, 65)}
        return [n for n, settings in found.items() if settings == {"tile": rows}]

    entry = {"op": "decode_attention", "itemsize": 2, "shape": {}}
    for rows, batches in ((1, [1]), (16, [16]), (16, [1, 16, 64]), (64, [64]), (64, [1, 16, 64])):
        group = shapes.points(("llama-3.1-8b",), (rows,), (1024, 8192), ["decode_attention"])
        at = tuner.served(group, batches)
        assert {p.batch for p in at} == {rows, min(taking(rows, batches))} and len(at) == len(set(at))
    linear = [shapes.Point("linear", "qkv", 16, None, {})]
    assert tuner.served(linear, [1, 16]) == linear  # its kernels know nothing of splits


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU, whose launches would meet the made-up driver"
)
@pytest.mark.parametrize("op", ["linear_add", "rope_append_attention"])
def test_a_launch_finds_what_a_compiler_process_left_in_tritons_cache(op, monkeypatch):
    class Driver:  # a GPU as far as compiling goes
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    point = next(p for p in shapes.points(["smollm2-135m"], [1], (1024,), [op]) if p.case is None)
    args, _ = shapes.arguments(find(op), point, Blank(torch.bfloat16), 132)
    with recording("sm_90") as launches:
        find(op).launchers["triton"](*args, out=find(op).outputs(*args))
    (launch,) = launches
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    launch.kernel.device_caches.clear()
    launched = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    launch.kernel.device_caches.clear()
    assert offline.compile(launch, "sm_90").hash == launched.hash


def test_compilers_are_processes_and_stop(monkeypatch):
    monkeypatch.setattr(tuner, "WORKERS", 1)
    with tuner.compilers() as pool:
        future = pool.submit(
            tuner.compile_candidate,
            POINT,
            "bf16",
            "sm_90",
            132,
            dict(path="sum", BLOCK_N=2, BLOCK_K=2048, num_warps=4),
        )
        assert future.result(120)["local"] == 0
    with pytest.raises((RuntimeError, concurrent.futures.CancelledError)):
        pool.submit(int).result(5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    assert cli.main(["tune", "norm_linear"]) == 2
    assert capsys.readouterr().err.startswith("lab: error: lab tune needs a GPU")


@pytest.fixture
def made_up_gpu(monkeypatch):
    made_up = types.SimpleNamespace(
        name="Card", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: made_up)
    monkeypatch.setattr(ops_bench, "load_backends", lambda *_: ({}, []))
    monkeypatch.setattr(ops_bench, "make_rig", lambda *_: types.SimpleNamespace())
    monkeypatch.setattr(tuner, "WORKERS", 1)


def test_a_whole_run_with_a_made_up_gpu_and_clock(made_up_gpu, tmp_path, monkeypatch, capsys):
    race = FakeRace({tuner.BY_HAND: 9.0, 0: 5.0, 1: 6.0})
    monkeypatch.setattr(race, "error", lambda chosen: None)
    monkeypatch.setattr(race, "times", lambda entrants, seconds: {l: race.rounds[0][l] for l in entrants})
    monkeypatch.setattr(tuner, "Race", lambda *_: race)
    out = tmp_path / "tuned"
    command = [
        "tune",
        "linear_add",
        "--backend",
        "triton",
        "--model",
        "smollm2-135m",
        "--batch",
        "1",
        "--tries",
        "2",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    entries = tuned.read(out / "triton/sm_90.json")
    assert [(e["shape"], e["us"], e["us_by_hand"], e["tried"], e["gpu"]) for e in entries] == [
        ({"n": 576, "k": k}, 5.0, 9.0, 2, "Card") for k in (576, 1536)
    ]
    assert entries[0]["settings"] == candidates("triton", "linear_add", 1, 2, {"n": 576, "k": 576}, 2)[0]
    assert "linear_add o batch 1 n=576 k=576: 5.0 us (by hand 9.0): path=sum" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "0 shapes tuned" in capsys.readouterr().out  # the table has them


def test_settings_that_lose_at_one_context_do_not_win():
    near = FakeRace({tuner.BY_HAND: 10.0, 0: 5.0, 1: 8.0, 2: 9.0})
    far = FakeRace({tuner.BY_HAND: 40.0, 0: 41.0, 1: 36.0})  # 2 cannot be launched there
    winner, times, _ = tuner.tune_point(tuner.Races([near, far]), chosen(3), [GOOD] * 3)
    assert winner == dict(i=1)
    assert times == {tuner.BY_HAND: pytest.approx(20.0), 0: math.inf, 1: pytest.approx(288**0.5)}
    # By hand nothing can be launched far away: near by, its time is a limit in the final, too.
    near = FakeRace({tuner.BY_HAND: 10.0, 0: 12.0, 1: 9.0})
    far = FakeRace({0: 30.0, 1: 36.0})
    assert tuner.tune_point(tuner.Races([near, far]), chosen(2), [GOOD] * 2)[0] == dict(i=1)
    wrong = FakeRace({tuner.BY_HAND: 40.0, 0: 30.0}, wrong=(0,))
    races = tuner.Races([FakeRace({tuner.BY_HAND: 10.0, 0: 5.0}), wrong])
    assert tuner.tune_point(races, chosen(1), [GOOD])[0] is None  # right at one context, wrong at the other


def test_contexts_race_together(made_up_gpu, tmp_path, monkeypatch, capsys):
    raced = []

    def race(rig, backend, point, dtype):
        raced.append((point.batch, point.context))
        return FakeRace({tuner.BY_HAND: 9.0, 0: 5.0})

    monkeypatch.setattr(tuner, "Race", race)
    command = ["tune", "decode_attention", "--backend", "triton", "--model", "llama-3.1-8b", "--tries", "1"]
    command += ["--batch", "1,64", "--context", "1024,32768", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert raced == [(1, 1024), (1, 32768), (64, 1024)]  # 64 times 32768 tokens do not fit
    entries = tuned.read(tmp_path / "triton/sm_90.json")
    assert [(e["rows"], e["context"], e["us"]) for e in entries] == [(1, [1024, 32768], 5.0), (64, 1024, 5.0)]
    assert "batch 1 q_heads=32" in capsys.readouterr().out
    assert cli.main(command) == 0 and "0 shapes tuned" in capsys.readouterr().out
    command[command.index("1024,32768")] = "1024"  # other contexts: the entry of 64 rows is of this one
    assert cli.main(command) == 0 and "1 shapes tuned" in capsys.readouterr().out
    command[command.index("1024")] = "1024,32768"
    assert cli.main([*command, "--by-token"]) == 2
    assert "--by-token compares tokens at one context" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: settings are chosen by time")
def test_a_small_run(tmp_path, capsys):
    out = tmp_path / "tuned"
    command = [
        "tune",
        "linear_add",
        "--model",
        "smollm2-135m",
        "--batch",
        "1",
        "--tries",
        "4",
        "--budget-seconds",
        "120",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    for backend in tuner.LANGUAGES:
        (entries,) = (tuned.read(path) for path in (out / backend).iterdir())
        assert len(entries) == 2 and all(e["us"] > 0 and e["us_by_hand"] > 0 for e in entries)
    assert cli.main(command) == 0
    assert "0 shapes tuned" in capsys.readouterr().out.splitlines()[-1]


def test_basic_linear_reads_its_forced_settings():
    args = linear.inputs(Rand("cpu", torch.float16), batch=1, n=64, k=2048)
    with (
        recording("sm_90") as launches,
        settings.forced("linear", dict(path="sum", BLOCK_N=8, BLOCK_K=512, num_warps=2, STAGES=1, UNROLL=4)),
    ):
        linear.triton(*args, out=linear.outputs(*args))
    assert (launches[0].meta["UNROLL"], launches[0].grid) == (4, (8,))


def test_tokens_judge_what_the_fused_plan_launches():
    points = tuner.token_points(["llama-3.2-1b", "qwen3-0.6b"], [1, 16], 1024, tuner.tunable())
    assert [(p.op, p.role) for p in points[:6]] == [
        ("norm_linear", "qkv"),
        ("rope_append_attention", None),
        ("linear_add", "o"),
        ("linear_add", "down"),
        ("norm_linear_silu_mul", "gate_up"),
        ("norm_linear_argmax", "lm_head"),
    ]
    assert [(p.models, p.batch) for p in points[::6]] == [
        (("llama-3.2-1b",), 1),
        (("llama-3.2-1b",), 16),
        (("qwen3-0.6b",), 1),
        (("qwen3-0.6b",), 16),
    ]
    with pytest.raises(
        LabError, match="--by-token tunes what the fused plan launches: not linear at context 1024"
    ):
        tuner.token_points(["llama-3.2-1b"], [1], 1024, ["linear"])
    with pytest.raises(LabError, match="at context 8192"):  # the new token would have no place
        tuner.token_points(["smollm2-135m"], [1], 8192, tuner.tunable())


def test_a_table_with_another_entry_is_what_a_token_is_timed_with(tmp_path):
    table = tuner.Table(tmp_path / "sm_90.json", "H100", "3.6.0")
    table.add(POINT, 2, dict(BLOCK_N=4), {tuner.BY_HAND: 9.0, 0: 8.0})
    assert [e["settings"] for e in table.with_entry(POINT, 2, None)] == [dict(BLOCK_N=4)]
    assert [e["settings"] for e in table.with_entry(POINT, 2, dict(BLOCK_N=2))] == [dict(BLOCK_N=2)]
    assert len(table.with_entry(POINT, 4, dict(BLOCK_N=2))) == 2  # float32 has an entry of its own
    settings.use(table.with_entry(POINT, 2, dict(path="sum", BLOCK_N=2, BLOCK_K=2048, num_warps=4)))
    try:
        with recording("sm_90") as launches:
            norm_linear.op.launchers["triton"](
                *shapes.arguments(norm_linear.op, POINT, Blank(torch.bfloat16), 132)[0],
                out=torch.empty(1, 3072, dtype=torch.bfloat16),
            )
        assert launches[-1].meta["BLOCK_N"] == 2
    finally:
        settings.forget()


def test_what_tokens_chose_says_so_and_is_not_tuned_again(tmp_path):
    table, judge = (
        tuner.Table(tmp_path / "sm_90.json", "H100", "3.6.0"),
        "whole tokens of llama-3.2-1b, batch 1, context 32",
    )
    table.add(POINT, 2, dict(BLOCK_N=4), {tuner.BY_HAND: 9.0, 0: 8.0})
    assert table.has(POINT, 2) and not table.has(POINT, 2, judge)
    kept = table.add(POINT, 2, None, {tuner.BY_HAND: 1000.0, 0: 1002.0}, judge)
    assert (
        kept["settings"] == dict(BLOCK_N=4)
        and kept["by"] == judge + ": 1000.0 to 1000.0 us"
        and kept["tried"] == 1
    )
    won = table.add(POINT, 2, dict(BLOCK_N=2), {tuner.BY_HAND: 1000.0, 0: 990.0}, judge)
    assert won["settings"] == dict(BLOCK_N=2) and won["by"] == judge + ": 1000.0 to 990.0 us"
    assert won["by"] in tuner.report("triton", POINT, won, [])
    assert tuner.Table(table.path, "H100", "3.6.0").has(POINT, 2, judge)
    assert not table.has(POINT, 2, judge[:-1])  # context 3 is not context 32
    by_hand = table.add(POINT, 2, {}, {tuner.BY_HAND: 990.0, 0: 980.0}, judge)
    assert by_hand["settings"] == {}


def test_what_defends_its_place_is_what_the_table_gives(tmp_path):
    table = tuner.Table(tmp_path / "sm_90.json", "H100", "3.6.0")
    assert table.applied(POINT, 2) == {}
    table.add(replace(POINT, batch=64), 2, dict(BLOCK_N=64), {tuner.BY_HAND: 9.0, 0: 8.0})
    assert table.applied(POINT, 2) == {}  # 64 rows say nothing about one
    table.add(replace(POINT, batch=4), 2, dict(BLOCK_N=4), {tuner.BY_HAND: 9.0, 0: 8.0})
    assert table.applied(POINT, 2) == dict(BLOCK_N=4) and table.applied(POINT, 4) == {}
    kept = table.add(POINT, 2, None, {tuner.BY_HAND: 9.0, 0: 9.1}, "whole tokens")
    assert kept["rows"] == 1 and kept["settings"] == dict(BLOCK_N=4)
    other = tuner.Table(tmp_path / "out.json", "H100", "3.6.0", start=table.path)
    assert other.entries == table.entries and not other.path.exists()


# Packed weights


def packed_point(op, rows, shape, format="int4-g128"):
    return shapes.Point(op, None, rows, None, shape, ("made up",), format=format)


def packed_launch(rows, format, n=3072, k=2048):
    x = torch.empty(rows, k, dtype=torch.float16)
    w = packed(find("linear"), (x, torch.empty(n, k, dtype=torch.float16)), format, torch.float16)[1]
    with recording("sm_90") as launches:
        find("linear").launchers["triton"](x, w, out=torch.empty(rows, n, dtype=torch.float16))
    return launches[-1].meta


def test_launches_with_packed_weights_read_entries_of_their_format(tmp_path, monkeypatch):
    won = dict(BLOCK_N=64, SEGMENTS=2, STAGES=6, num_warps=2)
    table = tuner.Table(tmp_path / "sm_90.json", "a GPU", "3.7")
    plain = shapes.Point("linear", None, 16, None, QKV)
    table.add(packed_point("linear", 16, QKV), 2, won, {tuner.BY_HAND: 2.0, 0: 1.0})
    table.add(plain, 2, dict(path="dot", BLOCK_N=32), {tuner.BY_HAND: 2.0, 0: 1.0})
    again = tuner.Table(table.path, "a GPU", "3.7")
    assert len(again.entries) == 2 and again.has(packed_point("linear", 16, QKV), 2)
    assert not again.has(packed_point("linear", 16, QKV, "fp8"), 2) and again.has(plain, 2)
    assert again.applied(packed_point("linear", 8, QKV), 2) == won and again.applied(plain, 2) != won
    monkeypatch.setitem(tuned.FOLDERS, "triton", tmp_path)
    settings.forget()
    try:
        found = packed_launch(16, "int4-g128")
        assert {name: found[name] for name in won} == won
        assert packed_launch(16, "fp8")["STAGES"] != 6 and packed_launch(16, "int4-g128", n=64)["STAGES"] != 6
        with settings.forced("linear", settings.BY_HAND):
            assert packed_launch(16, "int4-g128")["STAGES"] != 6
    finally:
        monkeypatch.undo()
        settings.forget()
    assert [entry[4] for entry in cuda.settings_of(tuned.read(table.path))] == [
        dict(path="dot", BLOCK_N=32)  # CUDA has none for packed weights
    ]


def test_settings_for_packed_weights_that_may_be_tried():
    for op in ("linear", "linear_add", "norm_linear", "norm_linear_silu_mul", "norm_linear_argmax"):
        for rows, itemsize in ((1, 2), (16, 2), (64, 2), (1, 4)):
            assert 8 <= len(candidates("triton", op, rows, itemsize, QKV, 1000, "fp8")) <= 100
        assert candidates("cuda", op, 1, 2, QKV, 1000, "fp8") == []
    assert candidates("triton", "embedding", 1, 2, QKV, 1000, "fp8") == []


@pytest.mark.parametrize("op", ["linear", "norm_linear_silu_mul"])
def test_a_candidate_for_packed_weights_compiles_and_is_right(op):
    point = packed_point(op, 3, {"n": 64, "k": 512}, "int4-g32-min")
    (first, *_) = candidates("triton", op, 3, 2, point.shape, 1000, point.format)
    usage = tuner.compile_candidate(point, "bf16", "sm_90", 132, first)
    assert usage.get("regs", 0) > 16 and not usage["local"], usage
    rig = ops_bench.make_rig(ops_bench.load_backends(["triton"], "cpu", True)[0], "cpu", None)
    race = tuner.Race(rig, "triton", point, "bf16")
    assert race.error(dict(first, BLOCK_N=16)) is None and race.error(None) is None


def test_what_cannot_be_tuned_for_packed_weights_is_said():
    def ask(*op, backends=("cuda", "triton"), formats="fp8", by_token=False):
        args = types.SimpleNamespace(op=list(op), weight_format=formats, by_token=by_token)
        return tuner.formats_of(args, list(op), list(backends))

    assert ask("linear") == ["fp8"] and ask("linear", formats=None) == []
    for words, options, says in (
        (["decode_attention"], {}, "no weights in a format"),
        (["linear"], dict(backends=["cuda"]), "in Triton alone"),
        (["linear"], dict(formats="fp9"), "unknown weight format"),
        (["linear"], dict(by_token=True), "--by-token tunes for plain weights"),
    ):
        with pytest.raises(LabError, match=says):
            ask(*words, **options)
