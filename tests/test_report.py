"""lab report: pictures and pages from synthetic records, whole and awkward, and the page in a headless
Chromium."""

import html as htmllib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from matplotlib.colors import to_hex, to_rgb

from lab.errors import LabError
from lab.model.plans import PLANS
from lab.records.schema import Env, Fairness, LedgerRow, ModelRow, OpRow, Repeat, to_line
from lab.report import (
    build,
    figures,
    heatmaps,
    ledger_figures,
    load,
    model_figures,
    op_figures,
    ops,
    page,
    style,
)

SMALL = dict(models=["llama-3.2-1b"], batches=(1, 16), contexts=(1024, 8192))
WIDTHS = (1440, 390)
EVIL = '<script>alert("x")</script>\'"&`|[a](b) $x_1^2$ \x07'


def report(source, out=None, run=None):
    return build.main(SimpleNamespace(dir=str(source), out=out and str(out), run=run))


def env(run="r", **fields):
    return Env(
        **{
            "run": run,
            "when": "before",
            "device": "cuda",
            "gpu": "Synthetic GPU",
            "commit": "0",
            "throttle": [],
            "notes": [synthetic.NOTE],
            **fields,
        }
    )


def op_row(run="r", backend="cuda", **fields):
    return OpRow(
        **{
            "run": run,
            "op": "linear",
            "backend": backend,
            "dtype": "bf16",
            "batch": 1,
            "role": "qkv",
            "shape": {"n": 8, "k": 8},
            "us": 10.0,
            "us_p10": 9.0,
            "us_p90": 11.0,
            "n": 20,
            "bytes": 20000000,
            "flops": 20000000,
            "gbps": 2000.0,
            "of_ceiling": 0.66,
            **fields,
        }
    )


class Page(HTMLParser):
    """What the tests ask of a page: tags with their attributes, and the text outside script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._skip = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def draw_coarsely(patch):
    """Half the pixels each way, which is still wider than the narrow window of the tests."""
    rc = style.rc
    patch.setattr(style, "rc", lambda: {**rc(), "figure.dpi": rc()["figure.dpi"] // 2})


@pytest.fixture
def coarse(monkeypatch):
    """Pictures are drawn coarsely, and sources are not coloured, which would be most of the page."""
    draw_coarsely(monkeypatch)
    monkeypatch.setattr(page.twins, "highlight", lambda language, code: htmllib.escape(code))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A GPU run and an emulated one (both synthetic) in two subfolders, and the report of them: (the folder,
    what was drawn as (name, canvas))."""
    where, canvases, compose = tmp_path_factory.mktemp("records"), [], figures.compose
    few = {"linear", "decode_attention"}  # of the ops: drawing takes most of the time
    for name, rows in (
        ("card", synthetic.make(**SMALL)),
        ("laptop", synthetic.make("20240101T000000-emul", emulated=True)),
    ):
        synthetic.write(where / name, [r for r in rows if r.kind != "op" or r.op in few])

    def composed(figure, emulated=False):
        canvas = compose(figure, emulated)
        canvases.append((figure.name, canvas))
        return canvas

    with pytest.MonkeyPatch.context() as patch:
        draw_coarsely(patch)
        patch.setattr(figures, "compose", composed)
        assert report(where) == 0
    return where, canvases


@pytest.fixture(scope="module")
def folder(drawn):
    return drawn[0]


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "index.html").read_text()


@pytest.fixture(scope="module")
def found(text):
    return Page(text)


# The page


def test_every_picture_has_alt_text_a_table_and_a_command(folder, found):
    pictures = found.of("img")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert len(pictures) == len(files) > 20
    assert all(len(p["alt"]) > 20 and p["src"].startswith("data:image/png;base64,") for p in pictures)
    assert all(p["class"] == "plot" for p in pictures)  # what the dark page inverts
    words = "".join(found.text)
    assert words.count("Table behind this picture (") == words.count("Measured again by ") == len(pictures)
    assert len(re.findall(r"Table behind this picture \([1-9]\d* rows\)", words)) == len(pictures)
    assert words.count("lab bench ") >= len(pictures)


