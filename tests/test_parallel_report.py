"""The report of what several GPUs did: it stands apart from what one GPU did."""

import pytest

from lab.records import schema
from lab.records.schema import Ceiling, Env, ModelRow, OpRow
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


def stored(folder, *runs):
    """Runs of (id, settings, rows, commit), each with an env row."""
    lines = []
    for name, settings, rows, commit in runs:
        env = Env(name, when="before", device="cuda", gpu="H100", time=name, commit=commit, settings=settings)
        env.notes = ["The GPU throttled."] if name == "1" else []
        lines += [schema.to_line(row) + "\n" for row in (env, *rows)]
    (folder / schema.FILE).write_text("".join(lines))
    return load.load(folder)


def token(run, backend, us, ranks=1):
    return ModelRow(
        run, "m", backend, "fused", "graph", "bf16", 1, 64, us=us, us_p10=us, us_p90=us, n=9, ranks=ranks
    )


def test_runs_of_several_gpus_join_that_of_one_on_the_same_machine_and_commit(tmp_path):
    """A command for each number of GPUs makes a run of its own; the page shows one."""
    one = "3", {}, [token("3", "cuda", 10.0)], "abc"
    two = "1", {"ranks": 2}, [token("1", "cuda", 6.0, 2), token("1", "cuda+nccl", 8.0, 2)], "abc"
    other = "2", {"ranks": 2}, [token("2", "cuda", 7.0, 2)], "def"
    found = {run.id: run for run in stored(tmp_path, two, other, one)}
    assert set(found) == {"2", "3"}, "another commit's run stays apart"
    run = found["3"]
    assert list(run.model["us"]) == [10.0] and list(run.divided["us"]) == [6.0, 8.0]
    said = [notice.text for notice in run.notices]
    assert "Run 1, of several GPUs of this machine, is shown, too." in said
    assert "In run 1: The GPU throttled." in said and not any("In run 1: No env" in text for text in said)
    assert parallel_figures.sentence(run) == (
        "Divided among 2 GPUs a token of m takes 6.00 us with CUDA fused, 8.00 us with CUDA + NCCL fused: "
        "1.67 times as fast as one GPU."
    )
    figure = parallel_figures.tokens(run)
    assert [float(gpus) for gpus in parallel_figures.tokens_of(run, "m")["gpus"]] == [1.0, 2.0, 2.0]
    assert "CUDA fused, 1 GPU 10.0 us" in figure.alt and "CUDA fused, 2 GPUs 6.00 us" in figure.alt
    assert len(found["2"].divided) == 1 and not len(found["2"].model)


def test_tokens_are_compared_at_one_dtype_one_size_and_one_storage(tmp_path):
    """What one GPU did in another dtype, or with packed weights or caches, is set beside nothing."""
    packed, cache = token("3", "cuda", 4.0), token("3", "cuda", 5.0)
    packed.weight_format, cache.kv_dtype = "int4-g128", "fp8"
    others = [token("3", "cuda", us) for us in (20.0, 30.0)]
    others[0].dtype, others[1].batch = "fp32", 2
    four = "2", {"ranks": 4}, [token("2", "triton", 5.0, 4)], "abc"
    two = [token("1", "cuda+nccl", 3.0, 2), token("1", "cuda", 6.0, 2), token("1", "cuda", 9.0, 2)]
    two[2].dtype = "fp32"
    one = "3", {}, [packed, cache, *others], "abc"
    (run,) = stored(tmp_path, ("1", {"ranks": 2}, two, "abc"), four, one)
    rows = parallel_figures.tokens_of(run, "m")
    assert set(rows["us"]) == {3.0, 5.0, 6.0} and set(rows["dtype"]) == {"bf16"}
    said = "Divided among 4 GPUs a token of m takes 5.00 us with Triton fused."
    assert parallel_figures.sentence(run) == said
    figure = parallel_figures.tokens(run)
    assert figure.title == "One token on 2 and 4 GPUs, bf16, batch 1, context 64"
    assert "--tensor-parallel 1,2,4" in figure.command


def test_a_run_of_several_gpus_alone_says_so_first(tmp_path):
    stored(tmp_path, ("1", {"ranks": 2}, [token("1", "triton", 6.0, 2)], "abc"))
    build.report(tmp_path, tmp_path / "page", None)
    page = (tmp_path / "page" / "README.md").read_text()
    assert "Divided among 2 GPUs a token of m takes 6.00 us with Triton fused." in page
    assert "Nothing was measured" not in page
    assert page.count("![Bars") == 1, "its picture is the first, and stands nowhere else"
