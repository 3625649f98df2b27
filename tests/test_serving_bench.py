"""`lab bench serving`: what many sequences get in a queue, beside the ideal; records, comparison and page."""

import dataclasses
import random
import re
import statistics
from types import SimpleNamespace

import pytest
from report_pages import env, report
from test_harness import tiny  # noqa: F401

from lab.cli import main
from lab.harness import serving_bench
from lab.harness.serving_bench import ANSWER, PROMPT, requests
from lab.records import compare, schema
from lab.records.schema import ServingRow
from lab.report import load


def lab(*words):
    return main([str(word) for word in words])


WORDS = ("bench", "serving", "tiny", "--backend", "torch", "--device", "cpu", "--seconds", "0.01")


@pytest.mark.parametrize("drawn", [PROMPT, ANSWER])
def test_lengths_are_those_of_the_trace(drawn):
    rand = random.Random(1)
    lengths = [drawn.draw(rand, 1.0) for _ in range(20_000)]
    assert statistics.median(lengths) == pytest.approx(drawn.median, rel=0.03)
    assert max(lengths) == drawn.most
    # A log-normal distribution has more above the 99th percentile of the trace, which is cut.
    assert 0.8 * drawn.mean < statistics.mean(lengths) < 1.02 * drawn.mean
    assert min(drawn.draw(rand, 1e-6) for _ in range(9)) == 1


def test_the_same_sequences_every_time_and_none_too_long():
    first = requests(50, 257, 1.0, 1500)
    assert first == requests(50, 257, 1.0, 1500) and first[:20] == requests(20, 257, 1.0, 1500)
    assert max(len(prompt) + answer for prompt, answer in first) == 1500
    assert all(0 <= token < 257 for prompt, _ in first for token in prompt)


def test_rows_of_many_sequences(tiny, tmp_path, capsys):  # noqa: F811
    assert lab(*WORDS, "--batch", "1,3", "--out", tmp_path) == 0
    assert "3 rows: " in capsys.readouterr().out
    rows = schema.read(tmp_path).of_kind("serving")
    assert [row.batch for row in rows] == [1, 3] and not any(row.error for row in rows)
    for row in rows:
        assert (
            row.emulated and row.timer == "wall" and row.plan == "basic" and row.lengths == "azure-chat-2023"
        )
        assert row.us_p10 <= row.us <= row.us_p90 and 0 <= row.prefill_share < 1
        assert row.tokens_per_s == pytest.approx(row.tokens / row.seconds, rel=1e-3)
        assert row.ideal_tokens_per_s == pytest.approx(row.batch / row.graph_us * 1e6, rel=1e-3)
        assert row.of_ideal == pytest.approx(row.tokens_per_s / row.ideal_tokens_per_s, rel=1e-3)
        assert row.of_graph == pytest.approx(row.us / row.graph_us, rel=1e-3)
        assert row.n <= row.tokens / row.batch and 0.5 < row.rows_used <= 1 and row.sequences > 3 * row.batch
    # What the numbers say together: steps and prefills are all the time there is.
    one = rows[0]
    assert one.rows_used == 1 and one.n == pytest.approx((one.tokens - one.sequences) / 5, abs=2)
    assert rows[1].after_prefill_us > 0
    assert lab("compare", tmp_path, tmp_path) == 0 and "2 rows: 2 same" in capsys.readouterr().out
    assert report(tmp_path, tmp_path / "page") == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Many sequences of tiny get" in page and "tiny: many sequences in one queue" in page


def test_what_is_measured_has_no_beginning_and_no_end():
    """Steps from the first one to the last before which sequences waited."""

    class Queue:
        def __init__(self):
            self.waiting, self.task = [1, 2, 3], SimpleNamespace(prompt_ids=[5] * 7, launched=0)

        def step(self):
            self.waiting.pop()
            self.task.launched += 1
            mark = SimpleNamespace(wait=lambda: None)
            self.in_flight = SimpleNamespace(begin=mark, end=mark, tasks=[(0, self.task)])

    steps = serving_bench.run(Queue())
    assert [step.contexts for step in steps] == [[7], [8], [9]]
    assert all(step.after_prefill for step in steps), "each begins at a mark of its own"


