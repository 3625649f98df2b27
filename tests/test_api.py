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
from lab.model.kv_cache import PagedKVCache
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


def test_each_prompt_has_its_own_sampling(device):
    """Twice as many prompts as rows, which begin alike: answers are those that each gets alone, in order."""
    begin = list(range(100, 140))
    prompts = [[*begin, 1], [2], [*begin, 3], [4, 5], [*begin, 1], [2]]
    each = [
        lab.Sampling(),
        lab.Sampling(1.0, seed=7),
        lab.Sampling(1.2, top_k=20, seed=8),
        lab.Sampling(repetition_penalty=1.3),
        lab.Sampling(logprobs=2),
        lab.Sampling(1.0, seed=9),
    ]
    llm, alone = tiny(device, max_batch=3), tiny(device, max_batch=1)
    together = llm.generate(prompts, each, max_new_tokens=9)
    for prompt, sampling, result in zip(prompts, each, together):
        want = alone.generate([prompt], [sampling], max_new_tokens=9)[0]
        assert result.output_ids == want.output_ids and result.prompt_ids == prompt
    assert together[1].output_ids != together[5].output_ids, "another seed"
    assert [len(result.logprobs) for result in together] == [0, 0, 0, 0, 9, 0]
    assert together[4].output_ids == together[0].output_ids
    assert len(llm._decoder.cache.free) == llm._decoder.cache.pages


def test_one_sampling_for_all_draws_each_answer_anew(device):
    results = tiny(device).generate([[1, 2]] * 3, lab.Sampling(1.0, seed=5), max_new_tokens=8)
    drawn = [result.output_ids for result in results]
    alone = tiny(device).generate([[1, 2]], lab.Sampling(1.0, seed=6), max_new_tokens=8)[0].output_ids
    assert drawn[0] != drawn[1] == alone


def test_rows_and_pages_are_taken_in_turns(device):
    """A short answer's row goes to the next prompt while a long one is still decoded: no waves."""
    llm, order = tiny(device, max_batch=2), []
    stops = llm.generate([[5]], max_new_tokens=30)[0].output_ids
    stop = stops[2]

    class Words:  # a tokenizer whose end token is one that the first answers reach soon
        eos, chat_template = (stop,), None

        class Stream:
            def push(self, token):
                return f"{token} "

            def finish(self):
                return "."

        def stream(self, late):
            return self.Stream()

    llm.tokenizer = Words()
    prompts = [[5], [7, 8, 9], [5], [5], [5]]
    results = llm.generate(prompts, max_new_tokens=24, on_text=lambda i, text: order.append(i))
    alone = [llm.generate([prompt], max_new_tokens=24)[0] for prompt in prompts]
    assert [r.output_ids for r in results] == [r.output_ids for r in alone]
    assert [r.text for r in results] == [r.text for r in alone] and results[0].text.endswith(" .")
    assert len(results[1].output_ids) > len(results[0].output_ids) + len(results[2].output_ids)
    last = len(order) - 1 - order[::-1].index(1)
    assert order.index(3) < last, "the third answer began before the second had ended"


def test_a_decoder_is_used_again_while_it_is_large_enough(device):
    llm = tiny(device)
    llm.generate([[1, 2], [3]], max_new_tokens=8)
    first = llm._decoder
    llm.generate([[4]], max_new_tokens=4)
    assert llm._decoder is first
    llm.generate([[4]] * 3, max_new_tokens=4)
    assert llm._decoder is not first and llm._decoder.batch == 3


def test_an_interrupted_call_leaves_nothing_to_the_next(device, monkeypatch):
    """Interrupted just after a page was taken and before its sequence has it."""
    llm = tiny(device)
    want = llm.generate([[1, 2]], max_new_tokens=250)[0].output_ids

    def interrupted(cache, wanted):
        cache.free.pop()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PagedKVCache, "reserve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1, 2]], max_new_tokens=250)
    assert llm.generate([[1, 2]], max_new_tokens=250)[0].output_ids == want


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
        ([[1]], {"max_new_tokens": 2.5}, "whole number"),
        ([[3.7]], {}, "whole numbers"),
        ([list(range(257))], {}, "257 tokens"),
        ([[1], [2]], {"sampling": [lab.Sampling()]}, "1 samplings for 2 prompts"),
        ([[1]], {"sampling": [0.7]}, "must be a Sampling"),
        ([[1]], {"sampling": 0.7}, "must be a Sampling"),
        ([[1]], {"sampling": lab.Sampling(logit_bias=((272, 1.0),))}, "outside the vocabulary"),
    ],
)
def test_mistakes_are_one_line(prompts, options, says):
    with pytest.raises(lab.LabError, match=says) as caught:
        tiny("cpu").generate(prompts, **options)
    assert "\n" not in str(caught.value)


def test_load_reads_a_folder_and_refuses_bad_options(tmp_path, monkeypatch):
    write_folder(tmp_path, CONFIGS["llama"])
    llm = lab.load(str(tmp_path), "torch", device="cpu", max_batch=1)
    assert llm.weights.dtype == torch.float32
    assert len(llm.generate([[1, 2]], lab.Sampling(temperature=1.0, seed=4), 3)[0].output_ids) == 3
    monkeypatch.setattr("lab.api.load_weights", lambda *_: pytest.fail("weights were loaded"))
    for options, says in (
        (dict(backend="cudnn"), "backend"),
        (dict(backend="torch", device="tpu"), "device"),
        (dict(backend="torch", dtype="fp8"), "dtype"),
        (dict(backend="torch", max_batch=0), "max_batch"),
        (dict(backend="torch", plan="persistent", dtype="bf16"), "one sequence"),
        (dict(backend="torch", kv_dtype="int2"), "KV dtype"),
        (dict(backend="tritom"), "did you mean triton"),
        (dict(backend="torch", plan="fussed"), "did you mean fused"),
        (dict(backend="torch", dtype="bf61"), "did you mean bf16"),
        (dict(backend="torch", quantise="int4_g128"), "did you mean int4-g128"),
        (dict(backend="torch", quantise_head="int8"), "needs --quantise"),
        (dict(backend="torch", weights_as="fp32", dtype="bf16"), "contradict"),
        (dict(backend="torch", overrides={"rop": "cuda"}), "did you mean rope"),
    ):
        with pytest.raises(lab.LabError, match=says) as caught:
            lab.load(str(tmp_path), **options)
        assert "\n" not in str(caught.value)


@pytest.mark.real_model
def test_a_real_model_answers():
    llm = lab.load("smollm2-135m", backend="torch", device="cpu")
    pieces = {0: "", 1: ""}

    def show(i, text):
        pieces[i] += text

    results = llm.generate(["What is the capital of France?", "Hello"], max_new_tokens=8, on_text=show)
    assert results[0].text == "The capital of France is Paris." and results[0].stopped_by == "stop"
    assert [pieces[0], pieces[1]] == [result.text for result in results]
