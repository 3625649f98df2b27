"""The model against Hugging Face transformers: tiny models of every architecture, and SmolLM2-135M's real
weights.

`make oracle` runs these. The oracle reads the same file in float32 and gets the same ids.
"""

import os
import time

import pytest
import torch
from tiny_models import CONFIGS, write_folder

from lab.dispatch import select
from lab.model.decoder import Decoder
from lab.model.generate import generate, teacher_forced_logits
from lab.model.sources import DEFAULT_FILE, default_model_file, open_source
from lab.model.weight_formats import EXPANDED, Storage
from lab.model.weights import load

pytestmark = pytest.mark.oracle

LIMIT = 1e-3  # largest logit difference allowed in float32; the logits of SmolLM2 reach about 30
SECONDS = 180  # what interpreted Triton may take
QUESTION = "What is the capital of France?"
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]
TEXT = (
    "The city lies on the river Seine, in the north of the country. About two million people live there, "
    "and many more come every year to see its museums, its bridges and its food."
)
PROMPTS = [
    QUESTION,
    "Write one sentence about the sea.",
    "Name three colours.",
    "What is 2 + 2?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "List the seasons.",
    "What does a compiler do?",
    "Tell me a joke.",
]


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_tiny_models(tmp_path, name, style):
    """config.json means the same to both: as transformers 4 wrote it, and as transformers 5 writes it."""
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "tiny", CONFIGS[name], shards=2)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if style == "rope_parameters":
        oracle.save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    ids = [int(i) for i in torch.randint(0, 272, (90,), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        want = oracle(torch.tensor([ids])).logits[0]
    decoder = Decoder(load(open_source(str(folder))), select("torch", "cpu"), max_context=96)
    assert (teacher_forced_logits(decoder, ids, prefilled=10) - want[10:]).abs().max() < 2e-5


@pytest.fixture(scope="module")
def oracle():
    """SmolLM2-135M by transformers, float32, on the CPU (about 25 s)."""
    from transformers import AutoModelForCausalLM

    path = default_model_file()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=DEFAULT_FILE, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def model(device):
    """(tokenizer, weights) of the same file, float32, on the device of the tests."""
    source = open_source("smollm2-135m")
    stored = load(source, torch.float32, device)
    # torch has no product for packed weights and would expand them in every step.
    return source.tokenizer(), {
        "torch": load(source, torch.float32, device, EXPANDED),
        "cuda": stored,
        "triton": stored,
    }


@pytest.fixture(scope="module")
def forced(oracle, model):
    """(ids, prompt length, the oracle's logits at each of the 32 forced ids)."""
    tokenizer, _ = model
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    answer = tokenizer.encode(TEXT)[:32]
    assert len(answer) == 32
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) :]
    return prompt + answer, len(prompt), logits


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_logits(forced, model, device, backend):
    ids, prompt, want = forced
    decoder = Decoder(model[1][backend], select(backend, device), max_context=128)
    worst = (teacher_forced_logits(decoder, ids, prompt) - want).abs().amax(1)
    print(f"{backend} on {device}: largest logit difference of 32 steps {worst.max():.2e}")
    assert worst.shape == (32,) and (worst < LIMIT).all(), worst


def test_logits_triton(forced, model, device):
    """All 32 steps on a GPU; interpreted, as many as fit in three minutes and at least two."""
    ids, prompt, want = forced
    decoder = Decoder(model[1]["triton"], select("triton", device), max_context=128)
    decoder.admit(0, ids[: prompt + 1])
    started, worst = time.monotonic(), []
    while len(worst) < 32 and (device == "cuda" or time.monotonic() - started < SECONDS):
        decoder.ids[0] = ids[prompt + len(worst)]
        decoder.step()
        worst.append(float((decoder.logits[0].cpu() - want[len(worst)]).abs().max()))
    print(f"triton on {device}: largest logit difference of {len(worst)} steps {max(worst):.2e}")
    assert len(worst) >= (32 if device == "cuda" else 2) and max(worst) < LIMIT, worst


@pytest.mark.parametrize("backend", ["torch", "cuda", pytest.param("triton", marks=[pytest.mark.gpu])])
def test_greedy_ids(oracle, model, device, backend):
    """Ten prompts on a GPU, three on the CPU (LAB_ORACLE_PROMPTS sets another number)."""
    tokenizer, weights = model
    count = int(os.environ.get("LAB_ORACLE_PROMPTS", 10 if device == "cuda" else 3))
    decoder = Decoder(weights[backend], select(backend, device), max_context=128)
    for number, text in enumerate(PROMPTS[:count]):
        prompt = tokenizer.encode_chat([{"role": "user", "content": text}])
        with torch.no_grad():
            out = oracle.generate(
                torch.tensor([prompt]),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=2,
                attention_mask=torch.ones(1, len(prompt)),
            )
        want = out[0, len(prompt) :].tolist()
        got = generate(decoder, prompt, 24, stop_ids={2}, tokenizer=tokenizer)
        assert got.output_ids == want, (text, got.text)
        assert number or got.output_ids == ANSWER


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(forced, device, backend, dtype):
    """Reported, and bounded: 30 layers of about 16 roundings of half an epsilon each."""
    ids, prompt, want = forced
    decoder = Decoder(
        load(open_source("smollm2-135m"), dtype, device, Storage(stored=backend != "torch")),
        select(backend, device),
        max_context=128,
    )
    steps = 8 if device == "cpu" else 32
    got = teacher_forced_logits(decoder, ids[: prompt + steps], prompt)
    worst, agree = (got - want[:steps]).abs().max(), (got.argmax(1) == want[:steps].argmax(1)).sum()
    print(
        f"{backend} on {device}, {dtype}: largest logit difference of {steps} steps {worst:.3f}, "
        f"same best token in {agree}"
    )
    assert worst < 30 * 16 * torch.finfo(dtype).eps / 2 * want.abs().max()
