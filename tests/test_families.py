"""A family of models is one file and one line: CONTRIBUTING.md's "Add a model family", followed literally."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_add_an_op import BLOCK
from tiny_models import CONFIGS, reference_logits, tensors, write_folder, write_gguf

from lab.dispatch import select
from lab.errors import LabError
from lab.harness import compiled
from lab.model import families
from lab.model.decoder import Decoder
from lab.model.description import ModelConfig
from lab.model.families import BUILT_IN, FAMILIES, PRESETS, Family, register
from lab.model.generate import teacher_forced_logits
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.weights import load

ROOT = Path(__file__).resolve().parent.parent
IDS = [int(i) for i in torch.randint(0, 272, (24,), generator=torch.Generator().manual_seed(5))]
SIZES = dict(layers=2, hidden=96, intermediate=160, q_heads=4, kv_heads=2, vocab=272, max_positions=256)
# As the section describes the family: what its files leave unsaid is written out here.
TINY = ModelConfig(
    "tiny", "toy", **SIZES, head_dim=64, rms_eps=1e-3, qkv_bias=True, qk_norm=True, sliding_window=192
)
TOLERANCE = 2e-5  # float32 over two layers, as in test_model.py


def blocks():
    """{file: text} of the section: a new file and a change of another."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"^## Add a model family\n(.*?)^## ", text, re.M | re.S)[1]
    return {name: block for name, _, block in BLOCK.findall(section)}


@pytest.fixture
def toy():
    """The family of CONTRIBUTING.md, registered; forgotten after the test."""
    space = {}
    exec(compile(blocks()["lab/model/families/toy.py"], "toy.py", "exec"), space)
    family = space["FAMILY"]
    register(family)
    yield family
    del FAMILIES[family.name]
    for preset in family.presets:
        del PRESETS[preset.name]


def written(folder, form, weights):
    """A source of TINY: a Hugging Face folder that leaves the family's defaults unsaid, or a GGUF file."""
    if form == "gguf":
        return open_source(
            str(
                write_gguf(
                    folder / "tiny.gguf",
                    TINY,
                    weights,
                    arch="toylm",
                    reordered=True,
                    names={"post_attention_layernorm": "post_attention_norm"},
                )
            )
        )
    path = write_folder(folder / "tiny", TINY, weights) / "config.json"
    said = json.loads(path.read_text())
    for key in ("head_dim", "rms_norm_eps", "sliding_window"):
        del said[key]
    path.write_text(json.dumps(said))
    return open_source(str(path.parent))


def test_the_section_names_every_file_and_its_change_fits():
    files = blocks()
    assert list(files) == ["lab/model/families/toy.py", "lab/model/families/__init__.py"]
    old, new = files["lab/model/families/__init__.py"].splitlines()
    assert (ROOT / "lab/model/families/__init__.py").read_text().count(f"\n{old[1:]}\n") == 1
    assert new == "+" + old[1:].replace(")", ', "toy")')


def test_every_family_file_is_registered():
    files = {path.stem for path in (ROOT / "lab/model/families").glob("*.py")} - {"__init__", "family"}
    assert files == set(BUILT_IN) == set(FAMILIES)
    assert PRESETS == {preset.name: preset for family in FAMILIES.values() for preset in family.presets}


