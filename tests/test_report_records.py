"""lab report of awkward records, and the numbers behind its pictures."""

import html as htmllib
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import synthetic_records as synthetic
from report_pages import EVIL, SMALL, Page, draw, env, op_row, report

from lab.errors import LabError
from lab.records.schema import LedgerRow, ModelRow, Repeat
from lab.report import (
    build,
    figures,
    heatmaps,
    ledger_figures,
    load,
    machine_figures,
    model_figures,
    op_figures,
    ops,
    page,
    tables,
)

# Awkward records


def test_one_row(tmp_path):
    words = draw(tmp_path, [env(), op_row()])
    assert "No usable measurement of the triton backend" in words and "No ceiling was measured" in words
    assert (tmp_path / "figures" / "utilisation.svg").exists()


def test_without_a_model_the_ops_stand_first(tmp_path, undrawn):
    draw(tmp_path, [env(), op_row(), op_row(backend="triton", us=20.0, us_p10=19.0, us_p90=21.0)])
    (view,) = [page.view(run, "x", "f", False, lambda name: None) for run in load.load(tmp_path)]
    assert view.headline.figure.name == "utilisation" and not [p for p in view.top if p.id == "bandwidth"]
    assert view.verdict == ["Op by op, CUDA is faster in 1 of 1 cases, Triton in 0."]


def test_only_an_env_row(tmp_path):
    assert "No op, model or ledger measurement" in draw(tmp_path, [env()])


def test_no_env_row(tmp_path):
    assert "No env record" in draw(tmp_path, [op_row(), op_row(backend="triton")])


def test_the_rate_of_false_alarms_is_said(tmp_path):
    page = draw(tmp_path, [env(), Repeat(env().run, "a", "b", "c0ffee", 200, 1, 2, 3, 0.015, 0.03)])
    assert "3 of 200 device times (1.5%) were called faster or slower" in page


def test_missing_backend(tmp_path, undrawn):
    rows = [r for r in synthetic.make(**SMALL) if getattr(r, "backend", None) != "triton"]
    words = draw(tmp_path, rows)
    assert "No usable measurement of the triton backend" in words
    assert "Roofline" in words and "Who wins where" not in words and "op by op" not in words
    assert "best Triton–not measured" in " ".join(words.split()).replace("> ", "")


def test_failures_are_listed(tmp_path):
    words = draw(
        tmp_path, [env(), op_row(), op_row(backend="triton", us=None, error="out of memory: try less")]
    )
    assert "1 measurements failed" in words and "out of memory: try less" in words


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    lines = [
        json.dumps(
            {
                "schema": 1,
                "kind": "op",
                "run": "r",
                "op": "linear",
                "backend": "cuda",
                "dtype": "bf16",
                "batch": batch,
                "shape": {"n": i},
                "us": us,
                "n": 3,
            }
        )
        for i, (batch, us) in enumerate(
            [(1, 5.0), (1, float("nan")), (1, float("inf")), (1, -3.0), (1, "fast"), ([4], 5.0), (None, 5.0)]
        )
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    report(tmp_path)
    words = "".join(Page((tmp_path / "index.html").read_text()).text)
    assert all(
        f"records.jsonl:{line}: left out: {field} is " in words
        for line, field in enumerate(["us"] * 4 + ["batch"] * 2, 2)
    )
    assert "linear: time of a call" in words


def test_missing_spread_and_wrong_types_are_drawn(tmp_path):
    rows = [
        env(throttle="none", peers="none", settings=3, sm_mhz="fast"),
        op_row(us_p10=None, us_p90=None, n=None, models="all", verdict="faster", shape=7),
        op_row(backend="triton", us_p10=None, us_p90=None, n=None, bytes=None, flops=None, of_ceiling=None),
        ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 1, 64, us=5.0),
        LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 64, "total", us=5.0),
        LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 64, "kernel", op="linear", us=4.0),
        LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 64, "unexplained", us=-1.0),
    ]
    assert "p10 and p90 not recorded for all" in draw(tmp_path, rows)


