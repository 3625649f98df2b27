"""A model that several processes divide: the tokens are those of one, and what goes wrong is one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import lab
from rank_child import compiled_tokens, decode
from tiny_models import CONFIGS, tensors, write_folder

from lab.errors import LabError
from lab.model import ranks
from lab.model.parallel import RankSource, check_ranks, part_of, possible
from lab.model.sources.huggingface import HuggingFaceSource
from lab.model.sources.random import RandomSource
from lab.model.weights import load

CHILD = Path(__file__).with_name("rank_child.py")


def start(count, what, names, file):
    return ranks.start([sys.executable, str(CHILD), what, names, str(file)], count)


def test_tokens_are_those_of_one_process_and_all_ranks_have_the_same_bits(tmp_path):
    """qwen2 has biases and one KV head, which both ranks hold; qwen3 norms of q and k and a tied head."""
    names = ("qwen2", "qwen3")
    start(2, "decode", ",".join(names), tmp_path / "found")
    first, second = (json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2))
    want = {
        (name, persistent): decode(RandomSource(CONFIGS[name]), "torch", plan, {})[0]
        for name in names
        for persistent, plan in ((False, "basic"), (True, "persistent"))
    }
    assert any(len(set(tokens)) > 1 for tokens in want.values())
    for one, other in zip(first, second, strict=True):
        name, _, plan, tokens, bits = one
        assert tokens == other[3] == want[name, plan == "persistent"], one
        assert bits == other[4], one
    peers = [json.loads((tmp_path / f"found-compiled-{rank}").read_text()) for rank in range(2)]
    assert peers == [{name: compiled_tokens(name) for name in names}] * 2
    check_ledgers([json.loads((tmp_path / f"found-ledger-{rank}").read_text()) for rank in range(2)], "qwen3")


def check_ledgers(each, name):
    """Each rank's account of a token adds up, and what the ranks pass to each other has rows of its own."""
    layers = CONFIGS[name].layers
    for backend, rows in ((backend, rows) for one in each for backend, rows in one.items()):
        parts = {(row["op"], row["role"]): row for row in rows if row["row"] == "chain"}
        assert (
            parts["all_reduce_add", None]["calls"] == 2 * layers and parts["all_argmax", None]["calls"] == 1
        )
        kernels = {"cuda": "all_reduce_add_kernel", "cuda+gloo": "torch:all_reduce_add"}
        assert parts["all_reduce_add", None]["kernel"] == kernels[backend]
        assert parts["linear", "o"]["kernel"] == parts["linear", "down"]["kernel"] == "linear_stream_kernel"
        assert parts["linear", "o"]["calls"] == parts["linear", "down"]["calls"] == layers
        total = next(row["us"] for row in rows if row["row"] == "total")
        assert sum(row["us"] for row in rows if row["row"] != "total") == pytest.approx(total)
        assert {row["ranks"] for row in rows} == {2} and {row["timer"] for row in rows} == {"wall"}


def test_a_run_on_two_ranks_says_what_one_process_says(tmp_path):
    write_folder(tmp_path / "tiny", CONFIGS["qwen2"])
    words = ["run", tmp_path / "tiny", "--backend", "torch", "--device", "cpu", "--prompt", "-", "--raw"]
    words += ["--max-new-tokens", 6]
    given = tmp_path / "prompt"
    given.write_text("hello")
    said = []
    for count in (1, 2):
        with given.open("rb") as stdin:
            done = lab(*words, "--tensor-parallel", count, given={0: stdin})
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].strip()


def test_a_rank_that_does_not_come_or_has_another_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_PEER_SECONDS", "0.2")
    group = ranks.Group(0, 3, tmp_path, "cpu")
    group.store.set("model/1", "other")
    with pytest.raises(LabError, match=r"^rank 2 did not come within 0.2 s \(model\)"):
        group.meet("model", "same")
    group.store.set("model/2", "same")
    with pytest.raises(LabError, match="^rank 1 has another model than rank 0: other, not same$"):
        group.agree("model", "same")


@pytest.mark.parametrize(
    "change, count, message",
    [
        (dict(q_heads=6, kv_heads=3), 2, "3 KV heads neither divide over 2 ranks"),
        (dict(), 3, "4 query heads do not divide over 3 ranks; --tensor-parallel may be 1, 2, 4$"),
        (dict(intermediate=161), 2, "161 elements of the intermediate width"),
        (dict(vocab=273), 2, "273 rows of the output head"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(change, count, message):
    with pytest.raises(LabError, match=message):
        check_ranks(replace(CONFIGS["llama"], **change), count)


def test_a_folder_gives_the_same_parts_and_refuses_a_wrong_shape(tmp_path):
    config = CONFIGS["qwen2"]
    write_folder(tmp_path / "tiny", config)
    whole = tensors(config)
    source = RankSource(HuggingFaceSource(tmp_path / "tiny"), 1, 2)
    half = config.hidden, config.intermediate // 2
    for name, shape, part in (
        ("model.layers.1.mlp.down_proj.weight", half, (slice(None), slice(half[1], None))),
        ("model.layers.1.mlp.up_proj.weight", half[::-1], slice(half[1], None)),
    ):
        out = torch.empty(shape)
        source.fill(name, out)
        assert torch.equal(out, whole[name][part])
    with pytest.raises(LabError, match=r"up_proj.weight is \[160, 96\]; .* asks for \[140, 96\]"):
        source.fill("model.layers.1.mlp.up_proj.weight", torch.empty(70, 96))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_parts_are_the_whole(name):
    """Each number of a matrix is on one rank, or on those that share a KV head."""
    config = CONFIGS[name]
    whole = load(RandomSource(config))
    parts = [load(RankSource(RandomSource(config), rank, 2)) for rank in range(2)]
    assert parts[0].config == part_of(config, 2) and 2 in possible(config)
    for index, layer in enumerate(whole.layers):
        of = [part.layers[index] for part in parts]
        assert torch.equal(torch.cat([one.wo.data for one in of], 1), layer.wo.data)
        assert torch.equal(torch.cat([one.w_down.data for one in of], 1), layer.w_down.data)
        q, k, v = layer.wqkv.data.split([config.q_width, config.kv_width, config.kv_width])
        part = parts[0].config
        each = [one.wqkv.data.split([part.q_width, part.kv_width, part.kv_width]) for one in of]
        assert torch.equal(torch.cat([one[0] for one in each]), q)
        for i, heads in ((1, k), (2, v)):
            both = torch.cat([one[i] for one in each])
            assert torch.equal(both, heads if config.kv_heads > 1 else torch.cat([heads, heads]))
    assert torch.equal(torch.cat([one.lm_head.data for one in parts]), whole.lm_head.data)