def test_page_is_self_contained(text, found):
    for tag, attrs in found.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert re.match(r"data:image/png;base64,|#", attrs.get(name) or "#"), (
                f"<{tag} {name}={attrs[name][:40]}>"
            )
    assert not found.of("link") and not found.of("iframe")
    assert (
        re.search(r"(?:https?:)?//[a-z]+\.", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text))
        is None
    )
    assert "@import" not in text and "url(" not in text
    assert any("default-src 'none'" in m.get("content", "") for m in found.of("meta"))


def test_fragments_lead_somewhere(found):
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.of("a")} <= set(ids)


def test_runs_have_a_picker(found):
    assert [o["value"] for o in found.of("option")] == ["20250101T120000-synt", "20240101T000000-emul"]
    assert [a["data-run"] for a in found.of("article")] == ["20250101T120000-synt", "20240101T000000-emul"]


def test_conditions_are_said_of_every_picture(folder, undrawn):
    for run in load.load(folder):
        drawn = page.view(run, "x", "figures", False, lambda name: None).pictures
        for picture in drawn:
            said = picture.figure.conditions
            assert ("EMULATED on Synthetic CPU" if run.emulated else "Synthetic GPU (not measured)") in said
            assert re.search(r"n \d+", said) and ("p10 to p90" in said or "no spread" in said)
            if picture.figure.name != "ceiling":
                assert "fp32" in said or "bf16" in said
            if not run.emulated:
                assert re.search(r"ceiling of this run read [\d,]+, copy [\d,]+ GB/s", said)


def test_markdown_shows_every_picture_and_the_warning(folder):
    summary = (folder / "README.md").read_text()
    shown = re.findall(r"^!\[.+\]\((figures/\S+\.png)\)$", summary, re.M)
    assert sorted(shown) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert "> **Warning**: Synthetic records" in summary and "Emulated on a CPU" in summary


def test_emulated_runs_claim_no_bandwidth(tmp_path, undrawn):
    rows = synthetic.make("cpu", emulated=True)
    for r in rows:
        if r.kind in ("op", "model"):
            r.gbps, r.of_ceiling = 123456.0, 41.0
    synthetic.write(tmp_path, rows)
    report(tmp_path)
    words = "".join(Page((tmp_path / "index.html").read_text()).text)
    assert "Emulated op records claim a bandwidth; it was ignored" in words
    assert "123,456" not in words and "GB/s" not in words and "of the ceiling" not in words
    names = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert "utilisation" in names and not names & {"roofline", "crossover", "ceiling"}
    assert not any(n.endswith("-share") or n.endswith("-winner") for n in names)


def test_twins_stand_in_the_sections_of_the_newest_run_only(text):
    shown = [op for op in page.twins.known_ops() if "missing" not in page.twin_view(op)]
    assert text.count("The twins side by side") == len(shown) >= 8
    assert "cuda_src/linear.cu" in text and "triton_kernels/linear.py" in text


def test_fairness_cards_put_the_sides_beside_each_other(tmp_path, undrawn):
    side = dict(
        run="r", op="linear", dtype="bf16", arch="sm_90a", shape={"batch": 1, "n": 8}, occupancy=0.3125
    )
    cards = [
        Fairness(**side, backend="cuda", kernel="linear_stream_kernel", registers=96),
        Fairness(**side, backend="triton", kernel="linear_kernel", configurations=12),
    ]
    synthetic.write(tmp_path, [env(), op_row(), *cards])
    caption, frame = page.card(page.one_call(load.load(tmp_path)[0].fairness, "bf16"))
    assert caption == "Fairness card: bf16, sm_90a, batch=1 n=8"
    assert list(frame) == ["", "CUDA: linear_stream_kernel", "Triton: linear_kernel"]
    rows = {row[0]: row[1:] for row in frame.itertuples(index=False, name=None)}
    assert rows["registers of a thread"] == ("96", "–") and rows["configurations to choose from"] == (
        "–",
        "12",
    )
    assert rows["theoretical occupancy"] == ("31%", "31%")
    report(tmp_path)
    assert (tmp_path / "index.html").read_text().count("Fairness card: bf16") == 3  # summary, label, caption