def test_newer_schema_among_others_is_a_notice(tmp_path):
    synthetic.write(tmp_path, [env(), op_row()])
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"schema": 99, "kind": "op", "run": "r", "wonder": 1}\n')
    report(tmp_path)
    assert "skipped 1 lines of a newer schema" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no records in"),
        ('{"schema": 99, "kind": "op"}\n', "newer schema"),
        ("{not json}\n", "not JSON"),
        ('{"schema": 1, "kind": "poem", "run": "r"}\n', "unknown kind 'poem'"),
    ],
)
def test_unusable_records_are_one_clear_error(tmp_path, content, message):
    (tmp_path / "records.jsonl").write_text(content)
    with pytest.raises(LabError, match=message) as error:
        report(tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def test_no_records_at_all(tmp_path):
    with pytest.raises(LabError, match="no records.jsonl in"):
        report(tmp_path)
    with pytest.raises(LabError, match="no such folder"):
        report(tmp_path / "absent")


def test_above_the_ceiling_is_flagged_and_no_win(tmp_path):
    fast = dict(us=1.0, us_p10=0.9, us_p90=1.1, gbps=20000.0, of_ceiling=6.6)
    machine = [r for r in synthetic.make("r", **SMALL) if r.kind in ("env", "ceiling")]
    words = draw(tmp_path, [*machine, op_row(**fast), op_row(backend="triton")])
    (run,) = load.load(tmp_path)
    f = ops.focus(run)
    assert run.suspects["flag"].tolist() == ["above the ceiling"]
    assert "1 measurements are flagged (1 above the ceiling)" in words and "Flagged measurements" in words
    assert set(op_figures.utilisation(run, f).table["backend"]) == {"triton"}
    assert set(machine_figures.roofline(run, f).table["backend"]) == {"triton"}
    assert heatmaps.crossover(run, f) is None and heatmaps.winners(run, f, "linear") is None
    assert sum(ops.score(ops.chosen(run.op, f)).values()) == 0


def test_a_warm_figure_above_the_ceiling_is_no_fault(tmp_path):
    synthetic.write(tmp_path, [env(), op_row(cache="warm", of_ceiling=1.4), op_row()])
    assert len(load.load(tmp_path)[0].suspects) == 0


def test_texts_of_records_are_escaped(tmp_path):
    evil = dict(op=EVIL, role=EVIL, dtype=EVIL, models=[EVIL], note=EVIL, shape={EVIL: EVIL})
    rows = [
        env(EVIL, gpu=EVIL, notes=[EVIL], driver=EVIL, settings={"command": EVIL}, peers={EVIL: EVIL}),
        op_row(EVIL, **evil),
        op_row(EVIL, "triton", **evil),
        op_row(EVIL, EVIL, **evil),
        op_row(EVIL, "torch", us=None, error=EVIL),
        *(ModelRow(EVIL, EVIL, "cuda", EVIL, EVIL, EVIL, batch, 64, us=5.0) for batch in (1, 2)),
        LedgerRow(EVIL, EVIL, "cuda", EVIL, EVIL, 1, 64, "kernel", op=EVIL, kernel=EVIL, us=5.0),
    ]
    synthetic.write(tmp_path / "in", rows)
    report(tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    found = Page(text)
    assert (
        len(found.of("script")) == 1
        and "<script>alert" not in text
        and htmllib.escape("<script>alert") in text
    )
    summary = (tmp_path / "out" / "README.md").read_text()
    outside_code = "\n".join(line for line in summary.splitlines() if not line.startswith("`"))
    assert "<script" not in outside_code and re.search(r"(?<!\\)\]\(b\)", outside_code) is None
    # Names from records stay inside the output folder.
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+\.svg", p.name) for p in tmp_path.rglob("*.svg"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.html", "README.md", "figures"}


def test_a_remeasured_key_counts_once(tmp_path):
    synthetic.write(tmp_path, [env(), op_row(us=50.0), op_row(us=10.0)])
    assert load.load(tmp_path)[0].op["us"].tolist() == [10.0]


def test_choosing_a_run(tmp_path, undrawn):
    synthetic.write(tmp_path, [env("a"), op_row("a"), env("b"), op_row("b")])
    report(tmp_path, tmp_path / "out", run="b")
    assert "/b/" not in "".join(str(p) for p in (tmp_path / "out").rglob("*.svg"))
    with pytest.raises(LabError, match="no run 'c' in .*: it has"):
        report(tmp_path, tmp_path / "out", run="c")


def test_older_runs_are_named_and_not_drawn(tmp_path, undrawn, monkeypatch):
    synthetic.write(tmp_path, [row for name in "abcdefgh" for row in (env(name), op_row(name))])
    report(tmp_path)
    said = (tmp_path / "index.html").read_text()
    assert (
        "2 older runs are not drawn" in said
        and "b, a" in said
        and len(list(tmp_path.glob("figures/*/"))) == 6
    )
    monkeypatch.setattr(build, "ROWS", 2)  # one row each
    report(tmp_path, tmp_path / "few")
    assert len(list((tmp_path / "few").glob("figures/*/"))) == 2
    monkeypatch.setattr(build, "ROWS", 0)
    report(tmp_path, tmp_path / "one")
    assert "7 older runs are not drawn" in (tmp_path / "one" / "index.html").read_text()


def test_only_runs_that_are_drawn_become_frames(tmp_path, undrawn, monkeypatch):
    """Reading 100,000 lines takes seconds; frames of all runs would take twice as long again."""
    synthetic.write(tmp_path, [row for i in range(40) for row in (env(f"{i:02}"), op_row(f"{i:02}"))])
    made, run = [], load.Stored.run
    monkeypatch.setattr(load.Stored, "run", lambda self: made.append(self.id) or run(self))
    report(tmp_path)
    assert made == ["39", "38", "37", "36", "35", "34"]


def test_what_does_not_fit_is_skipped_and_no_failure(tmp_path, undrawn):
    too_large = "does not fit: the KV cache is larger than the memory that is free"
    rows = [
        ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 1, 64, us=5.0),
        ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 64, 64, error=too_large),
        ModelRow("r", "m", "triton", "basic", "graph", "bf16", 1, 64, error="out of memory: try less"),
    ]
    words = draw(tmp_path, [env(), *rows])
    (run,) = load.load(tmp_path)
    assert run.skipped["batch"].tolist() == [64] and run.failures["backend"].tolist() == ["triton"]
    assert "1 configurations were skipped" in words and "1 measurements failed" in words


