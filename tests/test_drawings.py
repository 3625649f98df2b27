"""The drawings of the course and of the ladders: made from the kernels' constants, and shown beside what they
explain."""

import re
import xml.etree.ElementTree as ET

import pytest

from lab import rungs
from lab.learn import lessons
from lab.report import drawings, sources


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_the_file_in_the_course_is_what_the_code_draws(name):
    drawing = drawings.DRAWINGS[name]()
    text = (drawings.FOLDER / f"{name}.svg").read_text()
    assert text == drawing.alone, "run `python -m lab.report.drawings`"
    root = ET.fromstring(text)
    assert len(text) < 40_000
    for mark in root.iter():  # nothing is drawn outside
        if "x" in mark.attrib and "y" in mark.attrib:
            right = float(mark.get("x")) + float(mark.get("width", 0))
            below = float(mark.get("y")) + float(mark.get("height", 0))
            assert 0 <= right <= drawings.WIDTH and 0 <= below <= drawing.height


def test_numbers_follow_from_the_kernels_constants(monkeypatch):
    assert "32 lines of 128 bytes, of which 2 % are used" in drawings.lanes().body
    assert "4 lines of 128 bytes, of which 100 % are used" in drawings.lanes().body
    assert re.findall(r"takes (\d+) step", drawings.banks().body) == ["32", "1"]
    monkeypatch.setattr(
        drawings, "constant", lambda file, name: {"kTileRows": 32, "kTileCols": 32}.get(name, 3)
    )
    assert re.findall(r"takes (\d+) step", drawings.banks().body) == ["16", "1"]
    assert "A ring of 3 stages" in drawings.ring().body and "2 are under way" in drawings.ring().body


def test_each_lane_has_the_sums_that_the_kernel_stores():
    cells = re.findall(r'font-size="10"[^>]*>(\d+)</text>', drawings.tile().body)
    assert len(cells) == 128 and all(cells.count(str(lane)) == 4 for lane in range(32))


def test_every_drawing_is_shown_beside_a_rung_and_in_a_lesson():
    of_rungs = {rung.drawing for rung in rungs.RUNGS if rung.drawing}
    shown = [lesson.sections for lesson in lessons.all_lessons().values()]
    of_lessons = set(re.findall(r"\]\(figures/(\w+)\.svg\)", str(shown)))
    assert of_rungs == of_lessons == set(drawings.DRAWINGS)
    steps = sources.ladder_view("linear")["steps"]
    assert [bool(step["drawing"]) for step in steps] == [bool(r.drawing) for r in rungs.rungs("linear")]


def test_a_terminal_gets_the_path_of_a_drawing():
    shown = lessons.all_lessons()[3].shown("Figures")
    assert "Drawing: docs/course/figures/lanes.svg (The lines of memory" in shown and "![" not in shown