def test_the_instruction_mix_stands_below_the_card(tmp_path, undrawn):
    side = dict(run="r", op="linear", dtype="bf16", arch="sm_90a", shape={"batch": 1, "n": 8})
    cards = [
        Fairness(
            **side, backend="cuda", kernel="a_kernel", mix={"tensor core": 4, "integer and address": 50}
        ),
        Fairness(
            **side,
            backend="triton",
            kernel="b_kernel",
            mix={"global load, 128 bit": 1200, "other": 2, "integer and address": 40, "new class": 1},
        ),
        Fairness(**side, backend="triton", kernel="old_kernel"),
    ]
    synthetic.write(tmp_path, [env(), op_row(), *cards])
    caption, frame = page.mix(page.one_call(load.load(tmp_path)[0].fairness, "bf16"))
    assert caption == "Instructions of machine code, each counted once: bf16, sm_90a, batch=1 n=8"
    assert list(frame) == ["", "CUDA: a_kernel", "Triton: b_kernel", "Triton: old_kernel"]
    shown = {row[0]: row[1:3] for row in frame.itertuples(index=False, name=None)}
    assert shown == {
        "global load, 128 bit": (0, 1200),
        "tensor core": (4, 0),
        "new class": (0, 1),
        "addresses, moves, control flow": (50, 42),
    }
    assert frame["Triton: old_kernel"].isna().all()
    report(tmp_path)
    assert "1,200" in (tmp_path / "index.html").read_text()


def test_fairness_cards_of_old_records_have_no_mix(tmp_path, undrawn):
    card = Fairness("r", "linear", "cuda", "bf16", "sm_90a", {}, "k", instructions=9)
    words = draw(tmp_path, [env(), op_row(), card])
    assert "Fairness card: bf16" in words and "each counted once" not in words


def test_without_fairness_cards_the_page_says_what_makes_them(tmp_path, undrawn):
    assert "None in this run: `lab inspect --all --out DIR` adds them" in draw(tmp_path, [env(), op_row()])


def test_fairness_cards_alone(tmp_path, undrawn):
    card = Fairness(
        run="r", op="linear", backend="cuda", dtype="bf16", arch="sm_90a", shape={}, kernel="linear_kernel"
    )
    assert "Fairness card: bf16, sm_90a" in draw(tmp_path, [card])


# Awkward records


def draw(tmp_path, rows):
    synthetic.write(tmp_path, rows)
    assert report(tmp_path) == 0
    return "".join(Page((tmp_path / "index.html").read_text()).text)


def test_one_row(tmp_path, coarse):
    words = draw(tmp_path, [env(), op_row()])
    assert "No usable measurement of the triton backend" in words and "No ceiling was measured" in words
    assert (tmp_path / "figures" / "utilisation.png").exists()


def test_only_an_env_row(tmp_path, coarse):
    assert "No op, model or ledger measurement" in draw(tmp_path, [env()])


def test_no_env_row(tmp_path, coarse):
    assert "No env record" in draw(tmp_path, [op_row(), op_row(backend="triton")])


def test_the_rate_of_false_alarms_is_said(tmp_path):
    page = draw(tmp_path, [env(), Repeat(env().run, "a", "b", "c0ffee", 200, 1, 2, 3, 0.015, 0.03)])
    assert "3 of 200 device times (1.5%) were called faster or slower" in page


def test_missing_backend(tmp_path, undrawn):
    rows = [r for r in synthetic.make(**SMALL) if getattr(r, "backend", None) != "triton"]
    words = draw(tmp_path, rows)
    assert "No usable measurement of the triton backend" in words
    names = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert "roofline" in names and "crossover" not in names and "llama-3.2-1b-swap" not in names


def test_failures_are_listed(tmp_path, coarse):
    words = draw(
        tmp_path, [env(), op_row(), op_row(backend="triton", us=None, error="out of memory: try less")]
    )
    assert "1 measurements failed" in words and "out of memory: try less" in words


def test_values_that_are_no_numbers_are_left_out(tmp_path, coarse):
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
    assert (tmp_path / "figures" / "linear-time.png").exists()


def test_missing_spread_and_wrong_types_are_drawn(tmp_path, coarse):
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


def test_newer_schema_among_others_is_a_notice(tmp_path, coarse):
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