def test_old_pictures_are_cleared_and_foreign_files_left(tmp_path, undrawn):
    synthetic.write(
        tmp_path,
        [
            env(),
            op_row(),
            ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 1, 64, us=5.0),
            ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 2, 64, us=6.0),
        ],
    )
    report(tmp_path)
    (tmp_path / "figures" / "mine.svg").write_bytes(b"mine")
    assert (tmp_path / "figures" / "m-latency.svg").exists()
    (tmp_path / "records.jsonl").unlink()
    synthetic.write(tmp_path, [env(), op_row()])
    report(tmp_path)
    assert not (tmp_path / "figures" / "m-latency.svg").exists()
    assert (tmp_path / "figures" / "mine.svg").read_bytes() == b"mine"
    assert not [p for p in tmp_path.rglob(".*") if p.name not in (build.DRAWN,)]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, undrawn):
    synthetic.write(tmp_path, [env(), op_row()])
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabError, match="is a file; name a folder"):
        report(tmp_path, tmp_path / "file")
    with pytest.raises(LabError, match="cannot write .*Not a directory"):
        report(tmp_path, tmp_path / "file" / "below")


def test_report_never_imports_torch(tmp_path):
    synthetic.write(tmp_path, [env()])
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from types import SimpleNamespace as N; from lab.report import build\n"
        f"sys.exit(build.main(N(dir={str(tmp_path)!r}, out=None, run=None)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=build.Path(build.__file__).parents[2]).returncode
        == 0
    )


# Numbers behind the pictures


def test_verdicts_follow_the_spread():
    frame = lambda us, low, high: dict(us=us, us_p10=low, us_p90=high, n=30.0, backend="x", verdict={})
    rows = lambda *all_: list(pd.DataFrame(all_).itertuples())
    fast, slow, wide = rows(frame(10.0, 9.9, 10.1), frame(20.0, 19.8, 20.2), frame(14.0, 8.0, 22.0))
    assert ops.verdict(fast, slow) == "faster" and ops.verdict(slow, fast) == "slower"
    assert ops.verdict(fast, wide) == "ambiguous" and ops.verdict(fast, fast) == "same"


def test_the_harness_has_the_last_word_on_a_verdict():
    frame = pd.DataFrame(
        [
            dict(us=10.0, us_p10=9.9, us_p90=10.1, n=30.0, backend="cuda", verdict={"triton": "ambiguous"}),
            dict(us=20.0, us_p10=19.9, us_p90=20.1, n=30.0, backend="triton", verdict={}),
        ]
    )
    assert ops.verdict(*frame.itertuples()) == "ambiguous"


