"""`lab bench accuracy [MODEL]`: what weight formats cost a model with real weights.

The same text is read with the weights expanded, as they stand in their file, and with each weight rounded to
a format. After every token of it both give a distribution of the next one. These are compared by their mean
Kullback-Leibler divergence, and by how often both have the same most likely token. What counts as not rounded
is what the file holds: where it stores 4-bit weights, their numbers, and the record says so.

The numbers of a format are the same under every backend, so torch reads the text, in one pass.
"""

from __future__ import annotations

import math

import torch

from lab.errors import LabError, error_text
from lab.harness.ops_bench import alive
from lab.model.kv_cache import PagedKVCache
from lab.model.matrix import Matrix
from lab.model.prefill import prefill
from lab.model.rope import cos_sin_table
from lab.model.sources import open_source
from lab.model.weights import load
from lab.records.schema import Accuracy

FORMATS = ("int8", "fp8", "int4-g32", "int4-g128", "mxfp4")  # by default: one of each kind
NAME = "ferry"  # of the text
TOKENS = 256  # of the text, at most
# Prose, speech, a list, numbers and code: what models are used for.
TEXT = """\
The ferry leaves at six in the morning, when the harbour is still grey and the gulls have the quay to \
themselves. Marta has worked on it for eleven years. She checks the ropes first, then the pumps, and only \
then does she drink her coffee. "One could set a clock by you," says the captain. "Somebody has to," she \
answers.

The crossing takes 35 minutes in calm water. On an ordinary day the boat carries:
- 120 passengers, most of whom go to school or to work on the mainland,
- 14 cars and one or two lorries with fish, and
- the post, in three yellow boxes.

Last summer the pupils of the school wrote a small program that predicts whether the next boat will sail:

def sails(wind, wave_height):
    # Both limits are from the harbour office.
    if wind > 17 or wave_height > 2.5:
        return False
    return True

It is right on 9 days of 10. What it cannot know is the captain, who has been seen to sail at 18 metres per \
second with a doctor on board, and to stay at home in the sunshine on the day his daughter was married. In \
winter the wind often comes from the north-west, and the island is alone for a day or two. People do not \
mind. They bake, mend nets, repair their radios, and visit each other along the only road.
"""


def measure(session, plain, quantised, name, dtype_name):
    """Records what one weight format costs a model, once. plain, quantised: model_bench.Weights that share a
    shelf, the first those that are not rounded."""
    text = quantised.format_of(name)
    row = Accuracy(session.run, name, text or quantised.storage.quantise, dtype_name, NAME)
    if session.has(row):
        return
    try:
        _fill(row, plain, quantised, name)
    except (RuntimeError, LabError) as e:  # out of memory, no such model, no tokenizer
        row.error = error_text(e)
    session.add(row)
    if plain.device == "cuda":
        alive(f"the accuracy of {name}")


def _fill(row, plain, quantised, name):
    source = open_source(name, "auto")
    ids = tokens_of(source)
    before = plain.of(name)
    if "logits" not in plain.shelf:
        plain.shelf["logits"] = logits_of(before, ids)
    row.stored = how_stored(source, before.config)
    after = load(source, plain.dtype, plain.device, quantised.storage)
    row.tokens, row.bytes, row.bytes_before = len(ids), after.step_nbytes, before.step_nbytes
    row.products = products(before, after)
    row.kl, row.top1 = compared(plain.shelf["logits"], logits_of(after, ids))


def tokens_of(source):
    """The text in the tokens of a model, TOKENS of them. Raises LabError without a tokenizer."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise LabError(f"{source.where}: it has no tokenizer, so no text can be read with it")
    return tokenizer.encode(TEXT)[: min(TOKENS, source.config.max_positions)]


def how_stored(source, config):
    """How a source stores the matrices of the layers, the type of most of them first: "Q4_1 and Q8_0"."""
    counts = {}
    for index in range(config.layers):
        for part in config.layer.parts():
            if part.is_matrix:
                for name, rows in part.tensors:
                    kind = source.stored(f"model.layers.{index}.{name}").type
                    counts[kind] = counts.get(kind, 0) + rows * part.columns
    return " and ".join(sorted(counts, key=lambda kind: -counts[kind]))


@torch.inference_mode()
def logits_of(weights, ids):
    """float32 [len(ids), vocab]: the logits after each token of a text that begins with the first."""
    c = weights.config
    cache = PagedKVCache(c, 1, len(ids), weights.dtype, weights.device)
    table = cos_sin_table(c.head_dim, c.rope_theta, c.rope_scaling, len(ids), weights.device)
    return weights.lm_head.product(prefill(weights, cache, table, 0, ids)).float()


@torch.inference_mode()
def compared(before, after):
    """(mean KL divergence of `after` from `before` in nats, share of rows with the same largest logit).

    Raises LabError for logits that are no numbers.
    """
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean())
    if not math.isfinite(divergence):
        raise LabError("the logits are not numbers; try another --dtype")
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    return max(divergence, 0.0), float(same)  # equal ones may differ by a rounding below 0


@torch.inference_mode()
def products(before, after):
    """{use of a product: RMS of the changes of its weights over that of the weights, all layers together}."""
    squares = {}
    for name, one, other in _pairs(before, after):
        x = one.data.to(torch.float32)
        change = other.data.to(torch.float32) - x
        total = squares.setdefault(name, [0.0, 0.0])
        total[0] += float(change.square_().sum())
        total[1] += float(x.square().sum())
    return {name: math.sqrt(change / size) for name, (change, size) in squares.items() if size}


def _pairs(before, after):
    """(use, matrix before, matrix after) of every matrix that is multiplied."""
    for one, other in zip(before.layers, after.layers):
        for name, matrix in vars(one).items():
            if isinstance(matrix, Matrix):
                use = name.removeprefix("w_").removeprefix(
                    "w"
                )  # named as in records of ops: qkv, gate_up ...
                yield use, matrix, getattr(other, name)
    yield "lm_head", before.lm_head, after.lm_head
