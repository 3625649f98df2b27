"""The ladder quantised_linear: linear with packed weights, whose lower rungs read rows of codes."""

from types import SimpleNamespace

import pytest
import torch

from lab import ladder, rungs
from lab.contract import Rand
from lab.errors import LabError
from lab.formats import FORMATS, row_major
from lab.harness import ladder_bench
from lab.harness.request import Request, settings_of
from lab.ops import find
from lab.records import schema
from lab.report import ladder_figures, load

NAME, LINEAR = "quantised_linear", find("linear")
INT4 = FORMATS["int4-g128"]


def all_codes(n, k):
    """A packed matrix in which every code stands in every place of a word, with scales of 11 bits."""
    codes = (torch.arange(n)[:, None] * 3 + torch.arange(k) * 5).remainder(16).to(torch.uint8)
    groups = INT4.pieces(k)
    scales = (1 + torch.arange(n * groups).reshape(n, groups, 1) / 1024).to(torch.float16)
    return codes, scales, INT4.from_codes(codes, scales)


def test_row_major_holds_the_codes_in_order_and_a_scale_for_each_group():
    codes, scales, packed = all_codes(11, 300)
    w = row_major.row_major(packed)
    assert w.shape == (11, 300) and w.codes.shape == (11, 3 * 64) and w.codes.is_contiguous()
    for row, column in ((0, 0), (0, 1), (7, 128), (8, 299), (10, 298)):
        assert w.codes[row, column // 2] >> 4 * (column % 2) & 15 == codes[row, column]
    assert (w.codes[:, 150:] == 0x88).all()  # what fills the last group stands for 0
    assert torch.equal(w.scales, scales[:, :, 0]) and w.scales.is_contiguous()


@pytest.mark.parametrize("backend", rungs.BACKENDS)
def test_every_rung_unpacks_every_code_exactly(backend):
    """x picks single columns, so that y is weights: exact, because a weight has 15 bits."""
    _, _, packed = all_codes(16, 264)
    picked = [*range(8), *range(20, 24), 127, 128, 199, 263]
    for rung in rungs.rungs(NAME):
        dtype = torch.bfloat16 if rung.number >= 6 else torch.float32
        x = torch.eye(264, dtype=dtype)[picked]
        y = ladder.bind(rung, backend)(x, packed, out_dtype=torch.float32)
        assert torch.equal(y.double(), packed.double()[:, picked].T), rung.title


@pytest.mark.parametrize(
    "name, format, said",
    [
        (NAME, None, "needs weights in int4-g128"),
        (NAME, "int4-g32", "needs weights in int4-g128"),
        ("linear", "int4-g128", "the ladder linear needs plain weights"),
    ],
)
def test_weights_of_another_format_are_refused(name, format, said):
    args = LINEAR.inputs(Rand("cpu", torch.bfloat16), batch=1, n=8, k=128, format=format)
    for rung in rungs.rungs(name):
        with pytest.raises(LabError, match=said):
            ladder.bind(rung, "cuda")(*args)


@pytest.mark.parametrize("backend", rungs.BACKENDS)
def test_what_is_timed_is_the_launch_alone(backend, monkeypatch):
    """Codes are put in rows, and memory is taken, before a rung is timed."""
    made = []
    monkeypatch.setattr(row_major, "row_major", lambda w, make=row_major.row_major: made.append(w) or make(w))
    x, w, *_ = LINEAR.inputs(Rand("cpu", torch.float32), batch=1, n=8, k=128, format="int4-g128")
    out = torch.empty(1, 8)
    start = ladder.bind(rungs.rungs(NAME)[0], backend).ready(x, w, out=out)
    assert made == [w]
    for sign in (1, -1):
        x.copy_(sign * x.abs())
        start()
        assert torch.allclose(out.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-4)
    assert made == [w]


def test_a_gpu_measures_it_at_two_batches_and_a_cpu_at_one():
    def points(device, every_batch=True):
        found = [climb.point for climb in ladder_bench.points(device, (NAME,), every_batch)]
        return [(p.op, p.batch, p.format) for p in found]

    assert points("cuda", every_batch=False) == points("cpu")  # as in `bench all`
    assert points("cuda") == [("linear", 1, "int4-g128"), ("linear", 8, "int4-g128")]
    assert points("cpu") == [("linear", 1, "int4-g128")]
    assert [rungs.name_of("linear", f) for f in (None, "int4-g128", "fp8")] == ["linear", NAME, "linear"]


def made_up(folder, us_at):
    """A run with a GPU's figures made up for the purpose. us_at: {(format, batch, rung): us}"""
    with schema.Writer(folder) as writer:
        writer.append(schema.Env("r", "before", "cuda", gpu="made up"))
        for (form, batch, number), us in us_at.items():
            rung = rungs.rungs(rungs.name_of("linear", form))[number - 1]
            config = {"rung": number, "name": rung.name, "promised": rung.promised(batch)}
            times = dict(us=us, us_p10=us, us_p90=us, n=9, gbps=1.0, of_ceiling=0.5)
            shape = {"n": 28672, "k": 4096}
            of_rung = dict(rung=number, weight_format=form, bytes=128, config=config)
            writer.append(schema.OpRow("r", "linear", "cuda", "bf16", batch, shape, **of_rung, **times))


def test_pictures_for_each_ladder_and_batch_with_the_promises_of_that_batch(tmp_path):
    form = "int4-g128"
    us_at = {(None, 1, 7): 9.0, (None, 1, 8): 9.0}
    us_at |= {(form, 1, 5): 30.0, (form, 1, 6): 25.0, (form, 8, 5): 200.0, (form, 8, 6): 50.0}
    made_up(tmp_path, us_at)
    run = load.load(tmp_path)[0]
    assert len(run.ladder) == 6 and not len(run.packed) and not len(run.op)
    figures = {figure.name: figure for figure in ladder_figures.of_run(run)}
    assert list(figures) == ["ladder-linear", f"ladder-{NAME}", f"ladder-{NAME}-b8"]
    assert "2 rungs" in figures["ladder-linear"].reading
    assert figures[f"ladder-{NAME}"].more == "Every rung gained what it promised."
    assert "6. Tensor cores gained 4.00x where 6x was promised" in figures[f"ladder-{NAME}-b8"].more


def test_explain_shows_the_ladder_by_its_name(tmp_path, capsys):
    from lab.learn import explain

    made_up(tmp_path, {("int4-g128", 1, 5): 30.0, ("int4-g128", 1, 6): 25.0, ("int4-g128", 8, 6): 50.0})
    args = SimpleNamespace(
        op=NAME,
        rungs=False,
        glossary=None,
        unfold="none",
        compiled=False,
        step=None,
        html=None,
        reports=str(tmp_path),
    )
    assert explain.main(args) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured: CUDA 25.0 us, 50% of the ceiling, 1.20 times as fast as rung 5" in shown
    assert "The op itself: cuda_src/linear.cu." in shown and "50.0 us" not in shown


def test_the_ladder_is_asked_for_by_its_name():
    """It is the name of no op."""
    settings = settings_of(Request("ops", ops=(NAME,), ladder=True, device="cpu"))
    assert settings.ladder and settings.ops == (NAME,)
