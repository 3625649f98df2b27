"""The decode step against a plain float64 recomputation, the paged cache, tokenizers, generation, `lab
run`."""

import argparse
import json
import random
from collections import Counter

import pytest
import torch
from tiny_models import (
    CHAT_TEMPLATE,
    CONFIGS,
    byte_level_vocabulary,
    reference_logits,
    tensors,
    write_folder,
    write_gguf,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lab.dispatch import Trace, select
from lab.errors import LabError
from lab.model import prefill as prefill_module
from lab.model import run
from lab.model.decoder import Decoder
from lab.model.generate import generate, generate_batch, teacher_forced_logits
from lab.model.kv_cache import PagedKVCache
from lab.model.plans import find_plan
from lab.model.sampling import Sampling
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.text import tokenizer
from lab.model.text.tokenizer import TextStream, Tokenizer, render_chat
from lab.model.weights import load

IDS = random.Random(0).choices(range(272), k=40)  # crosses two page boundaries
TOLERANCE = 2e-5  # float32 over two layers and sums of up to 256 terms; the logits are of size 1 to 4


def make(name="llama", backend="torch", device="cpu", dtype=torch.float32, trace=None, **options):
    """A decoder with the weights of tiny_models.tensors(CONFIGS[name])."""
    config = CONFIGS[name]
    return Decoder(
        load(RandomSource(config, seed=1), dtype, device),
        select(backend, device, trace=trace),
        max_context=options.pop("max_context", 64),
        **options,
    )


@pytest.fixture(autouse=True)
def same_random_weights(monkeypatch, device):
    """A GPU's generator gives other values than the CPU's: the tests' models are drawn on the CPU
    everywhere."""
    fill = RandomSource.fill
    if device != "cpu":

        def fill_on_cpu(self, name, out):
            drawn = torch.empty(out.shape)
            fill(self, name, drawn)
            out.copy_(drawn)

        monkeypatch.setattr(RandomSource, "fill", fill_on_cpu)


# --- the decode step ---


@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_decode_equals_recomputation(name, backend, device):
    ids = IDS
    if backend == "triton" and device == "cpu":  # interpreted: a fifth of a second a token
        if name not in ("qwen2", "qwen3"):
            pytest.skip("qwen2 and qwen3 run all kernels: with a bias, and with norms of q and k")
        ids = IDS[:18]
    want = reference_logits(CONFIGS[name], tensors(CONFIGS[name]), ids)
    got = teacher_forced_logits(make(name, backend, device, splits=2), ids)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("chunk", [2048, 7])
def test_prefill_equals_recomputation(name, chunk, device, monkeypatch):
    monkeypatch.setattr(prefill_module, "CHUNK", chunk)
    want = reference_logits(CONFIGS[name], tensors(CONFIGS[name]), IDS)
    got = teacher_forced_logits(make(name, device=device), IDS, prefilled=33)
    torch.testing.assert_close(got.double(), want[33:], rtol=0, atol=TOLERANCE)


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors: on a GPU it waits for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.name() in ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense")
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("chunk, chunks", [(2048, 1), (7, 5)])
def test_prefill_waits_for_the_device_once_a_chunk(chunk, chunks, monkeypatch):
    monkeypatch.setattr(prefill_module, "CHUNK", chunk)
    decoder = make()
    with HostReads() as reads:
        prefill_module.prefill(decoder.weights, decoder.cache, decoder.buffers.cos_sin, 0, IDS[:33])
    assert reads.count == chunks


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 9, 19])
def test_prefill_shows_an_overflow_only_to_the_tokens_that_follow(at, bad, chunk, device, monkeypatch):
    monkeypatch.setattr(prefill_module, "CHUNK", chunk)
    ids, states = [*IDS[:20]], []
    ids[at] = 271  # no other token is
    assert ids.count(271) == 1
    for value in (0.0, bad):
        decoder = make(device=device)
        decoder.weights.embed.data[271, 3] = value
        states.append(prefill_module.prefill(decoder.weights, decoder.cache, decoder.buffers.cos_sin, 0, ids))
    torch.testing.assert_close(states[1][:at], states[0][:at])
    assert not states[1][at:].isfinite().all(1).any()
    page, slot = decoder.cache.slots(0, 0, at)
    for cache in (decoder.cache.k, decoder.cache.v):
        assert cache[:, page, :, slot].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend, device):
    """Each of about 16 roundings a layer moves the residual stream by up to half an epsilon of its size."""
    want = reference_logits(CONFIGS["qwen3"], tensors(CONFIGS["qwen3"]), IDS)
    got = teacher_forced_logits(make("qwen3", backend, device, dtype), IDS)
    assert (got - want).abs().max() < 2 * 16 * torch.finfo(dtype).eps / 2 * want.abs().max()


