"""The page of synthetic records: what it says and holds, and how it looks in a headless Chromium."""

import dataclasses
import itertools
import json
import re
import time
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from report_pages import SMALL, Page, draw, env, needs_chromium, op_row, probe, report

from lab import declared
from lab.records.schema import Fairness, to_line
from lab.report import fairness, figures, load, page, sources, style, svg, twins


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


def test_every_picture_has_alt_text_a_table_and_a_command(found):
    pictures = found.of("svg")
    assert len(pictures) > 20
    assert all(len(p["aria-label"]) > 20 and p["role"] == "img" for p in pictures)
    words = "".join(found.text)
    grids = sum("groups" in attrs.get("class", "") for attrs in found.of("div"))
    behind = words.count("Numbers, conditions and command")
    assert behind == words.count("Measured again by ") == len(pictures) + grids
    assert words.count("lab bench ") >= behind


def test_page_is_self_contained(text, found):
    for tag, attrs in found.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert re.match(r"#", attrs.get(name) or "#"), f"<{tag} {name}={attrs[name][:40]}>"
    assert not found.of("link") and not found.of("iframe")
    assert re.search(r"(?:https?:)?//[a-z]+\.", text) is None
    assert "@import" not in text and re.search(r"url\((?!#)", text) is None
    assert any("default-src 'none'" in m.get("content", "") for m in found.of("meta"))


def test_fragments_lead_somewhere(found):
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.of("a")} <= set(ids)


def test_runs_have_a_picker(found):
    assert [o["value"] for o in found.of("option")] == ["20250101T120000-synt", "20240101T000000-emul"]
    assert [a["data-run"] for a in found.of("article")] == ["20250101T120000-synt", "20240101T000000-emul"]


def test_the_picker_says_what_a_run_measured(text, folder):
    said = re.findall(r"<option [^>]*>[^:]*: (.*?)</option>", text)
    model = "llama-3.2-1b in 5 formats"
    assert said[0] == (
        f"linear, decode_attention; packed linear in 5 formats; tokens of {model}; accuracy of {model} "
        "(Synthetic GPU (not measured))"
    )
    assert "tokens of smollm2-135m" in said[1] and said[1].endswith(", emulated)")
    run = load.load(folder)[0]
    frames = [f.name for f in dataclasses.fields(run) if f.type is pd.DataFrame]
    empty = {name: getattr(run, name).iloc[:0] for name in frames}
    assert dataclasses.replace(run, **empty).about == "no times"
    assert dataclasses.replace(run, **empty | {"ledger": run.ledger}).about == "tokens of llama-3.2-1b"


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


def test_the_summary_shows_the_pictures_that_are_files_and_the_warning(folder):
    summary = (folder / "README.md").read_text()
    shown = re.findall(r"^!\[.+\]\((figures/\S+\.svg)\)$", summary, re.M)
    assert sorted(shown) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.svg"))
    assert "verdict.svg" in summary and "utilisation.svg" in summary and "-latency.svg" in summary
    assert re.search(r"^\| linear qkv \| .*CUDA 1.\d\d×", summary, re.M)  # who wins where, as a table
    assert "> **Warning**: Synthetic records" in summary and "Emulated on a CPU" in summary
    conditions = re.findall(r"^(?:EMULATED on )?Synthetic (?:GPU|CPU).* · n \d+", summary, re.M)
    assert len(conditions) >= len(shown)  # said beside each picture


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
    names = {p.stem for p in (tmp_path / "figures").glob("*.svg")}
    assert "utilisation" in names and "tiny" not in names
    assert "Roofline" not in words and "Who wins" not in words and "floor" not in words


def test_twins_stand_in_the_sections_of_the_newest_run_only(text):
    shown = [op for op in twins.known_ops() if "missing" not in sources.twin_view(op)]
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
    caption, frame = fairness.card(fairness.one_call(load.load(tmp_path)[0].fairness, "bf16"))
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
    caption, frame = fairness.mix(fairness.one_call(load.load(tmp_path)[0].fairness, "bf16"))
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


def test_backends_are_readable_on_both_pages_and_stay_apart():
    light, dark = ({name: colors[i] for name, colors in style.NEUTRAL.items()} for i in (0, 1))
    for colors in (light, dark):
        for look in style.BACKENDS.values():
            assert contrast(look.color, colors["page"]) >= 3, look.label
        assert min(contrast(colors[name], colors["page"]) for name in ("ink", "muted")) >= 4.5
    for kind, matrix in BLIND.items():
        for a, b in itertools.combinations(("cuda", "triton", "torch"), 2):
            seen = [
                lab_of(np.clip(np.array(matrix) @ luminance(style.BACKENDS[n].color), 0, 1)) for n in (a, b)
            ]
            assert np.linalg.norm(seen[0] - seen[1]) > 20, f"{a} and {b} under {kind}"
    looks = [(look.color, look.marker) for look in style.BACKENDS.values()]
    assert len({c for c, _ in looks}) == len({m for _, m in looks}) == len(looks)