def test_above_the_ceiling_is_flagged_and_no_win(tmp_path, coarse):
    fast = dict(us=1.0, us_p10=0.9, us_p90=1.1, gbps=20000.0, of_ceiling=6.6)
    machine = [r for r in synthetic.make("r", **SMALL) if r.kind in ("env", "ceiling")]
    words = draw(tmp_path, [*machine, op_row(**fast), op_row(backend="triton")])
    (run,) = load.load(tmp_path)
    f = ops.focus(run)
    assert run.suspects["flag"].tolist() == ["above the ceiling"]
    assert "1 measurements are flagged (1 above the ceiling)" in words and "Flagged measurements" in words
    assert set(op_figures.utilisation(run, f).table["backend"]) == {"triton"}
    assert set(op_figures.roofline(run, f).table["backend"]) == {"triton"}
    assert heatmaps.crossover(run, f) is None and heatmaps.winners(run, f, "linear") is None
    assert sum(ops.score(ops.chosen(run.op, f)).values()) == 0


def test_a_warm_figure_above_the_ceiling_is_no_fault(tmp_path):
    synthetic.write(tmp_path, [env(), op_row(cache="warm", of_ceiling=1.4), op_row()])
    assert len(load.load(tmp_path)[0].suspects) == 0


def test_texts_of_records_are_escaped(tmp_path, coarse):
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
    assert len(found.of("script")) == 1 and 'alert("x")' not in re.sub(
        r"(?s)<(pre|td|p|dd).*?</\1>", "", text
    )
    assert "<script>alert" not in text and htmllib.escape("<script>alert") in text
    summary = (tmp_path / "out" / "README.md").read_text()
    outside_code = "\n".join(line for line in summary.splitlines() if not line.startswith("`"))
    assert "<script" not in outside_code and re.search(r"(?<!\\)\]\(b\)", outside_code) is None
    # Names from records stay inside the output folder.
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+\.png", p.name) for p in tmp_path.rglob("*.png"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.html", "README.md", "figures"}


def test_a_remeasured_key_counts_once(tmp_path):
    synthetic.write(tmp_path, [env(), op_row(us=50.0), op_row(us=10.0)])
    assert load.load(tmp_path)[0].op["us"].tolist() == [10.0]


def test_choosing_a_run(tmp_path, undrawn):
    synthetic.write(tmp_path, [env("a"), op_row("a"), env("b"), op_row("b")])
    report(tmp_path, tmp_path / "out", run="b")
    assert "/b/" not in "".join(str(p) for p in (tmp_path / "out").rglob("*.png"))
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
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    assert (tmp_path / "figures" / "m-throughput.png").exists()
    (tmp_path / "records.jsonl").unlink()
    synthetic.write(tmp_path, [env(), op_row()])
    report(tmp_path)
    assert not (tmp_path / "figures" / "m-throughput.png").exists()
    assert (tmp_path / "figures" / "mine.png").read_bytes() == b"mine"
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
    assert table["linearity"].tolist() == [1.0, 0.5]  # 20,000 tokens/s against an ideal of 40,000


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
    assert "the rows add up to 100.0% of the replayed token" in ledger_figures.ledger(run, "m").reading
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
    figure = ledger_figures.ledger(run, "m")
    assert figure.table.iloc[:, 0].drop_duplicates().tolist() == ["CUDA basic", "CUDA fused, chains"]
    assert set(figure.table["row"]) == {"kernel", "chain", "total"}
    assert (
        "CUDA fused, chains: the rows add up to 91.0%" in figure.reading and "do not add up" in figure.reading
    )
    assert [f.name for f in ledger_figures.swaps(run, "m")] == ["m-swap", "m-swap-fused"]
    only_kernels = [r for r in rows if getattr(r, "plan", "") != "fused"]
    synthetic.write(tmp_path / "kernels", only_kernels)
    assert "do not add up" not in ledger_figures.ledger(load.load(tmp_path / "kernels")[0], "m").reading


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
    assert page.cell(value) == shown


# How it looks


def luminance(color):
    channel = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
    return linear


