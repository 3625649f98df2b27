"""The report of what several GPUs did: it stands apart from what one GPU did."""

import pytest

from lab.records import schema
from lab.records.schema import Ceiling, ModelRow, OpRow
from lab.report import build, load, parallel_figures


@pytest.fixture
def run(tmp_path):
    op = dict(dtype="bf16", batch=1, cache="warm", timer="graph", n=5)
    rows = [
        Ceiling("r", "link word", "cuda", 8, us=1.0, best=True),
        Ceiling("r", "link write", "cuda", 1 << 20, us=10.0, gbps=100.0, best=True),
        OpRow("r", "all_reduce_add", "cuda", shape={"n": 50_000, "ranks": 2}, us=6.0, **op),
        OpRow("r", "all_reduce_add", "cuda", shape={"n": 50_000, "ranks": 2, "shots": 2}, us=4.0, **op),
        OpRow("r", "all_reduce_add", "nccl", shape={"n": 50_000, "ranks": 2}, us=12.0, **op),
        ModelRow("r", "m", "cuda", "fused", "graph", "bf16", 1, 64, us=9.0, ranks=2),
    ]
    (tmp_path / schema.FILE).write_text("".join(schema.to_line(row) + "\n" for row in rows))
    return load.load(tmp_path)[0]


def test_an_exchange_is_set_against_what_the_link_allows(run):
    """100,000 bytes travel as 200,000 with their tags: 2 us at 100 GB/s, and 1 us for a word."""
    found = parallel_figures.exchanges(run)
    assert list(found["bytes"]) == [100_000.0] * 3 and set(found["floor_us"]) == {3.0}
    assert list(found["of_floor"]) == [50.0, 75.0, 25.0]
    figure = parallel_figures.exchange(run)
    assert "CUDA 6 us, NCCL 12 us" in figure.reading and len(figure.table) == 3
    titles = [title for title, _ in parallel_figures.tables(run)]
    assert titles == ["A token of models that several GPUs divide", "The link between two GPUs"]


def test_rows_of_several_gpus_are_not_among_those_of_one(run):
    assert not len(run.op) and not len(run.model) and not len(run.ceiling)
    assert len(run.between) == 3 and len(run.divided) == 1 and len(run.links) == 2
    assert not any("No op, model or ledger" in notice.text for notice in run.notices)


def test_a_page_of_exchanges_alone_is_drawn(run, tmp_path):
    build.report(run.path.parent, tmp_path / "page", None)
    page = (tmp_path / "page" / "index.html").read_text()
    assert "A sum over 2 GPUs, added to the residual" in page and "The link between two GPUs" in page
