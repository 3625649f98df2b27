"""Models whose weights stay quantised: what is read from a file is what the file stores, exactly."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, tensors, write_folder, write_gguf

from lab import cli
from lab.dispatch import select
from lab.errors import LabError
from lab.formats import FORMATS
from lab.harness import model_bench
from lab.harness.ops_bench import Rig
from lab.harness.request import Request, settings_of
from lab.model.decoder import Decoder
from lab.model.families import PRESETS
from lab.model.generate import teacher_forced_logits
from lab.model.sampling import GREEDY
from lab.model.sources import open_source
from lab.model.sources.gguf_file import FORMAT_OF, codes_and_scales
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import AS_STORED, EXPANDED, Storage, dtype_of, storage_of
from lab.model.weights import load, planned
from lab.records import card, compare, schema
from lab.report import figures
from lab.report import load as report

WIDTHS = dict(hidden=256, intermediate=512, q_heads=4, kv_heads=2)  # multiples of a block of Q4_K and Q6_K
WIDE = replace(CONFIGS["llama-3"], **WIDTHS)
IDS = [5, 9, 200, 31, 7, 64]


def logits(weights, prefilled=3):
    decoder = Decoder(weights, select("torch", "cpu"), max_context=32)
    return teacher_forced_logits(decoder, IDS, prefilled)


# --- GGUF ---


@pytest.mark.parametrize("kind", FORMAT_OF)
def test_every_code_of_a_block_is_what_the_gguf_package_makes_of_it(kind):
    stored = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[stored][1]
    blocks = np.random.default_rng(1).integers(0, 256, (5, 40, size), np.uint8)
    for at in (209,) if kind == "Q6_K" else (1, 3):
        blocks[:, :, at] &= 0xBF  # no scale that is NaN or inf
    want = torch.from_numpy(gguf.quants.dequantize(blocks.reshape(5, -1), stored))
    codes, scales = codes_and_scales(kind, torch.from_numpy(blocks))
    packed = FORMATS[FORMAT_OF[kind]].from_codes(codes, scales)
    assert torch.equal(packed.to(torch.float32), want)
    assert packed.raw_codes().unique().numel() == 1 << packed.format.bits
    # No more bytes than the file has, but for Q6_K's 16 scales and a float16, which are kept in 20 bytes.
    one_block = packed.nbytes / (8 * 40), size + 2 * (kind == "Q6_K")
    if kind in ("Q4_K", "Q6_K"):
        assert one_block[0] == one_block[1]


@pytest.mark.parametrize("kind", FORMAT_OF)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # llama's q and k have their rows reordered
def test_a_gguf_model_keeps_its_format_and_gives_the_logits_of_its_numbers(tmp_path, name, kind):
    config = replace(CONFIGS[name], **WIDTHS) if kind.endswith("_K") else CONFIGS[name]
    path = str(write_gguf(tmp_path / "tiny.gguf", config, kind=kind))
    stored, expanded = (load(open_source(path), storage=how) for how in (AS_STORED, EXPANDED))
    assert stored.formats == FORMAT_OF[kind] and expanded.formats == "fp32"
    assert {m.format for m in stored.matrices()} == {FORMAT_OF[kind]}
    torch.testing.assert_close(logits(stored), logits(expanded), rtol=1e-4, atol=1e-4)


def test_a_large_matrix_is_converted_some_rows_at_a_time(tmp_path, monkeypatch):
    path = str(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q4_1"))
    whole = load(open_source(path))
    monkeypatch.setattr("lab.model.sources.gguf_file.CONVERTED_AT_ONCE", 1000)
    parts = load(open_source(path))
    assert parts.embed.same(whole.embed)
    assert all(a.same(b) for a, b in zip(parts.matrices(), whole.matrices(), strict=True))


def test_mixed_files_keep_each_matrix_format(tmp_path):
    kinds = {"embed": "Q8_0", "lm_head": "F16", "down": "Q4_0", "o_proj": "BF16"}
    path = write_gguf(
        tmp_path / "tiny.gguf",
        CONFIGS["llama-3"],
        kind=lambda name: next((kind for part, kind in kinds.items() if part in name), "Q4_1"),
    )
    loaded = load(open_source(str(path)), torch.bfloat16)
    layer = loaded.layers[1]
    assert [m.format for m in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down)] == [
        "int4-g32-min",
        None,
        "int4-g32-min",
        "int4-g32",
    ]
    assert (loaded.embed.format, loaded.lm_head.format) == ("int8-g32", None)
    assert loaded.formats == "int4-g32-min and bf16 and int4-g32, lm_head bf16"
    config, formats = planned(open_source(str(path)), torch.bfloat16, AS_STORED)
    assert formats.nbytes(config, torch.bfloat16) == loaded.nbytes
    assert formats.text(config, torch.bfloat16) == loaded.formats
    assert loaded.step_nbytes == loaded.nbytes - loaded.embed.nbytes


def test_a_type_without_a_format_is_expanded_and_that_is_said(tmp_path, capsys):
    path = str(write_gguf(tmp_path / "tiny.gguf", WIDE, kind=lambda n: "Q5_0" if "down" in n else "Q8_0"))
    loaded = load(open_source(path), torch.bfloat16)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "expanded to bf16, for there is no weight format yet: Q5_0 (2 tensors)" in said
    want = load(open_source(path), torch.bfloat16, storage=EXPANDED)
    assert capsys.readouterr().err == ""  # it was asked for
    assert loaded.layers[0].w_down.format is None
    assert torch.equal(loaded.layers[0].w_down.data, want.layers[0].w_down.data)
    assert loaded.layers[0].wo.format == "int8-g32"


@pytest.mark.parametrize("other", ["Q8_0", "Q6_K", "Q5_0", "F32"])
def test_gate_and_up_of_several_formats_are_expanded_and_that_is_said(tmp_path, capsys, other):
    kind = lambda name: other if "up_proj" in name else "Q4_1"
    path = str(write_gguf(tmp_path / "tiny.gguf", WIDE, kind=kind))
    loaded = load(open_source(path))
    said = capsys.readouterr().err
    kinds = " and ".join(sorted(("Q4_1", other)))
    assert said.count("\n") == 1
    assert f"expanded to fp32, for one fused matrix has one format: w_gate_up of {kinds} (2)" in said
    want = load(open_source(path), storage=EXPANDED)
    assert torch.equal(loaded.layers[1].w_gate_up.data, want.layers[1].w_gate_up.data)
    assert loaded.layers[1].wqkv.format == "int4-g32-min"


def q4_k_m(name):
    """As llama.cpp's Q4_K_M: Q6_K for the output head, and in some layers for v and down."""
    more = "layers.1" in name and ("v_proj" in name or "down_proj" in name)
    return "Q6_K" if more or "lm_head" in name else "Q4_K"


