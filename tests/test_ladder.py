"""The ladders: every rung in both languages against the reference, the table against the files, and the
records."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import ladder, rungs
from lab.check import check_case
from lab.cli import main
from lab.contract import Rand
from lab.errors import LabError
from lab.formats import PackedMatrix
from lab.learn import ladder_check
from lab.ops import find
from lab.records import schema
from lab.report import ladder_figures, load

pytestmark = pytest.mark.usefixtures("kept_listings")
ROOT = Path(__file__).resolve().parent.parent
TITLE = re.compile(r"^\s*(?://|#) (\d+\. [\w ,+\-/]+):", re.M)
SOURCES = {"cuda": "cuda_src/ladder/{}.cu", "triton": "triton_kernels/ladder/{}.py"}
RUNGS = [
    pytest.param(rung, backend, id=f"{rung.ladder}-{rung.number}-{backend}")
    for rung in rungs.RUNGS
    for backend in rungs.BACKENDS
    if backend not in rung.absent and not rung.own_kernel
]


def fitting(rung, dtype):
    """Cases that the rung takes in this dtype, and those that it must refuse."""
    op = find(rung.op)
    split = {True: [], False: []}
    for c in ladder_check.cases_of(rung.ladder):
        split[rung.takes(op.bound(*op.inputs(Rand("cpu", dtype), **c.sizes)))].append(c)
    return split[True], split[False]


@pytest.mark.parametrize("rung, backend", RUNGS)
def test_rung_agrees_with_the_reference_and_refuses_the_rest(rung, backend):
    op, function = find(rung.op), ladder.bind(rung, backend)
    # bfloat16 in all cases; float32 in one, since interpreted kernels are slow. Interpreted rungs without a
    # workspace are called a second time in their first case alone.
    stateless = backend == "triton" and (rung.op != "decode_attention" or rung.number < 4)
    for dtype in (torch.bfloat16, torch.float32):
        taken, refused = fitting(rung, dtype)
        assert taken or dtype == torch.float32, "a rung that is never run"
        for c in taken if dtype == torch.bfloat16 else taken[:1]:
            calls = 2 if not stateless or (dtype == torch.bfloat16 and c is taken[0]) else 1
            assert check_case(op, function, Rand("cpu", dtype), c.sizes, calls).error is None, c.why
        for c in refused:
            with pytest.raises(LabError, match=re.escape(rung.needs)):
                function(*op.inputs(Rand("cpu", dtype), **c.sizes))


@pytest.mark.parametrize("name", rungs.NAMES)
def test_table_and_files_name_the_same_rungs(name):
    ladder_of_op = rungs.rungs(name)
    assert all(rung.ladder == name for rung in ladder_of_op)
    assert [rung.number for rung in ladder_of_op] == list(range(1, len(ladder_of_op) + 1))
    assert [rung.own_kernel for rung in ladder_of_op] == [False] * (len(ladder_of_op) - 1) + [True]
    for backend, path in SOURCES.items():
        titles = TITLE.findall((ROOT / path.format(name)).read_text())
        assert titles == [
            rung.title for rung in ladder_of_op if backend not in rung.absent and not rung.own_kernel
        ]
    for rung in ladder_of_op:
        assert rung.idea and rung.gain and all(rung.absent.values())
        assert (rung.fits is None) == (not rung.needs)


def test_the_last_rung_is_the_op_itself():
    from triton_kernels import common

    rung = rungs.rungs("linear")[-1]
    args = find("linear").inputs(Rand("cpu", torch.float32), batch=1, n=8, k=16)
    common.set_trace(True)
    try:
        ladder.bind(rung, "triton")(*args)
        assert common.take_trace() == ["linear_kernel"]
    finally:
        common.set_trace(False)


def test_what_is_not_there_is_one_line():
    with pytest.raises(LabError, match="rope has no ladder"):
        rungs.rungs("rope")
    absent = next(rung for rung in rungs.RUNGS if "triton" in rung.absent)
    with pytest.raises(LabError, match="in triton"):
        ladder.bind(absent, "triton")
    with pytest.raises(LabError, match="no ladder"):
        ladder.bind(rungs.RUNGS[0], "torch")


def test_check_runs_a_ladder(capsys):
    words = "check --ladder --op rmsnorm --backend cuda --dtype bf16 --device cpu"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert "rmsnorm 1. Naive" in shown and "(1 refused)" in shown and "0 failed" in shown
    assert main([*words.split(), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" bf16 2/2\n") == len(rungs.rungs("rmsnorm")) and "refused" not in shown


def test_a_wrong_rung_fails_the_check(capsys, monkeypatch):
    wrong = dataclasses.replace(rungs.ladder_of("rmsnorm"), triton=lambda number, a, out: out.zero_())
    monkeypatch.setitem(rungs.LADDERS, "rmsnorm", wrong)
    functions = {"triton": lambda name: ladder.bind(ladder.rung_called(name), "triton")}
    assert ladder_check.check(["rmsnorm"], functions, ["fp32"], "cpu", 0) > 0
    assert "elements are off" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_triton_rungs_compile(architecture):
    """With the loads that the rung is about: wide ones from Vectorised on, cp.async from Pipeline on.
    For sm_80 only the rungs whose instructions differ there, or that fill its smaller shared memory."""
    from lab.ops.decode_attention import Workspace
    from triton_kernels import offline
    from triton_kernels.common import recording
    from triton_kernels.ladder import decode_attention, linear, rmsnorm

    bf16 = dict(dtype=torch.bfloat16, device="meta")
    ints = dict(dtype=torch.int32, device="meta")
    cache = torch.empty(64, 8, 16, 128, **bf16)
    q, table, w = (
        torch.empty(8, 32, 128, **bf16),
        torch.empty(8, 99, **ints),
        Workspace.empty(8, 32, 8, 128, 5, "meta"),
    )
    run = {
        "linear": lambda n: linear.linear(
            n,
            torch.empty(1, 14336, **bf16),
            torch.empty(4096, 14336, **bf16),
            None,
            torch.empty(1, 4096, **bf16),
        ),
        "rmsnorm": lambda n: rmsnorm.rmsnorm(
            n,
            torch.empty(64, 8192, **bf16),
            torch.empty(8192, **bf16),
            1e-5,
            None,
            torch.empty(64, 8192, **bf16),
        ),
        "decode_attention": lambda n: decode_attention.decode_attention(
            n,
            q,
            cache,
            cache,
            table,
            torch.empty(8, **ints),
            0.1,
            5,
            w.partial,
            w.tickets,
            torch.empty_like(q),
        ),
    }
    for rung in rungs.RUNGS:
        if rung.own_kernel or "triton" in rung.absent or rung.ladder not in run:
            continue
        if architecture == "sm_80" and rung.name not in ("Pipeline", "Tensor cores", "Group"):
            continue
        with recording(architecture) as launches:
            run[rung.op](rung.number)
        assert len(launches) == (2 if rung.op == "decode_attention" and rung.number >= 4 else 1)
        code = offline.compile(launches[0], architecture)
        assert offline.usage(code)["local"] == 0, rung.title
        shown, names = offline.sass(code), [r.name for r in rungs.rungs(rung.op) if r.number <= rung.number]
        assert bool(re.search(r"\b(LDG|LDGSTS)\S*\.128", shown)) == ("Vectorised" in names), rung.title
        if "Pipeline" in names:
            assert "LDGSTS" in shown, rung.title
        if rung.name in ("Tensor cores", "Group"):
            assert re.search(r"\bHG?MMA\b", shown), rung.title


def test_quantised_triton_rungs_compile():
    """With the instructions that the rung is about."""
    from lab.formats import FORMATS
    from lab.rungs.quantised_linear import prepare
    from triton_kernels import offline
    from triton_kernels.common import recording
    from triton_kernels.ladder.quantised_linear import linear

    n, k, format = 4096, 4096, FORMATS["int4-g128"]
    bf16 = dict(dtype=torch.bfloat16, device="meta")
    x, y = torch.empty(1, k, **bf16), torch.empty(1, n, **bf16)
    codes = torch.empty(format.codes_shape(n, k), dtype=torch.uint8, device="meta")
    scales = torch.empty(format.scales_shape(n, k), dtype=torch.float16, device="meta")
    packed = PackedMatrix("int4-g128", n, k, codes, scales)
    for rung in rungs.rungs("quantised_linear")[:-1]:
        other, memory = prepare(rung.number, SimpleNamespace(x=x, w=packed))
        with recording("sm_90") as launches:
            linear(rung.number, x, other.get("w", packed), None, y, **memory)
        assert len(launches) == (2 if rung.number == 1 else 1)
        code = offline.compile(launches[-1], "sm_90")
        assert offline.usage(code)["local"] == 0, rung.title
        shown = offline.sass(code)
        assert (len(re.findall(r"\bI2FP?\b", shown)) > 6) == (rung.number == 2), rung.title
        # Mask and exponent in one LOP3: (a & b) | c.
        assert (len(re.findall(r"LOP3\.LUT .*, 0x(?:f8|ea),", shown)) > 6) == (rung.number > 2), rung.title
        assert bool(re.search(r"\bLDG\.E\.EF\.128|LDGSTS\S*\.128", shown)) == (rung.number >= 4), rung.title
        assert bool(re.search(r"\bHG?MMA\b", shown)) == (rung.number == 6), rung.title


def test_bench_records_every_rung_and_the_report_shows_them(tmp_path, capsys):
    assert main(["bench", "ops", "rmsnorm", "--ladder", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = schema.read(tmp_path).of_kind("op")
    assert {(r.backend, r.rung) for r in rows} == {
        (b, r.number) for r in rungs.rungs("rmsnorm") for b in rungs.BACKENDS if b not in r.absent
    }
    assert all(r.us > 0 and r.emulated and r.of_ceiling is None for r in rows)
    assert {(r.config["rung"], r.config["name"]) for r in rows} == {
        (r.number, r.name) for r in rungs.rungs("rmsnorm")
    }
    run = load.load(tmp_path)[0]
    assert not len(run.op) and len(run.ladder) == len(rows)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page/figures/ladder-rmsnorm.svg").stat().st_size > 1000
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("The rungs of rmsnorm side by side") == 1 and "The rungs of linear" not in page
    assert page.count("No such rung in Triton: ") == sum(len(rung.absent) for rung in rungs.rungs("rmsnorm"))
    assert main(["bench", "model", "--ladder", "--out", str(tmp_path)]) == 2
    assert "--ladder measures ops" in capsys.readouterr().err


def test_a_rung_that_fell_short_is_named(tmp_path):
    """A run with a GPU's figures made up for the purpose: rung 2 keeps its promise, rung 3 does not."""

    def row(number, us):
        return schema.OpRow(
            "r",
            "linear",
            "cuda",
            "bf16",
            1,
            {"n": 8, "k": 8},
            us=us,
            us_p10=us,
            us_p90=us,
            n=9,
            bytes=128,
            rung=number,
            gbps=1.0,
            of_ceiling=1.0 / us,
            note=f"Because {number}.",
            config={"rung": number, "name": f"Name {number}", "promised": 2.0},
        )

    with schema.Writer(tmp_path) as writer:
        writer.append(schema.Env("r", "before", "cuda", gpu="made up"), row(1, 8.0), row(2, 4.0), row(3, 3.0))
    (figure,) = ladder_figures.of_run(load.load(tmp_path)[0])
    assert "3. Name 3 gained 1.33x where 2x was promised. Because 3." in figure.more
    assert "2. Name 2 gained" not in figure.more
    assert "Name 1 to Name 3 is 2.67 times faster" in figure.reading
