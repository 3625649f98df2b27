"""Rungs that are judged at sizes of their own: what is measured, recorded, drawn, printed and explained."""

from types import SimpleNamespace

import pytest

from lab import rungs
from lab.harness import ladder_bench, printed
from lab.ops import find
from lab.records import schema
from lab.report import ladder_figures, load


def climbs(name):
    return ladder_bench.points("cuda", (name,), False)


def rows_of(climb, backends=("cuda", "triton")):
    """The rows that the bench would record for a Climb, without a time."""
    import torch

    from lab.harness.shapes import arguments
    from lab.inspect.call import Blank

    session = SimpleNamespace(run="r", has=lambda row: False)
    rig = SimpleNamespace(device="cuda", backends=dict.fromkeys(backends))
    args, _ = arguments(find(climb.point.op), climb.point, Blank(torch.bfloat16), 132)
    return list(ladder_bench.rows_of(session, rig, climb, "bf16", args, {}).values())


def test_every_rung_is_judged_at_one_size_beside_the_rung_that_it_changes():
    for name, ladder in rungs.LADDERS.items():
        judged = {}
        for climb in climbs(name):
            rows = rows_of(climb)
            for row in rows:
                if row.config["judged"]:
                    assert judged.setdefault((row.rung, row.backend), climb) is climb
                    lower = [
                        r.rung for r in rows if r.backend == row.backend and r.rung <= row.config["over"]
                    ]
                    assert lower or row.rung == 1 or row.backend in rungs.rungs(name)[0].absent
        assert set(judged) == {
            (rung.number, backend)
            for rung in ladder.rungs
            for backend in rungs.BACKENDS
            if backend not in rung.absent
        }
    assert all(not climb.judged for climb in ladder_bench.points("cpu", (), True))


def test_sizes_where_rungs_of_linear_matter():
    at = {n: climb.point for climb in climbs("linear") for n in climb.judged}
    assert at[8].batch == 8, "tensor cores share w among rows of x"
    assert at[7].shape["n"] < 4096 / 4, "split-K is for narrow matrices"
    narrow = next(climb for climb in climbs("linear") if 7 in climb.judged)
    assert {row.rung for row in rows_of(narrow)} == {5, 6, 7}
    tall = next(climb for climb in climbs("linear") if 3 in climb.judged)
    assert {row.backend for row in rows_of(tall)} == {"cuda"}, "Triton has neither rung"


@pytest.fixture
def run(tmp_path):
    """A made-up run: rung 2 loses in the whole ladder and gains where it is judged; rung 4 changes rung 2."""

    def row(number, us, batch=1, **config):
        given = {"rung": number, "name": f"Name {number}", "promised": 2.0, "over": number - 1}
        return schema.OpRow(
            "r",
            "linear",
            "cuda",
            "bf16",
            batch,
            {"n": 8, "k": 8},
            **dict(us=us, us_p10=us, us_p90=us, n=9, bytes=128, rung=number, gbps=1.0, of_ceiling=0.5),
            config={**given, "judged": True, **config},
        )

    rows = [row(1, 8.0), row(2, 16.0, judged=False), row(3, 32.0), row(4, 4.0, over=2)]
    rows += [row(1, 90.0, 8, judged=False, partial=True), row(2, 30.0, 8, partial=True)]
    with schema.Writer(tmp_path) as writer:
        writer.append(schema.Env("r", "before", "cuda", gpu="made up"), *rows)
    return tmp_path


def test_the_picture_shows_differences_where_they_are_judged(run):
    loaded = load.load(run)[0]
    (figure,) = ladder_figures.of_run(loaded)  # the partial size is no ladder of its own
    gains = ladder_figures.steps(loaded, "linear", ladder_figures.rows_of(loaded, "linear")[0])
    found = {r.rung: (round(r.gain, 2), r.at) for r in gains.itertuples() if r.gain == r.gain}
    assert found == {2: (3.0, "batch 8"), 3: (0.5, ""), 4: (4.0, "")}
    assert "rung 2 at batch 8" in figure.reading and "2. Name 2" not in figure.more
    assert "3. Name 3 gained 0.50x where 2x was promised" in figure.more
    assert ladder_figures.told(next(r for r in gains.itertuples() if r.rung == 2)) == (
        ", 3.00 times as fast as rung 1 at batch 8"
    )


def test_the_terminal_prints_the_same_differences(run):
    text = printed.text_of(schema.read(run).rows, "x")
    times = [line.split()[-1] for line in text.splitlines() if "Name" in line]
    assert times == ["50%", "50%", "0.50", "4.00", "50%", "3.00"]  # of the lowest and of the unjudged: none