@pytest.mark.parametrize("count, kept", [(0, []), (1, [0]), (4, [1, 2]), (10, [4, 5])])
def test_a_graph_is_compared_with_steps_of_its_contexts(count, kept):
    steps = [serving_bench.Step(None, None, [tokens, 1], False) for tokens in range(count)]
    random.Random(0).shuffle(steps)
    assert [step.contexts[0] for step in serving_bench.near_the_median(steps)] == kept


@pytest.mark.parametrize(
    "words, said",
    [
        (("--context", "64"), "draws the lengths"),
        (("--batch", "2", "--plan", "persistent", "--dtype", "bf16"), "one sequence"),
    ],
)
def test_what_it_does_not_take_is_one_line(tiny, tmp_path, capsys, words, said):  # noqa: F811
    assert lab(*WORDS, *words, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / schema.FILE).exists()


def test_a_row_that_fails_costs_no_other(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    measured = serving_bench.sum_up

    def fails(row, *more):
        if row.batch == 2:
            raise RuntimeError("out of memory")
        measured(row, *more)

    monkeypatch.setattr(serving_bench, "sum_up", fails)
    assert lab(*WORDS, "--batch", "1,2", "--out", tmp_path) == 0
    good, bad = schema.read(tmp_path).of_kind("serving")
    assert good.error is None and bad.error.endswith("out of memory") and bad.tokens_per_s is None


ROW = ServingRow(
    "r",
    "m",
    "cuda",
    "fused",
    "bf16",
    16,
    "azure-chat-2023",
    1.0,
    us=1020.0,
    us_p10=1000.0,
    us_p90=1050.0,
    n=900,
    graph_us=1000.0,
    of_graph=1.02,
    tokens_per_s=12000.0,
    ideal_tokens_per_s=16000.0,
    of_ideal=0.75,
    rows_used=0.99,
    prefill_share=0.23,
)


def test_a_page_of_a_gpu_s_rows(tmp_path):
    rows = [
        ROW,
        dataclasses.replace(ROW, batch=1, tokens_per_s=900.0),
        dataclasses.replace(ROW, backend="triton"),
    ]
    with schema.Writer(tmp_path) as writer:
        writer.append(env(), *rows)
    (run,) = load.load(tmp_path)
    assert len(run.serving) == 3 and not run.emulated
    assert not [n.text for n in run.notices if "ceiling" in n.text or "No op" in n.text]
    assert report(tmp_path, tmp_path / "page") == 0
    page = re.sub(r"\s+", " ", (tmp_path / "page" / "index.html").read_text())
    assert "At 16 rows: CUDA 75% of the ideal, a step +2.0% on its graph" in page
    assert "m-serving.svg" in (tmp_path / "page" / "README.md").read_text()
    slower = dataclasses.replace(ROW, us=1200.0, us_p10=1190.0, us_p90=1210.0)
    (pair,), _, _ = compare.match([ROW], [slower])
    assert pair.verdict == compare.SLOWER and "b16 queue, azure-chat-2023" in compare.label(slower)


@pytest.mark.gpu
def test_a_token_costs_in_the_queue_what_its_graph_costs(tmp_path):
    """The host prepares a step while the device works on the one before, so it costs at most a few per cent
    more (2 were asked for; other work on the machine may add some)."""
    words = [
        "serving",
        "llama-3.2-1b",
        "--backend",
        "cuda",
        "--batch",
        "1,8,64",
        "--quick",
        "--out",
        str(tmp_path),
    ]
    assert lab("bench", *words) == 0
    for row in schema.read(tmp_path).of_kind("serving"):
        assert not row.emulated and row.scale == 1 and 0.9 < row.of_graph < 1.05
