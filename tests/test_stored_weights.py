"""The real SmolLM2-135M from its stored bits, Q4_1 and a Q8_0 embedding, against the same file expanded."""

import pytest
import torch

from lab.dispatch import select
from lab.model import decoder as decoder_module
from lab.model.decoder import Decoder
from lab.model.generate import generate_batch
from lab.model.sources import open_source
from lab.model.weight_formats import AS_STORED, EXPANDED
from lab.model.weights import load

pytestmark = pytest.mark.real_model

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was",
    "The sum of 2 and 2 is",
    "The colour of the sky",
    "Hamlet was written by",
    "The four seasons are",
    "A compiler translates",
    "In the middle of the night",
    "def add(a, b):",
]


@pytest.fixture(scope="module")
def models():
    """(tokenizer, as stored, expanded), float32."""
    source = open_source("smollm2-135m")
    return source.tokenizer(), *(load(source, storage=storage) for storage in (AS_STORED, EXPANDED))


def test_every_stored_weight_is_the_expanded_one(models):
    _, stored, expanded = models
    assert stored.formats == "int4-g32-min, lm_head int8-g32" and expanded.formats == "fp32"
    pairs = zip([stored.embed, *stored.matrices()], [expanded.embed, *expanded.matrices()], strict=True)
    assert all(torch.equal(a.data.to(torch.float32), b.data) for a, b in pairs)
    assert 5.2 < expanded.nbytes / stored.nbytes < 5.4  # 32 bits to 5, and to 8.5 of a fifth of the weights


def test_ten_prompts_give_the_same_greedy_tokens(models, monkeypatch):
    """One batch, for torch expands packed weights anew in every step. They prefill the first prompt alone;
    the others are prefilled by the expanded weights, which saves their expansion for each."""
    tokenizer, stored, expanded = models
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    prefilled, real = [], decoder_module.prefill

    def prefill(weights, cache, *rest):
        prefilled.append(weights is stored)
        return real(weights if prefilled.count(True) == 1 else expanded, cache, *rest)

    monkeypatch.setattr(decoder_module, "prefill", prefill)
    texts = []
    for weights in (stored, expanded):
        decoder = Decoder(weights, select("torch", "cpu"), batch=len(prompts), max_context=32)
        texts.append([result.output_ids for result in generate_batch(decoder, prompts, 2)])
    assert texts[0] == texts[1] and prefilled.count(True) == len(prompts)
    assert tokenizer.decode(texts[0][0]).startswith(" Paris")
