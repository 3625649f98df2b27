"""Packed weights of a model that several processes divide: each has the codes and scales that one would
have, and the tokens are the same."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_child import decode_packed
from test_quantised_model import q4_k_m
from tiny_models import CONFIGS, write_gguf

from lab.errors import LabError
from lab.formats import FORMATS
from lab.model import ranks
from lab.model.parallel import RankSource
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import AS_STORED, Storage
from lab.model.weights import load

CHILD = Path(__file__).with_name("rank_child.py")
# Of two ranks each has whole blocks of 256 columns.
WIDE = replace(CONFIGS["llama-3"], hidden=256, intermediate=512, q_heads=8, kv_heads=2)
LLAMA = replace(CONFIGS["llama"], intermediate=128)  # tied; 64 columns of down on each of two ranks


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_of_a_packed_matrix_has_its_numbers(name):
    f = FORMATS[name]
    matrix = f.quantise(torch.randn(52, 768))
    width = f.piece_columns or 40
    for dim, first, count in ((0, 0, 24), (0, 16, 20), (0, 13, 9), (1, width, 2 * width), (1, 256, 512)):
        part = matrix.part(dim, first, count)
        assert torch.equal(part.double(), matrix.double().narrow(dim, first, count)), (dim, first, count)
        assert part.codes.shape == f.codes_shape(*part.shape) and part.scales.shape == f.scales_shape(
            *part.shape
        )


@pytest.mark.parametrize(
    "storage", [AS_STORED, Storage(quantise="int8", head="int8"), Storage(quantise="int4-g32", head="fp8")]
)
def test_the_parts_are_the_whole(tmp_path, storage):
    source = RandomSource(LLAMA)
    if storage.quantise is None:
        source = open_source(str(write_gguf(tmp_path / "tiny.gguf", LLAMA, kind="Q4_1")))
    whole = load(source, storage=storage)
    parts = [load(RankSource(source, rank, 2), storage=storage) for rank in range(2)]
    assert all(part.formats == whole.formats for part in parts)

    def numbers(holder, name):
        return getattr(holder, name).data.double()

    for index, layer in enumerate(whole.layers):
        of = [part.layers[index] for part in parts]
        for name in ("wo", "w_down"):
            assert torch.equal(torch.cat([numbers(one, name) for one in of], 1), numbers(layer, name)), name
        gate, up = numbers(layer, "w_gate_up").chunk(2)
        halves = [numbers(one, "w_gate_up").chunk(2) for one in of]
        for i, one in enumerate((gate, up)):
            assert torch.equal(torch.cat([half[i] for half in halves]), one)
    assert torch.equal(torch.cat([numbers(part, "lm_head") for part in parts]), numbers(whole, "lm_head"))
    assert all(torch.equal(numbers(part, "embed"), numbers(whole, "embed")) for part in parts)


def test_a_group_that_would_be_cut_is_refused(tmp_path):
    config = CONFIGS["llama"]  # 160 columns of down: 80 on each rank, which is no multiple of 32
    path = write_gguf(tmp_path / "tiny.gguf", config, kind="Q4_1")
    said = (
        r"down_proj.weight in int4-g32.*: 160 columns over 2 ranks are 80 each, which would cut a group of 32"
    )
    with pytest.raises(LabError, match=said):
        load(RankSource(open_source(str(path)), 0, 2))
    with pytest.raises(LabError, match=said):
        load(RankSource(RandomSource(config), 0, 2), storage=Storage(quantise="int4-g32"))


def test_tokens_of_packed_weights_are_those_of_one_process(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", LLAMA, kind="Q4_1")
    write_gguf(tmp_path / "mixed.gguf", WIDE, kind=q4_k_m)
    write_gguf(tmp_path / "plain.gguf", CONFIGS["qwen3"], kind="F16")
    ranks.start([sys.executable, str(CHILD), "packed", str(tmp_path), str(tmp_path / "found")], 2)
    first, second = (json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2))
    assert first == second  # tokens, and the bits of the residual stream
    want = {name: tokens for name, tokens, _ in decode_packed(str(tmp_path))}
    assert {"tiny.gguf", "mixed.gguf", "plain.gguf"} < set(want)
    assert len(first) == 2 * len(want) and all(tokens == want[name] for name, tokens, _ in first)
    assert any(len(set(tokens)) > 1 for tokens in want.values())