def contrast(a, b):
    """WCAG 2.1 contrast ratio."""
    x, y = sorted((float(luminance(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (x + 0.05) / (y + 0.05)


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab_of(linear):
    """CIELAB of linear sRGB, D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 1e-6, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def on_the_dark_page(color):
    """A colour of a picture after the page's filter, as the CSS specification Filter Effects 1 defines it."""
    template = (Path(page.__file__).parent / "page.html.j2").read_text()
    amount = float(re.search(r"\.plot \{ filter: invert\((\.\d+)\) hue-rotate\(180deg\); \}", template)[1])
    inverted = amount + np.array(to_rgb(color)) * (1 - 2 * amount)
    sums = np.array([0.213, 0.715, 0.072])
    return to_hex(np.clip(2 * sums @ inverted - inverted, 0, 1))


def test_backends_are_readable_on_both_pages_and_stay_apart():
    for look in style.BACKENDS.values():
        assert contrast(look.color, style.PAGE) >= 3, look.label
        assert contrast(on_the_dark_page(look.color), on_the_dark_page(style.PAGE)) >= 3, look.label
    assert contrast(on_the_dark_page(style.MUTED), on_the_dark_page(style.PAGE)) >= 4.5
    for kind, matrix in BLIND.items():
        for a, b in itertools.combinations(("cuda", "triton", "torch"), 2):
            seen = [
                lab_of(np.clip(np.array(matrix) @ luminance(style.BACKENDS[n].color), 0, 1)) for n in (a, b)
            ]
            assert np.linalg.norm(seen[0] - seen[1]) > 20, f"{a} and {b} under {kind}"
    looks = [(look.color, look.marker) for look in style.BACKENDS.values()]
    assert len({c for c, _ in looks}) == len({m for _, m in looks}) == len(looks)


def test_every_plan_has_a_line_and_markers_of_its_own():
    rows = pd.DataFrame([dict(backend="cuda", plan=plan, mode="graph", series=plan) for plan in PLANS])
    drawn = {name: how for name, _, _, how in model_figures._lines(rows)}
    assert {line for line, _ in drawn.values()} == {"-", "--", "-."}
    assert [markers for _, markers in drawn.values()] == ["hollow", "full", "rimmed"]
    assert [how for _, _, _, how in model_figures._lines(rows[rows["plan"] == "persistent"])] == [
        ("-.", "full")
    ]


def test_text_in_pictures_does_not_overlap_or_leave_the_canvas(drawn):
    """Tick labels of one axis keep apart; titles, tick labels and legends stay inside."""
    _, canvases = drawn
    names = {name for name, _ in canvases}
    assert {"ceiling", "utilisation", "roofline", "crossover", "linear-time", "linear-share"} <= names
    assert any(name.endswith("-ledger") for name in names) and any(name.endswith("-swap") for name in names)
    for name, canvas in canvases:
        inside = canvas.bbox.padded(1)
        texts = [*canvas.texts, *(t for legend in canvas.legends for t in legend.get_texts())]
        for axis in itertools.chain.from_iterable((ax.xaxis, ax.yaxis) for ax in canvas.axes):
            low, high = sorted(axis.get_view_interval())
            labels = [
                t
                for at, t in zip(axis.get_majorticklocs(), axis.get_ticklabels())
                if t.get_text() and low <= at <= high
            ]
            texts += labels + [axis.label] * bool(axis.label.get_text())
            for a, b in itertools.combinations([t.get_window_extent() for t in labels], 2):
                assert not a.overlaps(b), f"{name}: tick labels overlap"
        for t in texts:
            (x0, y0), (x1, y1) = t.get_window_extent().get_points()
            assert inside.contains(x0, y0) and inside.contains(x1, y1), f"{name}: {t.get_text()}"


PROBE = """<script>
"use strict";
const faults = [];
addEventListener("error", e => faults.push("error: " + e.message));
addEventListener("unhandledrejection", e => faults.push("rejection: " + e.reason));
addEventListener("securitypolicyviolation", e => faults.push("blocked: " + e.violatedDirective));
for (const level of ["error", "warn"])
  console[level] = (...words) => faults.push(level + ": " + words.join(" "));
addEventListener("load", () => {
  const look = state => {
    if (document.documentElement.scrollWidth > innerWidth)
      faults.push(state + ": the page is wider than the window");
    for (const e of document.querySelectorAll("h1,h2,h3,h4,p,li,dt,dd,summary,label,select,a,caption")) {
      if (e.closest(".scroll,.skip,[hidden]") || !e.getClientRects().length) continue;
      const box = e.getBoundingClientRect();
      if (box.right > innerWidth + 1 || box.left < -1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
        faults.push(state + ": cut off: " + e.tagName + " " + e.textContent.trim().slice(0, 60));
    }
    const boxes = [...document.querySelectorAll(".card,.tile,.notice,.twin,h1,h2,.facts")]
      .filter(e => e.getClientRects().length).map(e => [e, e.getBoundingClientRect()]);
    for (const [i, [a, x]] of boxes.entries()) for (const [b, y] of boxes.slice(i + 1)) {
      const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
      const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (wide > 1 && high > 1 && !a.contains(b) && !b.contains(a))
        faults.push(state + ": overlap: " + a.className + " and " + b.className);
    }
  };
  look("as opened");
  for (const d of document.querySelectorAll("details")) d.open = true;
  look("all open");
  const images = [...document.querySelectorAll(".run:not([hidden]) img")];
  for (const i of images) if (!i.complete || !i.naturalWidth || !i.alt) faults.push("picture: " + i.alt);
  const pick = document.getElementById("run");
  const runs = pick ? [...pick.options].map(o => {
    pick.value = o.value;
    pick.dispatchEvent(new Event("change"));
    look("run " + o.value);
    return [...document.querySelectorAll(".run")].filter(r => !r.hidden).map(r => r.dataset.run).join();
  }) : [];
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  parent.postMessage({width: innerWidth, faults, images: images.length, runs, dark}, "*");
});
</script>"""
FRAMES = """<!doctype html><body>{frames}<pre id="found"></pre><script>
const found = [];
addEventListener("message", e => {{
  found.push(e.data);
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>{frames_after}"""


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium or Chrome (apt-get install chromium), or CHROMIUM=path"
)


def probe(text, tmp_path, dark=False):
    """What PROBE reports of a page in a frame of each width; Chromium's own windows are never narrower than
    500 px."""
    (tmp_path / "probed.html").write_text(text.replace("<title>", PROBE + "<title>", 1))
    frames = "".join(f'<iframe src="probed.html" width="{w}" height="900"></iframe>' for w in WIDTHS)
    (tmp_path / "frames.html").write_text(FRAMES.format(frames="", frames_after=frames))
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--window-size=1600,1000",
            "--virtual-time-budget=20000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1], f"Chromium printed no result: {done.stderr[-500:]}"
    seen = json.loads(htmllib.unescape(found[1]))
    assert sorted(s["width"] for s in seen) == sorted(WIDTHS)
    return seen


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_in_chromium(text, tmp_path, dark):
    """No console message, nothing wider than the window, nothing cut off or overlapping, every picture
    decoded."""
    for seen in probe(text, tmp_path, dark):
        assert seen["faults"] == [], f"at {seen['width']} px"
        assert seen["images"] > 10 and seen["dark"] == dark
        assert seen["runs"] == ["20250101T120000-synt", "20240101T000000-emul"]


@needs_chromium
def test_the_probe_finds_planted_faults(tmp_path):
    planted = """<!doctype html><title>x</title><div class="card" style="height:50px">a</div>
<div class="card" style="margin-top:-20px">b</div><div style="width:2000px">wide</div>
<p style="width:20px;overflow:hidden">Incomprehensibly</p>
<script>console.error("planted"); missing()</script>"""
    for seen in probe(planted, tmp_path):
        faults = "\n".join(seen["faults"])
        for word in (
            "error: planted",
            "missing is not defined",
            "wider than the window",
            "overlap: card and card",
            "cut off: P Incomp",
        ):
            assert word in faults


def test_ten_thousand_rows_are_drawn_in_bounded_time_and_say_what_is_left_out(tmp_path, undrawn):
    row = json.loads(to_line(op_row(models=["m"])))
    rows = [
        row | {"backend": backend, "shape": {"n": n, "k": 8}, "batch": batch}
        for n in range(50)
        for batch in range(1, 101)
        for backend in ("cuda", "triton")
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = time.process_time()
    assert report(tmp_path) == 0
    assert time.process_time() - before < 120  # generous: CPU seconds grow on a busy machine
    words = " ".join("".join(Page((tmp_path / "index.html").read_text()).text).split())
    assert "10 more are not drawn, so that the picture can be read: all are in records.jsonl." in words
    assert "Only the smallest 12 of 100 batches are drawn." in words
    assert "The first 8 of 50 panels are drawn; all rows are in records.jsonl." in words
    assert "(the first 1,000 of 10,000 rows; all of them are in records.jsonl)" in words