@pytest.mark.parametrize("options", [{"splits": 1}, {"splits": 3}, {"page_size": 64}, {"page_size": 256}])
@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_splits_and_page_sizes_do_not_matter(backend, options, device):
    want = reference_logits(CONFIGS["llama"], tensors(CONFIGS["llama"]), IDS)
    got = teacher_forced_logits(make(backend=backend, device=device, **options), IDS)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE)


PROMPTS = [IDS[:n] for n in (1, 15, 16, 17, 33)]


@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_batch_equals_single(backend, device):
    """Sequences of different lengths, decoded together in a larger batch with an idle row, and alone."""
    together = generate_batch(make(backend=backend, device=device, batch=6), PROMPTS, 12)
    single = make(backend=backend, device=device)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.output_ids == generate(single, prompt, 12).output_ids
        assert len(result.decode_ms) == len(result.output_ids) == 12


def test_rows_come_and_go(device):
    """A row admitted while another decodes, and a row reused, give what they give alone."""
    decoder, alone = make(device=device, batch=2), make(device=device)
    want = {n: generate(alone, IDS[:n], 8).output_ids for n in (5, 20, 9)}
    got = {n: [] for n in want}
    decoder.admit(0, IDS[:5])
    rows = {0: 5}
    for step in range(14):
        if step == 3:
            decoder.admit(1, IDS[:20])
            rows[1] = 20
        if step == 6:
            decoder.finish(0)
            decoder.admit(0, IDS[:9])
            rows[0] = 9
        tokens = decoder.step().tolist()
        for row, prompt in rows.items():
            got[prompt].append(tokens[row])
    assert got[5] == want[5][:6] and got[20][:8] == want[20] and got[9] == want[9]


def test_greedy_follows_the_largest_logit(device):
    result = generate(make(device=device), IDS[:7], 5)
    logits = reference_logits(CONFIGS["llama"], tensors(CONFIGS["llama"]), IDS[:7] + result.output_ids)
    assert result.output_ids == logits[6:-1].argmax(-1).tolist()