@pytest.mark.parametrize(
    "font", ["font: 700 8px 'DejaVu Sans', sans-serif", "font-weight: 700; font-size: 8px; font-family: 'X'"]
)
def test_a_picture_follows_the_theme_and_brings_no_font_or_name_of_its_own(font):
    """Both ways in which releases of matplotlib write a font; the second picture's names differ."""
    root = ElementTree.fromstring(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><metadata/>'
        '<defs><path id="m1" d="M 0 0"/></defs>'
        f'<g id="figure_1"><g id="class s k1"><use href="#m1" x="1.23456" style="fill: {style.INK}"/></g>'
        f'<text style="{font}; fill: {style.INK}; text-anchor: end">a &lt; b</text></g></svg>'
    )
    styles = {}
    shown = [svg.inline(root, prefix, 'so "it" is', styles) for prefix in ("one", "two")]
    assert 'aria-label="so &quot;it&quot; is"' in shown[0] and "a &lt; b" in shown[0]
    assert '<path id="one-0" d="M 0 0"/>' in shown[0] and '<use href="#two-0" x="1.23"' in shown[1]
    assert '<g class="s k1">' in shown[0] and "figure_1" not in shown[0]
    rules = svg.rules(styles)
    assert "{fill:var(--p-ink)}" in rules and style.INK not in rules and "font-family" not in rules
    assert "font-size:8px" in rules and "font-weight:700" in rules and "text-anchor:end" in rules
    alone = svg.alone(root, "t", "d")
    assert "prefers-color-scheme:dark" in alone and ElementTree.fromstring(alone) is not None


@pytest.mark.parametrize("first, second", [("p1", "p2"), ("p2", "p1")])
def test_a_picture_drawn_again_is_the_same_file(first, second):
    """Whatever names matplotlib gave this time to what its parts refer to."""
    one, other = (
        ElementTree.fromstring(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><defs>'
            f'<clipPath id="{a}"><rect width="1"/></clipPath><clipPath id="{b}"><rect width="2"/></clipPath>'
            f'</defs><path d="M 1 1" clip-path="url(#{a})"/><path d="M 2 2" clip-path="url(#{b})"/></svg>'
        )
        for a, b in ((first, second), ("a", "b"))
    )
    assert svg.alone(one, "t", "d") == svg.alone(other, "t", "d")


def test_no_colour_of_a_token_is_used_twice():
    ops = [op for group in declared.groups().values() for op in group]
    for parts in (*itertools.combinations(ops, 5), ["new", "newer", "linear", "norm_linear", "other"]):
        colors = list(style.part_colors(parts).values())
        assert len(set(colors)) == len(parts) and not {style.REST, style.GRID} & set(colors)
        assert not set(colors) & {look.color for look in style.BACKENDS.values()} - set(style.OTHERS)


def test_text_in_pictures_does_not_overlap_or_leave_the_canvas(drawn):
    """Tick labels of one axis keep apart; titles, tick labels and legends stay inside."""
    _, canvases = drawn
    names = {name for name, _ in canvases}
    assert {"verdict", "models", "utilisation", "tiny", "ceiling", "roofline", "linear-time"} <= names
    for ending in ("-latency", "-eager", "-throughput", "-ledger-basic", "-swap"):
        assert any(name.endswith(ending) for name in names), ending
    for name, canvas in canvases:
        inside = canvas.bbox.padded(1)
        assert all(len(legend.get_texts()) <= 6 for legend in canvas.legends), f"{name}: a legend of too many"
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


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_in_chromium(text, tmp_path, dark):
    """No console message, nothing wider than the window, nothing cut off or overlapping, every picture
    shown."""
    for seen in probe(text, tmp_path, dark):
        assert seen["faults"] == [], f"at {seen['width']} px"
        assert seen["pictures"] > 10 and seen["dark"] == dark
        assert seen["runs"] == ["20250101T120000-synt", "20240101T000000-emul"]


@needs_chromium
def test_the_probe_finds_planted_faults(tmp_path):
    planted = """<!doctype html><title>x</title><div class="card" style="height:50px">a</div>
<div class="card" style="margin-top:-20px">b</div><div style="width:2000px">wide</div>
<p style="width:20px;overflow:hidden">Incomprehensibly</p>
<p hidden style="display:block">Secret</p><script>console.error("planted"); missing()</script>"""
    for seen in probe(planted, tmp_path):
        faults = "\n".join(seen["faults"])
        for word in (
            "error: planted",
            "missing is not defined",
            "wider than the window",
            "overlap: card and card",
            "cut off: P Incomp",
            "hidden, but shown: Secret",
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
    assert "Only the smallest 12 of 100 batches are shown." in words
    assert "The first 8 of 50 panels are drawn; all rows are in records.jsonl." in words
    assert "(the first 1,000 of 10,000 rows; all of them are in records.jsonl)" in words
