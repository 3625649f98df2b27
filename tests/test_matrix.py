"""The type of a model's matrices: it alone knows how numbers are stored; no reader changes when that does."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS

from lab.dispatch import select
from lab.harness import model_bench
from lab.harness.compiled import compiled_step
from lab.model.decoder import Decoder
from lab.model.matrix import Matrix
from lab.model.plans import PLANS
from lab.model.sources.random import RandomSource
from lab.model.weights import load


@dataclass(frozen=True, eq=False)
class Int8(Matrix):
    """A toy format, 8 bits with a scale for each row. The ops do not know it and get the numbers expanded."""

    scales: torch.Tensor  # [rows, 1], in the dtype of the activations

    @classmethod
    def of(cls, values):
        scales = (values.abs().amax(1, keepdim=True).float() / 127).to(values.dtype)
        return cls((values / scales).round().to(torch.int8), scales)

    @property
    def dtype(self):
        return self.scales.dtype

    @property
    def operand(self):
        return self.data * self.scales

    def tensors(self):
        return self.data, self.scales

    def product(self, x, bias=None):
        return F.linear(x, self.operand, bias)

    def lookup(self, ids):
        return self.data[ids] * self.scales[ids]


def mapped(weights, change):
    """The same weights, each of their matrices changed; a tied embedding stays one object."""
    made = {}

    def holder(old):
        matrices = {name: m for name, m in vars(old).items() if isinstance(m, Matrix)}
        return replace(old, **{name: made.setdefault(id(m), change(m)) for name, m in matrices.items()})

    return replace(holder(weights), layers=[holder(layer) for layer in weights.layers])


def two_models(name, dtype=torch.bfloat16):
    """(a model in the toy format, the same numbers in plain matrices)."""
    stored = mapped(load(RandomSource(CONFIGS[name]), dtype), lambda m: Int8.of(m.data))
    return stored, mapped(stored, lambda m: Matrix(m.operand))


def test_a_matrix_multiplies_and_looks_up_as_the_ops_do():
    matrix, ops = Matrix(torch.randn(12, 8)), select("torch", "cpu")
    x, bias, ids = torch.randn(3, 8), torch.randn(12), torch.tensor([11, 0, 5], dtype=torch.int32)
    torch.testing.assert_close(matrix.product(x, bias), ops.linear(x, matrix.operand, bias))
    assert torch.equal(matrix.lookup(ids), ops.embedding(ids, matrix.operand))
    assert matrix.nbytes == sum(t.nbytes for t in matrix.tensors()) == 12 * 8 * 4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_plans_and_prefill_run_a_format_that_they_do_not_know(plan, name):
    steps = []
    for weights in two_models(name):
        decoder = Decoder(weights, select("torch", "cpu"), max_context=64, plan=plan)
        decoder.admit(0, [5, 9, 200, 31, 7])
        steps.append([(decoder.step().tolist(), decoder.logits.clone()) for _ in range(4)])
    for (token, logits), (plain_token, plain_logits) in zip(*steps, strict=True):
        assert token == plain_token and torch.equal(logits, plain_logits)


def test_the_compiled_peer_runs_it_too_in_one_compiled_layer(monkeypatch):
    """backend eager traces as the real one does, and generates no code."""
    graphs, compile_ = [], torch.compile

    def traced(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=traced, **options))
    for weights in two_models("llama", torch.float32):
        step = compiled_step(weights, 2, 16)
        step()
        assert len(weights.layers) > 1 and len(graphs) == 2, "one layer and the head"
        graphs.clear()


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_format(name):
    stored, plain = two_models(name)
    config = stored.config
    matrices = [*config.outer_parts()] + [*config.layer.parts()] * config.layers
    matrices = [part for part in matrices if part.is_matrix]
    expanded = sum(2 * part.rows * part.columns for part in matrices)
    kept = sum(part.rows * part.columns + 2 * part.rows for part in matrices)
    assert plain.nbytes - stored.nbytes == expanded - kept
    untied = 0 if config.tie_embeddings else stored.embed.nbytes
    kv = 2 * 2 * config.layers * config.kv_width  # of a token, in bf16
    assert model_bench.step_bytes(stored, 3, 17) == stored.nbytes - untied + 3 * 17 * kv
