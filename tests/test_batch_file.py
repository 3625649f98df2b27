"""`lab run --batch-file`: strict reading of its lines, and answers in their order."""

import json

import pytest

from lab import cli
from lab.errors import LabError
from lab.model.batch_file import read_batch
from lab.model.sampling import Sampling
from tests.tiny_models import CONFIGS, write_folder


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a", "temprature": 1}', "did you mean temperature"),
        ('{"prompt": "a", "prompt": "b"}', "twice"),
        ('{"prompt": "a", "ids": [1]}', "exactly one of"),
        ('{"temperature": 1}', "exactly one of"),
        ('{"prompt": 5}', "must be a string"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"ids": [1, true]}', "whole numbers"),
        ('{"messages": [{"role": "user"}]}', "messages must be"),
        ('{"messages": []}', "messages must be"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature"),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "top_p": 2}', "top_p"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        ('{"prompt": "a", "logit_bias": {"1": true}}', "logit_bias"),
        ("[1]", "expected an object"),
        ("{", "no JSON"),
        ("[" * 100000, "no JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(LabError, match="line 3") as caught:
        read_batch(str(path), 8, Sampling())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_changes_what_it_names(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [1], "seed": 4, "logit_bias": {"3": 2}, "max_new_tokens": 5}\n{"prompt": "b"}')
    first, second = read_batch(str(path), 8, Sampling(0.5))
    assert first.sampling == Sampling(0.5, seed=4, logit_bias=((3, 2),)) and first.max_new_tokens == 5
    assert second.sampling == Sampling(0.5) and second.max_new_tokens == 8
    path.write_text("\n")
    with pytest.raises(LabError, match="no prompts"):
        read_batch(str(path), 8, Sampling())


def test_answers_come_in_the_order_of_the_lines(tmp_path, capsys):
    folder, path = tmp_path / "model", tmp_path / "prompts.jsonl"
    write_folder(folder, CONFIGS["llama"])
    lengths = [9, 1, 4, 2, 7]
    path.write_text("".join(json.dumps({"ids": [n, 3], "max_new_tokens": n}) + "\n" for n in lengths))
    words = ["run", str(folder), "--backend", "torch", "--device", "cpu", "--batch-file", str(path)]
    assert cli.main([*words, "--batch", "2", "--logprobs", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert [len(line["output_ids"]) for line in lines] == lengths == [len(line["logprobs"]) for line in lines]
    path.write_text('{"ids": [999999]}')
    assert cli.main(words) == 2
    assert "line 1: token id 999999" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said", [("--batch 4", "goes with --batch-file"), ("--raw", "goes with texts")]
)
def test_an_option_that_would_be_ignored_is_refused(words, said, capsys):
    given = f"run smollm2-135m --weights random --device cpu --backend torch --ids 1 {words}"
    assert cli.main(given.split()) == 2
    assert said in capsys.readouterr().err