@pytest.mark.parametrize(
    "kind, formats, matrices",
    [
        (q4_k_m, "q4_k and q6_k, lm_head q6_k", ["q4_k", "q6_k"]),
        (lambda n: "Q8_0" if "k_proj" in n else "Q4_1", None, ["int4-g32-min", "int8-g32", "int4-g32-min"]),
        (lambda n: "F32" if "q_proj" in n else "Q4_1", None, [None, "int4-g32-min"]),
        (lambda n: "Q5_0" if "v_proj" in n else "Q4_1", None, ["int4-g32-min", None]),
    ],
    ids=["Q4_K_M", "three", "q plain", "v without a format"],
)
@pytest.mark.parametrize("name", ["llama-3", "qwen2", "qwen3"])  # qwen2 has biases, qwen3 norms of q and k
def test_q_k_and_v_of_several_formats_are_kept_apart(tmp_path, capsys, name, kind, formats, matrices):
    config = replace(CONFIGS[name], **WIDTHS)
    path = str(write_gguf(tmp_path / "tiny.gguf", config, kind=kind))
    stored, said = load(open_source(path)), capsys.readouterr().err
    assert ("expanded to fp32, for there is no weight format yet: Q5_0 (2 tensors)" in said) == (said != "")
    assert [m.format for m in stored.layers[1].wqkv.apart()] == matrices
    if formats and not config.tie_embeddings:
        assert stored.formats == formats
    planned_config, planned_formats = planned(open_source(path), torch.float32, AS_STORED)
    assert planned_formats.nbytes(planned_config, torch.float32) == stored.nbytes
    assert planned_formats.text(planned_config, torch.float32) == stored.formats
    expanded = load(open_source(path), storage=EXPANDED)
    numbers = torch.cat([m.data.to(torch.float32) for m in stored.layers[1].wqkv.apart()])
    assert torch.equal(numbers, expanded.layers[1].wqkv.data)
    for plan in ("basic", "fused"):
        for batch in (1, 3):
            got, want = (several_logits(w, plan, batch) for w in (stored, expanded))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def several_logits(weights, plan, batch, backend="torch"):
    """[steps, batch, vocab] of prompts of different lengths."""
    decoder = Decoder(weights, select(backend, "cpu"), batch, max_context=32, plan=plan)
    for row in range(batch):
        decoder.admit(row, IDS[: row + 2])
    found = []
    for _ in range(3):
        decoder.step(GREEDY)
        found.append(decoder.logits.clone())
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_mixed_file_gives_its_logits_in_both_languages(tmp_path, backend):
    path = str(write_gguf(tmp_path / "tiny.gguf", WIDE, kind=q4_k_m))
    stored, expanded = (load(open_source(path), storage=how) for how in (AS_STORED, EXPANDED))
    for plan in ("basic", "fused"):
        got, want = several_logits(stored, plan, 2, backend), several_logits(expanded, plan, 2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def rewritten(path, tensor, change):
    """The file with the blocks uint8 [rows, bytes] of a tensor changed in place."""
    reader = gguf.GGUFReader(path, "r+")
    change(next(t.data for t in reader.tensors if t.name == tensor))
    reader.data.flush()
    return str(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(  # where a scale is, or a minimum's, in a row
    "kind, at", [("Q8_0", 0), ("Q4_0", 18), ("Q4_1", 22), ("Q4_K", 0), ("Q4_K", 2), ("Q6_K", 208)]
)
def test_scales_that_are_no_numbers_are_refused_by_the_tensors_name(tmp_path, kind, at, value):
    config = replace(CONFIGS["llama"], **WIDTHS)
    path = write_gguf(tmp_path / "tiny.gguf", config, kind=kind)

    def change(blocks):
        blocks[3, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    path = rewritten(path, "blk.1.attn_output.weight", change)
    with pytest.raises(LabError, match=r"tensor blk.1.attn_output.weight has scales that are NaN or inf"):
        load(open_source(path))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_rows_that_are_no_whole_blocks_are_refused_in_one_line(tmp_path, capsys, kind):
    """Of 96 columns: a type that only a mangled file names, since no program can write it."""
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q8_0")
    data, name = bytearray(path.read_bytes()), b"blk.1.ffn_gate.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # its number of dimensions, and these
    assert data[at] == gguf.GGMLQuantizationType.Q8_0
    data[at] = gguf.GGMLQuantizationType[kind]
    path.write_bytes(data)
    assert run(path, "--backend", "torch", "--device", "cpu", "--ids", "1") == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and f"not a multiple of {kind} block size (256)" in said and str(path) in said
    )


def test_a_quantised_tensor_of_another_size_is_refused(tmp_path):
    weights = tensors(CONFIGS["llama"])
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(96, 192)
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], weights, kind="Q4_1")
    with pytest.raises(LabError, match=r"ffn_down.weight is \[96, 192\]; the model's shape asks for"):
        load(open_source(str(path)))
    del weights["model.layers.0.mlp.down_proj.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], weights, kind="Q4_1")
    with pytest.raises(LabError, match="tensor blk.0.ffn_down.weight is missing"):
        load(open_source(str(path)))


def test_a_tied_embedding_that_the_file_holds_twice_is_kept_once(tmp_path):
    weights = tensors(CONFIGS["llama"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    path = write_gguf(tmp_path / "same.gguf", CONFIGS["llama"], weights, kind="Q4_1")
    loaded = load(open_source(str(path)))
    assert loaded.lm_head is loaded.embed and loaded.config.tie_embeddings
    kind = lambda name: "Q8_0" if "lm_head" in name else "Q4_1"
    path = write_gguf(tmp_path / "other.gguf", CONFIGS["llama"], weights, kind=kind)
    loaded = load(open_source(str(path)))
    assert loaded.lm_head is not loaded.embed and not loaded.config.tie_embeddings
    assert loaded.formats == "int4-g32-min, lm_head int8-g32"


# --- rounding floats ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-3"])
def test_quantise_rounds_layers_and_head_apart(tmp_path, name, format):
    config, want = CONFIGS[name], tensors(CONFIGS[name])
    source = open_source(str(write_folder(tmp_path / "tiny", config)))
    storage = storage_of(None, format)
    loaded = load(source, torch.bfloat16, storage=storage)
    assert loaded.formats == (format if format == "int8" else f"{format}, lm_head int8")
    q, k, v = (want[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert loaded.layers[1].wqkv.data.same(FORMATS[format].quantise(torch.cat((q, k, v))))
    assert loaded.layers[0].w_down.format == format
    head = want["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    assert loaded.lm_head.data.same(FORMATS["int8"].quantise(head))
    assert loaded.embed.format == ("int8" if config.tie_embeddings else None)
    planned_config, formats = planned(source, torch.bfloat16, storage)
    assert formats.nbytes(planned_config, torch.bfloat16) == loaded.nbytes
    assert formats.text(planned_config, torch.bfloat16) == loaded.formats


def test_a_duplicate_of_a_tied_embedding_is_rounded_like_it_and_kept_once(tmp_path):
    weights = tensors(CONFIGS["llama"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    source = open_source(str(write_folder(tmp_path / "tiny", CONFIGS["llama"], weights)))
    loaded = load(source, storage=storage_of(None, "int4-g32"))
    assert loaded.lm_head is loaded.embed and loaded.embed.format == "int8"


def test_random_presets_are_quantised_some_rows_at_a_time(monkeypatch):
    source, storage = RandomSource(CONFIGS["qwen3"]), storage_of(None, "int4-g128", "none")
    whole = load(source, storage=storage)
    monkeypatch.setattr("lab.formats.format.QUANTISED_AT_ONCE", 1000)
    parts = load(source, storage=storage)
    assert all(a.same(b) for a, b in zip(whole.matrices(), parts.matrices(), strict=True))
    assert whole.formats == "int4-g128, lm_head fp32" and whole.embed.format is None
    assert logits(whole).isfinite().all()


def test_quantise_what_is_quantised_only_where_it_is_expanded_first(tmp_path):
    path = str(write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q8_0"))
    with pytest.raises(LabError, match=r"quantised already \(Q8_0\); leave out --quantise, or expand them"):
        load(open_source(path), storage=storage_of(None, "int4-g32"))
    loaded = load(open_source(path), storage=storage_of("fp32", "int4-g32"))
    assert loaded.formats == "int4-g32, lm_head int8"


def test_a_weight_too_large_for_its_scale_is_named(tmp_path):
    weights = tensors(CONFIGS["llama"])
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e7
    source = open_source(str(write_folder(tmp_path / "tiny", CONFIGS["llama"], weights)))
    with pytest.raises(LabError, match=r"1.mlp.up_proj.weight: format int4-g32: a weight is too large"):
        load(source, storage=storage_of(None, "int4-g32"))


def test_weights_too_small_for_the_scales_are_named(tmp_path):
    weights = tensors(CONFIGS["llama"])
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e-9
    source = open_source(str(write_folder(tmp_path / "tiny", CONFIGS["llama"], weights)))
    with pytest.raises(
        LabError, match=r"1.mlp.up_proj.weight: format q6_k: the weights, .* too small for its"
    ):
        load(source, storage=storage_of(None, "q6_k"))
    assert load(source, storage=storage_of(None, "int8")).formats == "int8"


@pytest.mark.parametrize("quantise", [None, "int4-g128-zero"])
def test_packed_weights_beyond_float16_are_named(tmp_path, quantise):
    """Kernels multiply their codes, but prefill expands them to the dtype of the activations."""
    weights = tensors(CONFIGS["llama"])
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 7e4
    if quantise:
        path = write_folder(tmp_path / "tiny", CONFIGS["llama"], weights)
    else:
        path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], weights, kind="Q8_0")
    storage = storage_of(None, quantise)
    with pytest.raises(
        LabError, match=r"1.mlp.up_proj.weight in int.* has weights beyond 65504, .* in fp16; use"
    ):
        load(open_source(str(path)), torch.float16, storage=storage)
    loaded = load(open_source(str(path)), torch.bfloat16, storage=storage)
    assert loaded.layers[1].w_gate_up.data.largest() > 65504


@pytest.mark.parametrize("name", FORMATS)
def test_the_bound_of_a_packed_matrix_is_above_its_weights(name):
    matrix = FORMATS[name].quantise(torch.randn(24, 300) + 0.5)
    largest = float(matrix.double().abs().max())
    assert largest == pytest.approx(matrix.largest()) and largest <= matrix.bound() < 4 * largest


def test_too_little_memory_is_told_by_the_bytes_of_the_format(monkeypatch):
    source = RandomSource(CONFIGS["llama"])
    free = load(source, storage=storage_of(None, "int4-g32")).nbytes
    monkeypatch.setattr("lab.model.memory.free_bytes", lambda device: free)
    load(source, storage=storage_of(None, "int4-g32"))
    with pytest.raises(LabError, match="model tiny in fp32 needs .* or --quantise"):
        load(source)


@pytest.mark.parametrize(
    "options, says",
    [
        (("int4", None, None), "unknown weights 'int4'"),
        ((None, "int3", None), "unknown format 'int3'"),
        ((None, "int4-g32", "int3"), "unknown format 'int3'"),
        ((None, None, "int8"), "--quantise-head needs --quantise"),
    ],
)
def test_options_that_are_refused(options, says):
    with pytest.raises(LabError, match=says):
        storage_of(*options)


def test_options():
    assert storage_of() == AS_STORED and storage_of("fp16") == EXPANDED
    assert storage_of(None, "fp8") == Storage(True, "fp8", "int8")
    assert storage_of("fp32", "fp8", "none") == Storage(False, "fp8", None)
    assert dtype_of(None, None) is None and dtype_of("stored", "fp16") == "fp16"
    assert dtype_of("bf16", None) == dtype_of("bf16", "bf16") == "bf16"
    with pytest.raises(LabError, match="--weights-as bf16 and --dtype fp32 contradict each other"):
        dtype_of("bf16", "fp32")


# --- the verbs ---


def run(*words):
    return cli.main(["run", *map(str, words)])


def test_run_says_the_formats(tmp_path, capsys):
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q4_1")
    words = path, "--backend", "torch", "--device", "cpu", "--ids", "1,2,3", "--max-new-tokens", "3"
    ids = []
    for more, formats in (
        (("--weights-as", "stored"), "int4-g32-min"),
        ((), "fp32"),  # the default of a CPU
        (("--weights-as", "fp32"), "fp32"),
        (("--weights-as", "bf16"), "bf16"),
        (("--weights-as", "fp32", "--quantise", "fp8"), "fp8, lm_head int8"),
    ):
        assert run(*words, *more, "--json", tmp_path / "run.json") == 0
        written, said = json.loads((tmp_path / "run.json").read_text()), capsys.readouterr().err
        assert written["weights"] == formats
        assert written["dtype"] == ("bf16" if "bf16" in more else "fp32")
        packed = formats not in ("fp32", "bf16")
        assert (f"fp32, weights {formats} on cpu" in said) == packed == ("expands them" in said)
        ids.append(written["output_ids"])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "words, says",
    [
        (("--weights-as", "bf16", "--dtype", "fp32"), "contradict each other"),
        (("--weights-as", "int8"), "unknown weights 'int8'"),
        (("--quantise", "int4"), "unknown format 'int4'"),
        (("--quantise-head", "int8"), "--quantise-head needs --quantise"),
        (("--quantise", "fp8"), "quantised already (Q8_0)"),
    ],
)
def test_run_refuses_in_one_line(tmp_path, capsys, words, says):
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], kind="Q8_0")
    assert run(path, "--backend", "torch", "--device", "cpu", "--ids", "1", *words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIGS["llama"])
    monkeypatch.setattr(card, "commit", lambda: "c0ffee")
    monkeypatch.setattr(model_bench, "open_source", lambda name, kind: RandomSource(PRESETS[name]))


def bench(*words):
    words = "bench", "model", "tiny", "--backend", "torch", "--device", "cpu", "--context", "16", *words
    return cli.main([str(word) for word in words])


def test_bench_records_the_formats_and_their_bytes(tmp_path, tiny_preset):
    for words in ((), ("--quantise", "int4-g32"), ("--quantise", "int4-g32", "--quantise-head", "none")):
        assert bench("--out", tmp_path, *words) == 0
    records = schema.read(tmp_path)
    plain, packed, headless = records.of_kind("model")
    assert (plain.weight_format, packed.weight_format) == (None, "int4-g32, lm_head int8")
    assert headless.weight_format == "int4-g32, lm_head fp32"
    assert len({schema.key(r) for r in (plain, packed, headless)}) == 3
    loaded = load(RandomSource(CONFIGS["llama"]), storage=storage_of(None, "int4-g32"))
    kv = 17 * 2 * 2 * CONFIGS["llama"].kv_width * 4
    assert packed.weight_bytes == loaded.nbytes and packed.bytes == loaded.step_nbytes + kv
    assert plain.weight_bytes > 5 * packed.weight_bytes and plain.error is packed.error is None
    assert "int4-g32, lm_head int8" in compare.label(packed)
    runs = {run.id: run for run in report.load(tmp_path)}
    said = [figures.conditions(runs[r.run], runs[r.run].model) for r in (plain, packed, headless)]
    assert ["weights int4-g32, lm_head int8" in text for text in said] == [False, True, False]
    assert "weights int4-g32, lm_head fp32" in said[2]


def test_what_a_bench_is_asked_of_formats():
    settings = settings_of(Request("model", device="cpu", quantise="fp8"))
    assert settings.storage == storage_of(None, "fp8")
    rig = Rig("cpu", {"torch": None}, None, plans=("basic", "persistent"))
    both = [("torch", "basic"), ("torch", "persistent")]
    assert rig.sides(1, "bf16") == both
    assert settings_of(Request("model", device="cpu", weights_as="fp16")).dtypes == ("fp16",)
    with pytest.raises(LabError, match="contradict each other"):
        settings_of(Request("model", device="cpu", weights_as="fp16", dtypes=("bf16",)))
    with pytest.raises(LabError, match="unknown format"):
        settings_of(Request("model", device="cpu", quantise="int5"))


def test_old_records_have_no_format_and_compare(tmp_path):
    """A line as it was written before there were formats is the same measurement as one of plain weights."""
    row = schema.ModelRow("r", "m", "torch", "basic", "graph", "bf16", 1, 16)
    line = json.loads(schema.to_line(row))
    assert "weight_format" not in line  # null fields are left out
    assert schema.key(schema.from_dict(line)) == schema.key(row)
    assert schema.key(row) != schema.key(replace(row, weight_format="int8"))
