"""Sampling that users ask for: min-p and parameters of each row by the op, penalties, biases and
log-probabilities by the step around it."""

from collections import Counter

import pytest
import torch

from lab import cli
from lab.contract import BACKENDS
from lab.dispatch import select
from lab.errors import LabError
from lab.model.decoder import Decoder
from lab.model.generate import generate, generate_batch
from lab.model.sampling import GREEDY, ByRow, RowSampling, Sampling
from lab.model.sources.random import RandomSource
from lab.model.weights import load
from lab.ops.sample import options_of, table_row
from tests.tiny_models import LLAMA

ROWS = {"cuda": 1 << 11, "triton": 16, "torch": 1 << 13}
MASSES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])


def drawn(backend, device, options, rows):
    """Tokens of rows with the same logits, each with the same options but a seed of its own."""
    table = [
        table_row(**{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options, "seed": seed}) for seed in range(rows)
    ]
    return select(backend, device, {"sample": backend}).sample(
        MASSES.log().expand(rows, -1).contiguous().to(device),
        torch.full((rows,), 7, dtype=torch.int32, device=device),
        table=torch.tensor(table, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(temperature=1.0), 5),
        (dict(temperature=1.0, min_p=0.26), 2),
        (dict(temperature=2.0, min_p=0.49), 3),  # masses then are as their square roots
        (dict(temperature=1.0, top_k=2), 2),
        (dict(temperature=1.0, top_p=0.8), 3),
        (dict(temperature=0.0), 1),
    ],
)
def test_rows_draw_from_what_their_own_parameters_keep(backend, device, options, kept):
    rows = ROWS[backend] if device == "cpu" else 1 << 13
    p = MASSES.double() ** (1 / max(options["temperature"], 1e-3))
    p[kept:] = 0
    counts = torch.bincount(drawn(backend, device, options, rows).cpu(), minlength=5).double()
    expected = p / p.sum() * rows
    assert counts[kept:].sum() == 0
    statistic = float(((counts - expected) ** 2)[:kept].div(expected[:kept]).sum())
    assert statistic <= kept - 1 + 5 * (2 * (kept - 1)) ** 0.5 + 1e-9


def test_a_row_draws_the_same_wherever_it_stands(device):
    one = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=(1 << 63) + 5)
    logits = torch.randn(1, 300, device=device)
    table = torch.tensor([table_row(**one)] * 9, dtype=torch.int32, device=device)
    position = torch.full((9,), 3, dtype=torch.int32, device=device)
    tokens = select("torch", device).sample(logits.expand(9, -1).contiguous(), position, table=table)
    assert len(set(tokens.tolist())) == 1
    assert options_of(table[0].cpu()) == one


def test_options_out_of_range_are_refused():
    for wrong in (
        dict(min_p=1.1),
        dict(repetition_penalty=0),
        dict(presence_penalty=float("nan")),
        dict(frequency_penalty=1e9),
        dict(logit_bias=((1, float("inf")),)),
        dict(logit_bias=((1, 1.0), (1, 2.0))),
        dict(logit_bias={1: 1.0}),
        dict(logit_bias=((1, "a"),)),
        dict(logprobs=21),
        dict(top_k=1.5),
        dict(temperature=True),
    ):
        with pytest.raises(LabError):
            Sampling(**wrong)
    with pytest.raises(LabError, match="outside the vocabulary"):
        RowSampling(1, 10, "cpu").set(0, Sampling(logit_bias=((10, 1.0),)), [])


def test_penalties_and_biases_are_those_of_their_formulas():
    rows = RowSampling(2, 6, "cpu")
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((5, 3.0),)
    )
    rows.set(0, sampling, [0, 1, 1], [1, 2, 2])
    rows.set(1, GREEDY, [0], [])
    logits = torch.tensor([[1.0, -1.0, 2.0, 2.0, float("-inf"), 0.0]] * 2)
    want = [0.5, -2 - 0.5 - 0.25, 1 - 0.5 - 0.5, 2.0, float("-inf"), 3.0]
    assert rows.adjust(logits)[0].tolist() == want
    assert torch.equal(rows.adjust(logits)[1], logits[1])
    rows.count(torch.tensor([3, 3], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32))
    assert rows.counts.tolist() == [[0, 1, 2, 1, 0, 0], [0] * 6]


