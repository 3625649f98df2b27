"""The type of a model's matrices: it alone knows how numbers are stored; no reader changes when that does."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS

from lab.dispatch import select
from lab.formats import FORMATS
from lab.formats import format as format_module
from lab.harness import model_bench
from lab.harness.compiled import compiled_step
from lab.model.decoder import Decoder
from lab.model.matrix import Matrix
from lab.model.sources.random import RandomSource
from lab.model.weights import load


def mapped(weights, change):
    """The same weights, each of their matrices changed; a tied embedding stays one object."""
    made = {}

    def holder(old):
        matrices = {name: m for name, m in vars(old).items() if isinstance(m, Matrix)}
        return replace(old, **{name: made.setdefault(id(m), change(m)) for name, m in matrices.items()})

    return replace(holder(weights), layers=[holder(layer) for layer in weights.layers])


def two_models(name, format, dtype=torch.float32):
    """(a model in the format, the same numbers in plain matrices)."""
    plain = load(RandomSource(CONFIGS[name]), dtype)
    stored = mapped(plain, lambda m: Matrix(FORMATS[format].quantise(m.data), dtype))
    return stored, mapped(stored, lambda m: Matrix(m.data.to(dtype)))


def test_a_matrix_multiplies_and_looks_up_as_the_ops_do():
    matrix, ops = Matrix(torch.randn(12, 8)), select("torch", "cpu")
    x, bias, ids = torch.randn(3, 8), torch.randn(12), torch.tensor([11, 0, 5], dtype=torch.int32)
    torch.testing.assert_close(matrix.product(x, bias), ops.linear(x, matrix.operand, bias))
    assert torch.equal(matrix.lookup(ids), ops.embedding(ids, matrix.operand))
    assert matrix.nbytes == sum(t.nbytes for t in matrix.tensors()) == 12 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_matrix_multiplies_and_looks_up_as_its_numbers_do(format, dtype):
    packed = FORMATS[format].quantise(torch.randn(37, 300))
    matrix, plain = Matrix(packed, dtype), Matrix(packed.double().to(dtype))
    x, bias = torch.randn(3, 300).to(dtype), torch.randn(37).to(dtype)
    ids = torch.tensor([36, 0, 5], dtype=torch.int32)
    assert torch.equal(matrix.product(x, bias), plain.product(x, bias))
    assert torch.equal(matrix.lookup(ids), plain.lookup(ids))
    assert torch.equal(matrix.lookup(ids), select("torch", "cpu").embedding(ids, matrix.operand, dtype))
    assert (matrix.rows, matrix.cols, matrix.dtype, matrix.format) == (37, 300, dtype, format)
    assert matrix.nbytes == FORMATS[format].bytes_of(37, 300) == sum(t.nbytes for t in matrix.tensors())


def test_a_large_packed_matrix_is_expanded_some_rows_at_a_time(monkeypatch):
    monkeypatch.setitem(format_module.EXPANDED_AT_ONCE, "cpu", 1000)
    packed = FORMATS["int4-g32-min"].quantise(torch.randn(37, 300))
    assert torch.equal(packed.to(torch.float32), packed.double().float())


def test_packed_matrices_are_the_same_only_with_equal_codes_and_scales():
    values = torch.randn(4, 64)
    matrix = Matrix(FORMATS["int8-g32"].quantise(values), torch.float32)
    assert matrix.same(Matrix(FORMATS["int8-g32"].quantise(values), torch.float32))
    doubled = Matrix(FORMATS["int8-g32"].quantise(2 * values), torch.float32)
    assert torch.equal(doubled.data.codes, matrix.data.codes) and not doubled.same(matrix)
    flipped = Matrix(FORMATS["int8-g32"].quantise(-values), torch.float32)
    assert torch.equal(flipped.data.scales, matrix.data.scales) and not flipped.same(matrix)
    plain = Matrix(matrix.data.to(torch.float32))
    assert not plain.same(matrix) and not matrix.same(plain) and plain.same(Matrix(plain.data.clone()))


@pytest.mark.parametrize("plan", ["basic", "fused"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_plans_and_prefill_run_packed_weights(plan, name):
    steps = []
    for weights in two_models(name, "int4-g32-min"):
        decoder = Decoder(weights, select("torch", "cpu"), max_context=64, plan=plan)
        decoder.admit(0, [5, 9, 200, 31, 7])
        steps.append([(decoder.step().tolist(), decoder.logits.clone()) for _ in range(4)])
    for (token, logits), (plain_token, plain_logits) in zip(*steps, strict=True):
        assert token == plain_token
        torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)


def test_the_compiled_peer_runs_them_too_in_one_compiled_layer():
    """Traced as by the real backend of torch.compile, and no code is generated."""
    graphs = []

    def traced(graph, inputs):
        graphs.append(graph)
        return graph

    for weights in two_models("llama", "int8"):
        step = compiled_step(weights, 2, 16, backend=traced)
        step()
        assert len(weights.layers) > 1 and len(graphs) == 2, "one layer and the head"
        graphs.clear()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-3"])
def test_bytes_are_those_of_the_format(name, format):
    stored, plain = two_models(name, format, torch.bfloat16)
    config = stored.config
    parts = [*config.outer_parts()] + [*config.layer.parts()] * config.layers
    parts = [part for part in parts if part.is_matrix]
    expanded = sum(2 * part.rows * part.columns for part in parts)
    kept = sum(FORMATS[format].bytes_of(part.rows, part.columns) for part in parts)
    assert kept == sum(part.nbytes(torch.bfloat16, format) for part in parts)
    assert plain.nbytes - stored.nbytes == expanded - kept
    untied = 0 if config.tie_embeddings else stored.embed.nbytes
    kv = 2 * 2 * config.layers * config.kv_width  # of a token, in bf16
    assert model_bench.step_bytes(stored, 3, 17) == stored.nbytes - untied + 3 * 17 * kv