def test_nothing_else_asks_for_a_family_by_its_name():
    """In lab/model, families' names stand in their files and the registry alone; text has tokenizers'
    names."""
    names = re.compile(rf"""["']({"|".join(BUILT_IN)})["']""")
    for path in (ROOT / "lab/model").rglob("*.py"):
        if path.parent.name not in ("families", "text"):
            assert not names.search(path.read_text()), path


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_registered_family_is_read(toy, tmp_path, form):
    weights = tensors(TINY)
    source = written(tmp_path, form, weights)
    assert source.config == replace(TINY, rms_eps=source.config.rms_eps)
    assert source.config.rms_eps == pytest.approx(TINY.rms_eps)  # GGUF holds it in float32
    loaded = load(source)
    for index, layer in enumerate(loaded.layers):
        at = f"model.layers.{index}."
        assert torch.equal(
            layer.wqkv.data, torch.cat([weights[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"])
        )
        assert torch.equal(layer.bqkv, torch.cat([weights[f"{at}self_attn.{x}_proj.bias"] for x in "qkv"]))
        assert torch.equal(layer.mlp_norm, weights[at + "post_attention_layernorm.weight"])


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_bias_of_the_family_may_not_be_missing(toy, tmp_path, form):
    weights = tensors(TINY)
    del weights["model.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(LabError, match="v(_proj)?.bias is missing"):
        written(tmp_path, form, weights)


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize(
    "plan, dtype", [("basic", torch.float32), ("fused", torch.float32), ("persistent", torch.float16)]
)
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_every_plan_decodes_a_registered_family(toy, tmp_path, form, plan, dtype, backend, device):
    weights = tensors(TINY)
    loaded = load(written(tmp_path, form, weights), dtype, device)
    decoder = Decoder(loaded, select(backend, device), max_context=32, plan=plan, splits=2)
    got = teacher_forced_logits(decoder, IDS, prefilled=15)  # prefill too; the decode crosses a page
    want = reference_logits(TINY, weights, IDS)[15:]
    if dtype == torch.float32:
        limit = TOLERANCE
    else:  # about 16 roundings a layer, as test_half_precision of test_model.py
        limit = 16 * torch.finfo(dtype).eps * float(want.abs().max())
    assert (got - want).abs().max() < limit


def test_a_preset_of_a_registered_family_is_known(toy):
    assert open_source("toy-1b", "random").config is toy.presets[0]


@pytest.mark.parametrize(
    "family, says",
    [
        (Family("qwen3", None), "there is a family qwen3 already"),
        (Family("new", "llama"), "architecture llama are of family llama already"),
        (Family("new", None, (replace(TINY, name="mistral-7b"),)), "preset mistral-7b already"),
        (Family("new", None, (replace(TINY, name="new-1b"),)), "new-1b is of family toy, not new"),
    ],
)
def test_a_name_that_is_taken(family, says):
    before = dict(families.FAMILIES), dict(families.PRESETS)
    with pytest.raises(LabError, match=says):
        register(family)
    assert (families.FAMILIES, families.PRESETS) == before


# --- the torch.compile peer, which shares the layer with prefill ---


def peer_token(config, context, monkeypatch):
    """The token that the peer's step gives after IDS[:context + 1]; earlier keys and values are prefill's."""
    weights = load(RandomSource(config, seed=1), torch.float32, "cpu")
    decoder = Decoder(weights, select("torch", "cpu"), max_context=64)
    decoder.admit(0, IDS[: context + 1])
    slots, caches = decoder.cache.slots(0, 0, context), []
    for index in range(config.layers):
        for held in decoder.cache.read(index, slots):  # [context, kv_heads, head_dim]
            cache = torch.full((1, config.kv_heads, context + 1, config.head_dim), torch.nan)
            cache[0, :, :context] = held.transpose(0, 1)
            caches.append(cache)
    ids, drawn = torch.tensor([IDS[context]], dtype=torch.int32), iter(caches)
    monkeypatch.setattr(torch, "randn", lambda shape, **options: next(drawn))
    monkeypatch.setattr(torch, "randint", lambda *bounds, **options: ids)
    step = compiled.compiled_step(weights, 1, context)
    monkeypatch.undo()
    step()
    return int(ids)


@pytest.mark.parametrize("context", [0, 5, 20])
@pytest.mark.parametrize("name", [*sorted(CONFIGS), "toy"])
def test_the_peer_gives_the_token_of_the_reference(name, context, monkeypatch):
    config = CONFIGS.get(name, TINY)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    want = reference_logits(config, tensors(config), IDS[: context + 1])[-1]
    assert peer_token(config, context, monkeypatch) == int(want.argmax())


def test_the_peer_compiles_one_layer_without_a_break(monkeypatch):
    """fullgraph is kept, and the second layer runs the code of the first."""
    made, real = [], torch.compile

    def counted(function, **options):
        assert options == {"backend": "inductor", "fullgraph": True, "dynamic": False}

        def backend(graph, inputs):
            made.append(function.__name__)
            return graph

        return real(function, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", counted)
    want = reference_logits(TINY, tensors(TINY), IDS[:6])[-1]
    assert peer_token(TINY, 5, monkeypatch) == int(want.argmax())
    assert made == ["layer", "head"]