def tiny(device, backend="torch", plan="basic", batch=3):
    weights = load(RandomSource(LLAMA), torch.float32, device)
    return Decoder(weights, select(backend, device), batch, 64, plan=plan)


@pytest.mark.parametrize("plan", ["basic", "fused"])
def test_a_model_obeys_penalties_and_biases(device, plan):
    decoder = tiny(device, plan=plan)
    plain = generate(decoder, [1, 2, 3], 24)
    without = generate(decoder, [1, 2, 3], 24, Sampling(frequency_penalty=100.0))
    assert max(Counter(without.output_ids).values()) == 1
    banned = plain.output_ids[0]
    biased = generate(decoder, [1, 2, 3], 24, Sampling(logit_bias=((banned, -1e9), (9, 1e9))))
    assert biased.output_ids == [9] * 24
    assert generate(decoder, [1, 2, 3], 24).output_ids == plain.output_ids


@pytest.mark.parametrize("plan", ["basic", "fused"])
def test_log_probabilities_are_those_of_the_logits(device, plan):
    decoder, prompts = tiny(device, plan=plan), [[1, 2, 3], [5]]
    got = generate_batch(decoder, prompts, 4, Sampling(logprobs=3, repetition_penalty=1.5))
    for result in got:
        from lab.model.generate import teacher_forced_logits

        ids = result.prompt_ids + result.output_ids[:-1]
        want = teacher_forced_logits(decoder, ids)[len(result.prompt_ids) - 1 :].log_softmax(-1)
        for (own, top), token, row in zip(result.logprobs, result.output_ids, want):
            assert own == pytest.approx(float(row[token]), abs=1e-4)
            assert list(top) == row.topk(3).indices.tolist()
    assert len(got[0].logprobs) == 4


def test_penalties_that_a_step_allocates_may_be_set_after_it():
    rows = RowSampling(2, 10, "cpu")
    with torch.inference_mode():  # as Decoder.prepare() does on a GPU, before any row is set
        rows.allocate_penalties()
    rows.set(1, Sampling(repetition_penalty=1.5), [3])
    assert rows.penalties[0, :, 0].tolist() == [1.0, 1.5] and rows.in_prompt[1].nonzero().tolist() == [[3]]


def test_greedy_rows_take_todays_step():
    """A batch that asks for nothing runs the kernels of a greedy step and no others."""
    assert ByRow.of([GREEDY, Sampling(seed=3, top_k=5)]) == GREEDY
    assert ByRow.of([GREEDY, Sampling(0.5)]) == ByRow(draws=True)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--temperature 0.5", "each rank has a part of the logits"),
        ("--presence-penalty 1", "each rank has a part of the logits"),
        ("--logit-bias 3=1", "each rank has a part of the logits"),
        ("--logprobs 0 --json there.json", "each rank has a part of the logits"),
        ("--batch-file some.jsonl", "--tensor-parallel does not go with --batch-file"),
    ],
)
def test_what_needs_all_logits_is_refused_where_ranks_divide_them(words, said, capsys):
    given = "run smollm2-135m --weights random --device cpu --backend torch --tensor-parallel 2"
    source = [] if "batch-file" in words else ["--ids", "1"]
    assert cli.main([*given.split(), *source, *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lab: error: ") and said in line


def test_a_step_knows_whether_it_needs_all_logits():
    assert not GREEDY.needs_all_logits and not ByRow().needs_all_logits
    for sampling in (Sampling(logprobs=0), Sampling(0.5), ByRow(logprobs=True), ByRow(draws=True)):
        assert sampling.needs_all_logits
