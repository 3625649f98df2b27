"""The two halves of every op and of every weight format have the same numbered steps, and point at each other
and at their contract."""

import importlib
import re

import pytest

from lab import rungs
from lab.errors import LabError
from lab.report import twins

OPS = twins.known_ops()
FORMATS = [f"{twins.FORMATS}/{name}" for name in twins.known_formats()]
TITLE = re.compile(r"^\s*(?://|#) (\d+\. [\w ,+\-/]+):", re.M)


def test_every_op_of_the_lab_has_both_halves():
    from lab.ops import OPS as contracts

    assert sorted(OPS) == sorted(op.name for op in contracts)


def test_every_weight_format_has_both_halves():
    """A format's name begins with that of its file: by it `lab explain` finds the file."""
    from lab.formats import FORMATS as formats

    assert {name.split("-")[0] for name in formats} == set(twins.known_formats())
    for file in twins.known_formats():
        own = importlib.import_module(f"lab.formats.{file}").FORMATS
        assert {f.name for f in own} == {name for name in formats if name.split("-")[0] == file}


@pytest.mark.parametrize("op", OPS + FORMATS)
def test_steps_have_the_same_titles(op):
    cuda, triton = twins.pair(op)
    assert cuda.titles == triton.titles
    assert len(cuda.titles) >= 2
    assert [step.number for step in cuda.steps.values()] == list(range(1, len(cuda.titles) + 1))
    # The parser sees what a plain search of the file sees.
    for file in (cuda, triton):
        assert set(file.titles) == set(TITLE.findall(file.path.read_text()))


@pytest.mark.parametrize("op", OPS + FORMATS)
def test_every_step_says_something_and_has_code(op):
    for file in twins.pair(op):
        for step in file.steps.values():
            assert step.chunks and all(c.text for c in step.chunks), (
                f"{file.name}: step {step.number} has no text"
            )
            # Two steps of a format may be one expression, which stands below the second of them.
            has_code = any(c.lines or (op in FORMATS and c.below) for c in step.chunks)
            assert has_code, f"{file.name}: step {step.number} has no code"


@pytest.mark.parametrize("op", OPS)
def test_the_header_names_formula_traffic_contract_and_twin(op):
    cuda, triton = twins.pair(op)
    for file, other in ((cuda, triton), (triton, cuda)):
        assert file.header.startswith(f"{op}:")
        for word in ("mapping", "traffic", f"lab/ops/{op}.py", other.name):
            assert word in file.header, f"{file.name} does not say {word!r} at its top"


@pytest.mark.parametrize("name", FORMATS)
def test_the_header_of_a_format_names_contract_and_twin(name):
    cuda, triton = twins.pair(name)
    for file, other in ((cuda, triton), (triton, cuda)):
        assert file.header.startswith(f"{name.removeprefix('formats/')}:")
        assert f"lab/{name}.py" in file.header and other.name in file.header
        assert (twins.ROOT / f"lab/{name}.py").is_file() and (twins.ROOT / other.name).is_file()


@pytest.mark.parametrize("op", OPS + FORMATS)
def test_no_line_of_a_file_is_lost(op):
    """Header, chunks and step comments together are the file."""
    for file in twins.pair(op):
        lines = file.path.read_text().splitlines()
        for chunk in [*file.around, *(c for s in file.steps.values() for c in s.chunks)]:
            assert lines[chunk.first - 1 : chunk.first - 1 + len(chunk.lines)] == chunk.lines
        shown = {
            n
            for c in [*file.around, *(c for s in file.steps.values() for c in s.chunks)]
            for n in range(c.first, c.first + len(c.lines))
        }
        code = [n for n, line in enumerate(lines, 1) if line.strip() and not twins.COMMENT.match(line)]
        header = twins._header(file.language, lines)[1]
        assert [n for n in code if n not in shown and n > header] == []


@pytest.mark.parametrize("op", rungs.NAMES)
def test_rungs_have_the_same_titles_in_both_languages_and_in_the_table(op):
    cuda, triton, rows = twins.ladder(op)
    assert [row.title for row in rows] == [rung.title for rung in rungs.rungs(op)]
    for rung, row in zip(rungs.rungs(op), rows):
        for file, step, missing in zip((cuda, triton), row.steps, row.missing):
            if rung.own_kernel or file.language in rung.absent:
                assert step is None and missing.endswith(".")
                continue
            assert f"{step.number}. {step.title}" == rung.title
            (chunk,) = step.chunks
            assert chunk.text and (chunk.lines or chunk.below in cuda.titles), f"{file.name}: {rung.title}"


def test_a_rung_ends_with_its_kernel_or_where_the_next_begins():
    text = """// x: y = x
#include "common.cuh"

// 1. Tile: a type first
// and a kernel.
struct Tile {
};

__global__ void a_kernel(Tile t) {
}

// For rungs 2 and 3.
int shared();

// 2. Plain: in words.
//
// 3. Fast: one kernel for two rungs.
__global__ void b_kernel(int n) {
}
"""
    file = twins.cut("cuda", twins.Path("cuda_src/ladder/x.cu"), text.splitlines())
    tile, plain, fast = (step.chunks[0] for step in file.steps.values())
    assert file.name == "cuda_src/ladder/x.cu"
    assert (tile.kernel, tile.text, tile.lines[0], tile.lines[-1]) == (
        "a_kernel",
        "a type first and a kernel.",
        "struct Tile {",
        "}",
    )
    assert (plain.lines, plain.text, plain.below) == ([], "in words.", "3. Fast")
    assert (fast.kernel, fast.below, len(fast.lines)) == ("b_kernel", "", 2)
    assert file.around[1].lines == ["// For rungs 2 and 3.", "int shared();"]


def test_a_file_with_two_kernels_gives_a_chunk_for_each():
    text = """// x: y = x
#include "common.cuh"

__global__ void a_kernel(int n) {
  // 1. Locate: here
  // and there.
  int i = 0;
}

__global__ void b_kernel(int n) {
  // 1. Locate: elsewhere.
  int j = 0;
}

void x() { launch(a_kernel); }
"""
    file = twins.cut("cuda", twins.Path("x.cu"), text.splitlines())
    assert [(c.kernel, c.text, c.lines) for c in file.steps[1].chunks] == [
        ("a_kernel", "here and there.", ["  int i = 0;", "}"]),
        ("b_kernel", "elsewhere.", ["  int j = 0;", "}"]),
    ]
    assert file.around[-1].lines == ["void x() { launch(a_kernel); }"]


def test_one_number_with_two_titles_is_an_error():
    with pytest.raises(LabError, match="step 1 is called 'Load' here and 'Locate' before"):
        twins.cut("triton", twins.Path("x.py"), ["    # 1. Locate: a", "    i = 0", "    # 1. Load: b"])


def test_a_missing_kernel_is_one_line(tmp_path):
    (tmp_path / "cuda_src").mkdir()
    (tmp_path / "cuda_src" / "x.cu").write_text("// x: y\n")
    with pytest.raises(LabError, match="x has no Triton kernel"):
        twins.pair("x", tmp_path)
