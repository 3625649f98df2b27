"""The published page, that of reports/h100: its size, its height, its first screen, and the time it takes."""

import re
import time
from pathlib import Path

import pytest
from report_pages import Page, needs_chromium, probe, report

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(the folder of the report, the CPU seconds that it took)"""
    out, before = tmp_path_factory.mktemp("h100"), time.process_time()
    assert report(ROOT / "reports/h100", out) == 0
    return out, time.process_time() - before


@pytest.fixture(scope="module")
def text(drawn):
    return (drawn[0] / "index.html").read_text()


def test_it_is_light_and_soon_drawn(drawn, text):
    assert len(text.encode()) < 2.5e6
    assert sum(p.stat().st_size for p in (drawn[0] / "figures").iterdir()) < 1e6
    assert drawn[1] < 60  # generous: 20 on an idle core, and CPU seconds grow on a busy machine


def test_the_verdict_is_three_sentences_and_the_sections_stand_in_their_order(text):
    said = re.search(r'<div class="said">(.*?)</div>', text, re.S)[1]
    first, second, third = re.findall(r"<p>(.*?)</p>", said, re.S)
    for word in ("best CUDA (persistent)", "best Triton (fused)", "best peer (torch.compile)", "bandwidth"):
        assert word in first
    assert "CUDA is faster in" in second and "By plan" in third
    ids = [attrs["id"] for tag, attrs in Page(text).tags if tag == "section"]
    names = [re.sub(r"^.*?-[0-9a-f]{4}-", "", id) for id in ids]
    assert names[:5] == ["models", "wins", "bandwidth", "token", "ladders"]
    assert names[-2:] == ["ops", "below"] and all(n.startswith("model-") for n in names[5:-2])


def test_what_does_not_fit_is_skipped_and_hashes_are_short(text):
    assert "12 configurations were skipped" in text and "Skipped: what does not fit" in text
    assert ">Failures<" not in text and re.search(r"\b[0-9a-f]{32,}\b", text) is None


def test_cards_name_the_best_of_each_side(text):
    cards = re.findall(r'<dl class="best">(.*?)</dl>', text, re.S)
    assert len(cards) == 4
    for card in cards:
        assert re.findall(r"<dt>(.*?)</dt>", card) == [
            "best CUDA",
            "best Triton",
            "best peer",
            "bandwidth floor",
        ]


@needs_chromium
def test_the_first_screen_and_the_height(text, tmp_path):
    """The verdict and its picture end above the fold; the page is 12,000 px high at most as it opens."""
    for seen in probe(text, tmp_path):
        assert seen["faults"] == [], f"at {seen['width']} px"
        assert max(seen["ends"]) < seen["high"], f"at {seen['width']} px"
        assert seen["height"] < 12000, f"at {seen['width']} px"


TABLES = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const column = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.startsWith("median"));
  const number = row => Number(row.cells[column].textContent.replaceAll(",", ""));
  const values = () => [...table.tBodies[0].rows].map(number);
  const rising = list => list.every((v, i) => !i || list[i - 1] <= v);
  const head = table.tHead.rows[0].cells[column];
  head.click();
  const up = rising(values());
  head.click();
  const down = rising(values().reverse());
  const box = table.querySelector("input");
  box.value = "CUDA persistent";
  box.dispatchEvent(new Event("input"));
  const left = [...table.tBodies[0].rows].filter(row => !row.hidden);
  const rows = table.tBodies[0].rows.length;
  parent.postMessage({width: innerWidth, up, down, rows, left: left.length}, "*");
});
</script>"""


@needs_chromium
def test_tables_sort_and_filter(text, tmp_path):
    text = text[: text.index('<div class="verdict">')] + text[text.index('-model-llama-3.1-8b" aria') - 50 :]
    for seen in probe(text, tmp_path, script=TABLES):
        assert seen["up"] and seen["down"] and 0 < seen["left"] < seen["rows"]