def test_sampling_is_seeded(device):
    decoder = make(device=device)
    draw = [
        generate(decoder, IDS[:3], 20, Sampling(1.0, top_k=50, top_p=0.9, seed=seed)).output_ids
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_trace_counts_every_op(device):
    trace = Trace()
    generate(make("qwen3", "torch", device, trace=trace), IDS[:4], 3)
    calls = Counter()
    for row in trace.rows():
        assert row["backend"] == "torch"
        calls[row["op"]] += row["calls"]
    steps, layers = 3, 2
    assert calls == {
        "embedding": steps,
        "rmsnorm": steps * (1 + 4 * layers),
        "linear": steps * (4 * layers + 1),
        "rope": steps * layers,
        "kv_append": steps * layers,
        "decode_attention": steps * layers,
        "silu_mul": steps * layers,
        "sample": steps,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
def test_graph_equals_eager(backend):
    sampling, traces = Sampling(0.8, seed=3), []
    outputs = []
    for eager in (False, True):
        traces.append(Trace())
        decoder = make("qwen3", backend, "cuda", trace=traces[-1], batch=5, eager=eager)
        outputs.append([r.output_ids for r in generate_batch(decoder, PROMPTS, 12, sampling)])
    assert outputs[0] == outputs[1]
    assert traces[0].counts == traces[1].counts and sum(traces[0].counts.values()) > 0


# --- the paged cache ---


def cache(**options):
    arguments = {"sequences": 2, "max_context": 64, "dtype": torch.float32, "device": "cpu"} | options
    return PagedKVCache(CONFIGS["llama"], **arguments)


def test_pages_are_handed_out_shuffled_and_given_back():
    paged = cache()
    paged.extend(0, 40)
    paged.extend(1, 1)
    paged.extend(0, 9)  # 49 tokens: a fourth page
    used = paged.block_table[0, :4].tolist() + paged.block_table[1, :1].tolist()
    assert used == paged.held[0] + paged.held[1] and len(set(used)) == 5
    assert used != sorted(used)  # seeded, so this cannot flicker
    assert paged.utilisation() == {"pages_used": 5 / 8, "tokens_used": 50 / 128, "fill": 50 / 80}
    paged.release(0)
    paged.release(1)
    assert sorted(paged.free) == list(range(8)) and paged.utilisation()["fill"] == 0.0


def test_write_and_read_through_the_block_table():
    paged = cache()
    for length in (7, 13):  # interleaved, so that pages of the two mix
        for sequence in (0, 1):
            paged.extend(sequence, length)
    k, v = torch.randn(2, 20, 2, 64).unbind()
    paged.write(1, paged.slots(0, 0, 20), k, v)
    paged.write(1, paged.slots(1, 0, 20), v, k)
    got_k, got_v = paged.read(1, paged.slots(0, 0, 20))
    assert torch.equal(got_k, k) and torch.equal(got_v, v)
    page, row = divmod(17, 16)
    assert torch.equal(paged.k[1][paged.held[0][page], :, row], k[17])
    assert not paged.k[0].any()


def test_full_cache():
    paged = cache(max_context=40)
    paged.extend(0, 40)
    with pytest.raises(
        LabError, match="sequence 0 would hold 41 tokens and its limit is 40; raise --max-context"
    ):
        paged.extend(0, 1)
    small = cache(pages=3)
    small.extend(0, 20)
    with pytest.raises(LabError, match=r"needs 2 more page\(s\) of 16 tokens and 1 of 3 are free"):
        small.extend(1, 17)
    assert small.lengths == [20, 0] and len(small.free) == 1  # refused as a whole


@pytest.mark.parametrize(
    "options, says",
    [
        ({"page_size": 24}, "page size 24: choose from 16"),
        ({"max_context": 0}, "at least 1"),
        ({"max_context": 257}, "longer than the 256"),
    ],
)
def test_bad_cache(options, says):
    with pytest.raises(LabError, match=says):
        cache(**options)


# --- generation ---


def test_stops_at_eos(device):
    decoder = make(device=device)
    free = generate(decoder, IDS[:9], 10).output_ids
    stop = free[4]
    result = generate(decoder, IDS[:9], 10, stop_ids={stop})
    assert result.output_ids == free[: free.index(stop) + 1] and result.stopped_by == "stop"
    assert decoder.cache.utilisation()["pages_used"] == 0


def test_cache_fills_up_on_the_way(device):
    decoder, seen = make(device=device, max_context=20), []
    result = generate(decoder, IDS[:18], 10, on_token=seen.append)
    assert result.stopped_by == "length" and len(seen) == 3  # tokens 18, 19 and 20 were read
    assert not decoder.live_rows and decoder.cache.utilisation()["pages_used"] == 0
    assert len(generate(decoder, IDS[:18], 3).output_ids) == 3  # and the decoder still works


@pytest.mark.parametrize(
    "prompt, says",
    [
        ([], "prompt is empty"),
        ([3, 272], "id 272 is outside the vocabulary of 272"),
        ([-1], "id -1 is outside"),
        ([1] * 65, "has 65 tokens and the cache holds 64"),
    ],
)
def test_bad_prompts(prompt, says):
    with pytest.raises(LabError, match=says):
        generate(make(), prompt, 4)


def test_nan_is_an_error_not_a_token(device):
    decoder = make(device=device)
    decoder.weights.layers[1].w_down.data.fill_(torch.nan)
    with pytest.raises(LabError, match="logits after token 3 are not numbers"):
        generate(decoder, IDS[:3], 4)


def test_plans_and_sampling_are_checked():
    with pytest.raises(LabError, match="unknown plan 'fast': choose from basic, fused"):
        find_plan("fast", 1, torch.float32)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": 1e-45},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1 << 31},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ):
        with pytest.raises(LabError, match=next(iter(wrong))):
            Sampling(**wrong)


# --- tokenizers ---

TEXT = "Hello, Grüße 🎉 漢字 123 don't\n\n  x"


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """The same tokenizer from a GGUF file and from a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "gguf": open_source(str(write_gguf(folder / "tiny.gguf", CONFIGS["llama"]))).tokenizer(),
        "folder": open_source(str(write_folder(folder / "tiny", CONFIGS["llama"]))).tokenizer(),
    }


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_tokenizer(two_tokenizers, kind):
    t = two_tokenizers[kind]
    assert t.decode(t.encode(TEXT)) == TEXT
    assert t.encode("hello") == [t.backend.token_to_id("hell"), t.backend.token_to_id("o")]
    assert t.encode("<|start|>h") == [256, t.backend.token_to_id("h")] and t.decode([256, 257]) == ""
    assert t.eos == {257} and t.bos is None and t.size == 272
    assert t.encode_chat([{"role": "user", "content": "hello"}]) == t.encode(
        "<|start|>user\nhello<|end|><|start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_streaming_gives_whole_characters(two_tokenizers, kind):
    t = two_tokenizers[kind]
    ids, stream = t.encode(TEXT), t.stream()
    pieces = [stream.push(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "🎉" in pieces and "".join(pieces) == TEXT and stream.finish() == ""


def test_streaming_flushes_what_never_completes(two_tokenizers):
    t = two_tokenizers["gguf"]
    ids = t.encode("a🎉")[:-1]  # three of the four bytes
    stream = t.stream()
    assert "".join(map(stream.push, ids)) == "a"
    assert "a" + stream.finish() == t.decode(ids)


def test_byte_order_of_random_ids_streams_to_the_same_text(two_tokenizers):
    t, chance = two_tokenizers["gguf"], random.Random(0)
    for _ in range(50):
        ids = chance.choices(range(272), k=30)
        stream = t.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == t.decode(ids)


def gguf_scalars(**changes):
    return {
        f"tokenizer.ggml.{key}": value
        for key, value in {
            "model": "gpt2",
            "pre": "smollm",
            "bos_token_id": 256,
            "eos_token_id": 257,
            **changes,
        }.items()
    }


def gguf_tokenizer(tokens=None, merges=None, kinds=None, scores=None, **scalars):
    default_tokens, default_merges = byte_level_vocabulary(272)
    arrays = {
        "tokens": default_tokens if tokens is None else tokens,
        "scores": scores,
        "token_type": kinds,
        "merges": default_merges if merges is None else merges,
    }
    return tokenizer.from_gguf(gguf_scalars(**scalars), lambda key: arrays[key.rpartition(".")[2]], "file")


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("llama-bpe", "a1234 b'S\n", ["a", "123", "4", "Ġb", "'S", "Ċ"]),
        ("qwen2", "a1234 b'S\n", ["a", "1", "2", "3", "4", "Ġb", "'S", "Ċ"]),
        ("smollm", "a12 b's", ["a", "1", "2", "Ġb", "'s"]),
        ("gpt-2", "a12 b's", ["a", "12", "Ġb", "'s"]),
    ],
)
def test_pre_tokenizers(pre, text, pieces):
    backend = gguf_tokenizer(pre=pre).backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_qwen2_normalizes():
    t = gguf_tokenizer(pre="qwen2")
    assert t.encode("e\u0301") == t.encode("\u00e9")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"model": None}, "no tokenizer in it; use --ids"),
        ({"tokens": []}, "no tokenizer in it; use --ids"),
        ({"kinds": [1, 1]}, "272 tokens but 2 token types"),
        ({"merges": ["h"]}, "mangled"),
        ({"merges": ["h zzz"]}, "mangled"),
        ({"bos_token_id": 272, "add_bos_token": True}, "bos_token_id 272 is outside the vocabulary of 272"),
        ({"tokens": ["a", "a"], "merges": []}, "repeats tokens"),
        ({"model": "llama"}, "no score for each token"),
    ],
)
def test_bad_gguf_tokenizers(changes, says):
    with pytest.raises(LabError, match=says):
        gguf_tokenizer(**changes)


def sentencepiece_by_hand(text, vocab, scores):
    """llama.cpp's algorithm: merge the adjacent pair whose joined piece scores highest, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        best = max(
            ((scores[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in vocab),
            default=None,
        )
        if best is None:
            break
        i = -best[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        ids += [vocab[piece]] if piece in vocab else [vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


def test_sentencepiece():
    chance = random.Random(1)
    letters = ["▁", *"abcd"]
    words = sorted({"".join(chance.choices(letters, k=chance.randint(2, 4))) for _ in range(60)})
    # A piece can only be reached through pieces: keep those that some split of two known pieces makes.
    known = set(letters)
    for word in sorted(words, key=len):
        if any(word[:cut] in known and word[cut:] in known for cut in range(1, len(word))):
            known.add(word)
    pieces = [w for w in words if w in known]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    ranks = {piece: -float(rank) for rank, piece in enumerate(chance.sample(pieces, len(pieces)))}
    scores = [ranks.get(token, -1e6) for token in tokens]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    t = gguf_tokenizer(
        tokens, [], kinds, scores, model="llama", bos_token_id=1, eos_token_id=2, unknown_token_id=0
    )
    vocab, by_piece = {token: i for i, token in enumerate(tokens)}, dict(zip(tokens, scores))
    for _ in range(200):
        text = "".join(chance.choices(["a", "b", "c", "d", " ", "é"], k=chance.randint(1, 12)))
        ids = sentencepiece_by_hand(text, vocab, by_piece)
        assert t.encode(text) == [1, *ids]
        assert t.decode(t.encode(text)) == text
        stream = t.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == text
    assert t.eos == {2} and t.encode("</s>", raw=False) == [2]


def test_missing_and_broken_tokenizer_of_a_folder(tmp_path):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], tokenizer=False)
    assert open_source(str(folder)).tokenizer() is None
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(LabError, match="tokenizer.json is mangled"):
        open_source(str(folder)).tokenizer()


def test_chat_template_runs_in_a_sandbox():
    messages = [{"role": "user", "content": "hi"}]
    escapes = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ]
    for template in escapes:
        with pytest.raises(LabError, match="chat template cannot be rendered"):
            render_chat(template, messages, {})
    for template in ("{% if %}", "{{ messages[0]['no']['deeper'] }}"):
        with pytest.raises(LabError, match="chat template cannot be rendered"):
            render_chat(template, messages, {})
    with pytest.raises(LabError, match="refuses these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", messages, {})


def test_chat_template_has_what_templates_use():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}"
        "{% endfor %}{{ messages[1] | tojson }}{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "é<"}]
    assert render_chat(template, messages, {"bos_token": "<s>"}) == (
        '<s>hi{"role": "assistant", "content": "é<"}4True'
    )
    with pytest.raises(LabError, match="no chat template; use --raw"):
        Tokenizer(gguf_tokenizer().backend).encode_chat(messages)


def test_text_stream_waits_for_a_character():
    pieces = {0: b"\xf0\x9f", 1: b"\x8e\x89", 2: b"!"}
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    assert [stream.push(token) for token in (2, 0, 1, 2)] == ["!", "", "🎉", "!"]


# --- lab run ---


def lab_run(*words):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.main(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("run") / "tiny.gguf", CONFIGS["llama"])


def test_run_writes_what_it_did(tiny_gguf, tmp_path, capsys, device):
    out = tmp_path / "run.json"
    status = lab_run(
        tiny_gguf,
        "--backend",
        "torch",
        "--prompt",
        "hello",
        "--max-new-tokens",
        6,
        "--ignore-eos",
        "--dtype",
        "fp32",
        "--device",
        device,
        "--trace",
        "--json",
        out,
    )
    written, printed = json.loads(out.read_text()), capsys.readouterr()
    assert status == 0
    assert set(written) == {
        "prompt_ids",
        "output_ids",
        "text",
        "backend",
        "overrides",
        "plan",
        "device",
        "dtype",
        "weights",
        "kv_dtype",
        "kernels",
        "prefill_ms",
        "decode_ms",
        "stopped_by",
    }
    assert len(written["output_ids"]) == len(written["decode_ms"]) == 6
    assert printed.out == written["text"] + "\n"
    assert "decode_attention" in printed.err and "6 new tokens" in printed.err
    assert {row["op"]: row["calls"] for row in written["kernels"]}["decode_attention"] == 12
    assert (written["backend"], written["overrides"], written["plan"]) == ("torch", {}, "basic")
    assert list(tmp_path.iterdir()) == [out]  # nothing left beside it
    rendered = "<|start|>user\nhello<|end|><|start|>assistant\n"
    assert written["prompt_ids"] == gguf_tokenizer(kinds=[1] * 256 + [3, 3] + [1] * 14).encode(rendered)


def test_run_variants_agree(tiny_gguf, tmp_path, capsys):
    """Raw text and its ids, streamed and not, give the same tokens; without a tokenizer ids are printed."""
    common = ("--backend", "torch", "--device", "cpu", "--max-new-tokens", 5)
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"], tokenizer=False)
    outputs = []
    for number, words in enumerate(
        [
            (tiny_gguf, "--raw", "--prompt", "AB"),
            (tiny_gguf, "--ids", "32,33"),
            (tiny_gguf, "--ids", "32,33", "--no-stream"),
            (folder, "--ids", "32,33"),
        ]
    ):
        path = tmp_path / f"{number}.json"
        assert lab_run(*words, *common, "--json", path) == 0
        outputs.append((json.loads(path.read_text()), capsys.readouterr().out))
    assert len({tuple(record["output_ids"]) for record, _ in outputs}) == 1
    assert outputs[1][1] == outputs[2][1] == outputs[0][0]["text"] + "\n"
    assert (
        outputs[3][0]["text"] is None
        and outputs[3][1] == ",".join(map(str, outputs[3][0]["output_ids"])) + "\n"
    )


def test_run_with_a_tokenizer_that_is_not_supported(tmp_path, capsys):
    """Text is refused; ids work, and what is missing is said."""
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], pre="tekken")
    common = (path, "--backend", "torch", "--device", "cpu", "--max-new-tokens", 2)
    with pytest.raises(LabError, match="pre-tokenizer 'tekken' is not supported .*; use --ids"):
        lab_run(*common, "--prompt", "hello")
    assert lab_run(*common, "--ids", "5,6") == 0
    printed = capsys.readouterr()
    assert len(printed.out.split(",")) == 2 and "tekken" in printed.err and "no text is shown" in printed.err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--ids", "1,272"], "id 272 is outside the vocabulary of 272"),
        (["--ids", "1,two"], "write token ids with commas"),
        (
            ["--prompt", "hello", "--max-context", "8"],
            "prompt has 20 tokens and the cache holds 8; raise --max-context",
        ),
        (
            ["--ids", ",".join("1" * 257)],
            "prompt has 257 tokens and the cache holds 256, all that model tiny was made for",
        ),
        (["--ids", "1", "--max-context", "300"], "longer than the 256"),
        (["--ids", "1", "--max-context", "0"], "cache holds 0"),
        (["--ids", "1", "--page-size", "20"], "page size 20"),
        (["--ids", "1", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--ids", "1", "--temperature", "-1"], "temperature -1.0"),
        (["--ids", "1", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--ids", "1", "--device", "tpu"], "unknown device 'tpu'"),
        (["--ids", "1", "--device", "cpu:3"], "unknown device 'cpu:3'"),
        (["--prompt", "a\udcff"], "not valid UTF-8"),  # how Python passes on a stray byte
        (["--ids", "1", "--json", "."], "'.' is a folder"),
        (["--ids", "1", "--plan", "quick"], "unknown plan"),
        (["--ids", "1", "--override", "rope=metal"], "unknown backend 'metal'"),
        (["--ids", "1", "--override", "rop=cuda"], "unknown op 'rop': did you mean rope"),
        (["--ids", "1", "--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--prompt", "x", "--weights", "random"], "has no tokenizer here; pass token ids with --ids"),
    ],
)
def test_run_refuses(tiny_gguf, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    extra = [] if "--json" in words else ["--json", "out.json"]
    with pytest.raises(LabError, match=says) as caught:
        lab_run(
            tiny_gguf,
            "--backend",
            "torch",
            *([] if "--device" in words else ["--device", "cpu"]),
            *words,
            *extra,
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("generation_config.json", b'{"eos_token_id": [[1]]}', "eos_token_id is .*; expected token ids"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id is .*; expected token ids"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "chat template cannot be rendered"),
        ("tokenizer_config.json", b"[1", "tokenizer_config.json cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json is mangled"),
    ],
)
def test_run_refuses_a_mangled_file_beside_the_weights(tmp_path, capsys, file, content, says):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    (folder / file).write_bytes(content)
    with pytest.raises(LabError, match=says):
        lab_run(folder, "--backend", "torch", "--device", "cpu", "--prompt", "hello")
    assert capsys.readouterr().out == ""


def test_an_error_after_streamed_text_begins_a_line(tiny_gguf, capsys, monkeypatch):
    def fails(*arguments, on_text, **options):
        on_text("some text")
        raise LabError("no more")

    monkeypatch.setattr("lab.model.generate.generate", fails)
    with pytest.raises(LabError, match="no more"):
        lab_run(tiny_gguf, "--backend", "torch", "--device", "cpu", "--ids", "32")
    out = capsys.readouterr().out
    assert len(out) > 1 and out.endswith("\n")


def test_the_override_of_the_environment_goes_before_a_table(tiny_gguf, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    table.write_text(
        json.dumps({op: [{"batch": 1, "context": None, "backend": "cuda"}] for op in ("rope", "sample")})
    )
    monkeypatch.setenv("LAB_OVERRIDE", "rope=triton")
    assert (
        lab_run(
            tiny_gguf,
            "--backend",
            "torch",
            "--device",
            "cpu",
            "--ids",
            "32",
            "--max-new-tokens",
            1,
            "--dispatch",
            table,
        )
        == 0
    )
    assert "[torch, rope=triton, sample=cuda, plan basic" in capsys.readouterr().err


def test_chat_templates_of_both_files_are_one(two_tokenizers):
    assert {t.chat_template for t in two_tokenizers.values()} == {CHAT_TEMPLATE}