def test_throughput_and_linearity(tmp_path):
    rows = [
        ModelRow("r", "m", "cuda", "basic", "graph", "bf16", b, 64, us=us, us_p10=us, us_p90=us, n=9)
        for b, us in ((1, 100.0), (4, 200.0))
    ]
    synthetic.write(tmp_path, [env(), *rows])
    table = model_figures.throughput(load.load(tmp_path)[0], "m").table
    assert table.sort_values("batch")["linearity"].tolist() == [
        1.0,
        0.5,
    ]  # 20,000 tokens/s against an ideal of 40,000


def test_ledger_sums_and_waterfall(tmp_path):
    base = dict(run="r", model="m", plan="basic", dtype="bf16", batch=1, context=64)
    synthetic.write(
        tmp_path,
        [
            env(),
            LedgerRow(**base, backend="cuda", row="kernel", op="linear", kernel="k", us=70.0),
            LedgerRow(**base, backend="cuda", row="gap", us=20.0),
            LedgerRow(**base, backend="cuda", row="unexplained", us=10.0),
            LedgerRow(**base, backend="cuda", row="total", us=100.0, us_p10=99.0, us_p90=101.0, n=5),
            LedgerRow(**base, backend="triton", row="swap", us=150.0),
            LedgerRow(**base, backend="cuda", row="swap", us=100.0),
            LedgerRow(
                **base, backend="triton", row="swap", op="linear", us=110.0, overrides={"linear": "cuda"}
            ),
            LedgerRow(**base, backend="triton", row="swap", op="rope", us=155.0, overrides={"rope": "cuda"}),
        ],
    )
    (run,) = load.load(tmp_path)
    (figure,) = ledger_figures.ledgers(run, "m")
    assert "the rows add up to 100.0% of the replayed token" in figure.reading
    table = ledger_figures.swap(run, "m", "basic").table
    assert table["step"].tolist() == ["all Triton", "linear", "rope", "together, not alone", "all CUDA"]
    assert table["change (us)"].tolist()[1:4] == [-40.0, 5.0, -15.0]


def test_chains_are_labelled_and_every_plan_has_its_waterfall(tmp_path):
    base = dict(run="r", model="m", dtype="bf16", batch=1, context=64)
    rows = [env()]
    for plan, row in (("basic", "kernel"), ("fused", "chain")):
        rows += [
            LedgerRow(**base, plan=plan, backend="cuda", row=row, op="linear", kernel="k", us=92.0),
            LedgerRow(
                **base,
                plan=plan,
                backend="cuda",
                row=row,
                op="rope",
                kernel="r",
                us=-1.0 if row == "chain" else 1.0,
            ),  # hidden, but for the noise of two times
            LedgerRow(**base, plan=plan, backend="cuda", row="total", us=100.0),
            LedgerRow(**base, plan=plan, backend="triton", row="swap", us=150.0),
            LedgerRow(**base, plan=plan, backend="triton", row="swap", op="linear", us=110.0),
        ]
    synthetic.write(tmp_path, rows)
    (run,) = load.load(tmp_path)
    assert not [n for n in run.notices if "no usable time" in n.text]
    basic, fused = (ledger_figures.token(run, "m", plan) for plan in ("basic", "fused"))
    account = ledger_figures.account_table(run, "m")
    assert account.iloc[:, 0].drop_duplicates().tolist() == ["CUDA basic", "CUDA fused, chains"]
    assert set(account["row"]) == {"kernel", "chain", "total"}
    assert "CUDA fused: the rows add up to 91.0%" in fused.reading and "would not add up" in fused.reading
    assert "would not add up" not in basic.reading
    assert [f.name for f in ledger_figures.swaps(run, "m")] == ["m-swap", "m-swap-fused"]


def test_error_bars_of_a_share_are_those_of_its_time():
    rows = figures.with_share(pd.DataFrame([dict(of_ceiling=0.5, us=10.0, us_p10=8.0, us_p90=20.0)]))
    assert rows[["share", "share_low", "share_high"]].iloc[0].tolist() == [50.0, 25.0, 62.5]


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234567.0, "1,234,567"),
        (0.66666, "0.6667"),
        (12.3456, "12.35"),
        (float("inf"), "inf"),
        (True, "yes"),
        ("a<b", "a<b"),
        (0.0, "0"),
    ],
)
def test_cells(value, shown):
    assert tables.cell(value) == shown
