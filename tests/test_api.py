"""`import lab`: what it costs, and a model in two lines of Python."""

import inspect
import subprocess
import sys

import pytest
import torch
from tiny_models import CONFIGS, write_folder

import lab
from lab.api import LLM
from lab.dispatch import Trace
from lab.model.sources.random import RandomSource
from lab.model.weights import load as load_weights


def tiny(device, trace=None, **options) -> LLM:
    weights = load_weights(RandomSource(CONFIGS["llama"], seed=3), torch.float32, device)
    return LLM(weights, lab.select("torch", device, trace=trace), **options)


def test_import_lab_and_help_do_not_wait_for_torch():
    code = "import lab, lab.cli, sys; dir(lab); sys.exit('torch' in sys.modules or 'typing' in vars(lab))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import lab; lab.Sampling; import sys; sys.exit('lab.api' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_there_and_documented():
    assert set(lab._MODULES) == set(lab.__all__) <= set(dir(lab))
    for name in lab.__all__:
        assert inspect.getdoc(getattr(lab, name)), name
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        lab.lod


def test_an_op_has_the_signature_and_the_text_of_its_contract():
    rmsnorm = lab.select("torch").rmsnorm
    assert list(inspect.signature(rmsnorm).parameters) == ["x", "w", "eps", "residual", "out"]
    assert rmsnorm.__name__ == "rmsnorm" and "w [cols]" in rmsnorm.__doc__


def test_any_number_of_prompts_in_their_order(device):
    """More prompts than rows, of several lengths: each answer is that of the prompt alone."""
    prompts = [[5], [7, 8, 9], [100, 3], list(range(40)), [11]]
    together = tiny(device, max_batch=2).generate(prompts, max_new_tokens=6)
    alone = tiny(device)
    for prompt, result in zip(prompts, together):
        want = alone.generate([prompt], max_new_tokens=6)[0]
        assert result.prompt_ids == prompt and result.output_ids == want.output_ids
        assert len(result.output_ids) == 6 and result.stopped_by == "length" and result.text is None
    assert alone.generate([]) == []


def test_a_decoder_is_used_again_while_it_is_large_enough(device):
    llm = tiny(device)
    llm.generate([[1, 2], [3]], max_new_tokens=8)
    first = llm._decoder
    llm.generate([[4]], max_new_tokens=4)
    assert llm._decoder is first
    llm.generate([[4]] * 3, max_new_tokens=4)
    assert llm._decoder is not first and llm._decoder.batch == 3


def test_the_trace_is_of_one_call(device):
    llm = tiny(device, Trace())
    counts = [llm.generate([[1]], max_new_tokens=n)[0].kernels for n in (4, 4)]
    assert counts[0] == counts[1] and counts[0]


def test_it_stops_at_the_longest_context(device):
    llm = tiny(device)
    result = llm.generate([list(range(250))], max_new_tokens=50)[0]
    assert result.stopped_by == "length" and len(result.output_ids) == 256 - 250 + 1


@pytest.mark.parametrize(
    "prompts, options, says",
    [
        ("Hello", {}, r"generate\(\[text\]\)"),
        (["Hello"], {}, "token ids"),
        ([[]], {}, "empty"),
        ([[1], [272]], {}, "outside the vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([list(range(257))], {}, "257 tokens"),
    ],
)
def test_mistakes_are_one_line(prompts, options, says):
    with pytest.raises(lab.LabError, match=says) as caught:
        tiny("cpu").generate(prompts, **options)
    assert "\n" not in str(caught.value)


def test_load_reads_a_folder_and_refuses_bad_options(tmp_path):
    write_folder(tmp_path, CONFIGS["llama"])
    llm = lab.load(str(tmp_path), "torch", device="cpu", max_batch=1)
    assert llm.weights.dtype == torch.float32
    assert len(llm.generate([[1, 2]], lab.Sampling(temperature=1.0, seed=4), 3)[0].output_ids) == 3
    for options, says in (
        (dict(backend="cudnn"), "backend"),
        (dict(backend="torch", device="tpu"), "device"),
        (dict(backend="torch", dtype="fp8"), "dtype"),
        (dict(backend="torch", max_batch=0), "max_batch"),
        (dict(backend="torch", plan="persistent", dtype="bf16"), "one sequence"),
        (dict(backend="torch", kv_dtype="int2"), "KV dtype"),
    ):
        with pytest.raises(lab.LabError, match=says):
            lab.load(str(tmp_path), **options)


@pytest.mark.real_model
def test_a_real_model_answers():
    llm = lab.load("smollm2-135m", backend="torch", device="cpu")
    pieces = {0: "", 1: ""}

    def show(i, text):
        pieces[i] += text

    results = llm.generate(["What is the capital of France?", "Hello"], max_new_tokens=8, on_text=show)
    assert results[0].text == "The capital of France is Paris." and results[0].stopped_by == "stop"
    assert [pieces[0], pieces[1]] == [result.text for result in results]
