"""Text that changes in silence, chats that are refused, and files that take all memory or time: one test for
each.

Right values that transformers or llama.cpp prescribe are written here with their source; neither is needed to
run this.
"""

import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
from tiny_models import CONFIGS, byte_level_vocabulary, tokenizer_json, write_folder, write_gguf

from lab import cli
from lab.dispatch import select
from lab.errors import LabError
from lab.model import run, weights
from lab.model.decoder import Decoder
from lab.model.generate import generate, generate_batch
from lab.model.sources import open_source
from lab.model.sources.random import RandomSource
from lab.model.text import process as text_process
from lab.model.text import tokenizer
from lab.model.text.tokenizer import render_chat
from lab.model.weights import load
from lab.numbers import integer, number
from lab.records.compare import parse_share

ROOT = Path(__file__).resolve().parent.parent
ASK = [{"role": "user", "content": "hello"}]
RUN = ("--backend", "torch", "--device", "cpu")


def folder_tokenizer(folder, change=None, **files):
    """A tokenizer of a Hugging Face folder: `change` edits the object of tokenizer.json, files are JSON by
    stem."""
    folder.mkdir(exist_ok=True)
    found = json.loads(tokenizer_json(272))
    if change:
        change(found)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return tokenizer.from_huggingface(folder)


def gguf_tokenizer(tokens=None, kinds=None, scores=None, template=None, **scalars):
    default_tokens, merges = byte_level_vocabulary(272)
    arrays = {"tokens": tokens or default_tokens, "scores": scores, "token_type": kinds, "merges": merges}
    named = {"model": "gpt2", "pre": "smollm", "bos_token_id": 256, "eos_token_id": 257, **scalars}
    found = {f"tokenizer.ggml.{key}": value for key, value in named.items() if value is not None}
    return tokenizer.from_gguf(
        {**found, "tokenizer.chat_template": template}, lambda key: arrays[key.rpartition(".")[2]], "file"
    )


def with_tokens(*texts):
    """The tokens of the tiny vocabulary, the last ones replaced."""
    tokens, _ = byte_level_vocabulary(272)
    return tokens[: 272 - len(texts)] + list(texts)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("run") / "tiny.gguf", CONFIGS["llama"])


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(text_process, "OTHER_SECONDS", 1)


# --- prompts changed in silence ---


@pytest.mark.parametrize(
    "saved",
    [
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 30},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 5,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
        {
            "padding": {
                "strategy": {"Fixed": 10**15},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 5,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
)
def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path, saved):
    """As transformers does: PreTrainedTokenizerFast calls no_truncation() and no_padding() unless asked."""
    plain = folder_tokenizer(tmp_path / "plain").encode("hello world")
    t = folder_tokenizer(tmp_path / "saved", lambda found: found.update(saved))
    assert t.encode("hello world") == plain and len(plain) > 6


@pytest.mark.parametrize(
    "pre, add_bos, begins",
    [
        ("llama-bpe", None, True),
        ("llama3", None, True),
        ("llama-v3", None, True),
        ("falcon3", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("gpt-2", None, False),
        ("qwen2", True, True),
    ],
)
def test_a_pre_tokenizer_of_llama_3_implies_the_beginning_token(pre, add_bos, begins):
    """llama.cpp, src/llama-vocab.cpp: these names set add_bos, which tokenizer.ggml.add_bos_token then
    overrides."""
    t = gguf_tokenizer(pre=pre, add_bos_token=add_bos)
    assert t.encode("hi")[0:1] == ([256] if begins else t.encode("h"))
    assert t.encode("hi", raw=False) == t.encode("hi")[begins:]


def test_a_sentencepiece_vocabulary_that_names_no_ids_has_the_usual_ones():
    """llama.cpp: where tokenizer.ggml.model is "llama", unknown, bos and eos are 0, 1 and 2 by default."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    t = gguf_tokenizer(
        tokens,
        [2, 3, 3, *[6] * 256, 1, 1],
        [0.0] * len(tokens),
        model="llama",
        bos_token_id=None,
        eos_token_id=None,
    )
    assert t.encode("a") == [1, 259, 260] and t.eos == {2}
    assert t.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
]


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5])
def test_end_of_turn_tokens_of_a_gguf_go_by_their_text(kind):
    """llama.cpp, src/llama-vocab.cpp: special_eog_ids, by text; it makes them control tokens whatever their
    type."""
    for text in ENDS:
        kinds = [1] * 271 + [kind]
        t = gguf_tokenizer(
            [token if token != "<|end|>" else "<other>" for token in with_tokens()][:271] + [text], kinds
        )
        assert t.eos == {257, 271}, text
        assert t.encode(f"h{text}") == [*t.encode("h"), 271], text
        assert t.decode([*t.encode("h"), 271, 257]) == "h", text
        stream = t.stream()
        assert "".join(map(stream.push, [*t.encode("h"), 271])) + stream.finish() == "h"


def test_a_closing_tag_of_html_ends_no_turn():
    tokens = with_tokens("</s>")
    assert gguf_tokenizer(tokens, [1] * 272).eos == {257}
    assert gguf_tokenizer(tokens, [1] * 271 + [3]).eos == {257, 271}


def test_the_vocabulary_in_which_end_ends_no_turn():
    """llama.cpp: with <|return|> and <|call|> beside it, <|end|> ends a message within the turn."""
    t = gguf_tokenizer(with_tokens("<|return|>", "<|call|>"), [1] * 272, eos_token_id=270)
    assert t.eos == {270, 271}


@pytest.mark.parametrize("special", [True, False])
def test_end_of_turn_tokens_of_a_folder(tmp_path, special):
    def add(found):
        for index, text in ((272, "<|im_end|>"), (273, "<tool>")):
            found["added_tokens"].append(
                {
                    "id": index,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": special,
                }
            )

    t = folder_tokenizer(
        tmp_path, add, generation_config={"eos_token_id": [3, 4]}, config={"eos_token_id": 257}
    )
    assert t.eos == {3, 4, 257, 272}
    assert t.decode([*t.encode("h"), 272, 273]) == ("h" if special else "h<tool>")
    assert t.decode([3]) != ""  # an ordinary token that a list names is text all the same


def test_templates_see_what_transformers_gives_them():
    """transformers' apply_chat_template passes tools=None and documents=None: defined, and none."""
    template = (
        "{{ tools is defined }} {{ tools is none }} {{ documents is defined }} {{ documents is none }} "
        "{% if tools is not none %}tools!{% endif %}{{ add_generation_prompt }} {{ anything is defined }}"
    )
    assert render_chat(template, ASK, {}) == "True True True True True False"


def test_tokens_that_only_special_tokens_map_names(tmp_path):
    t = folder_tokenizer(
        tmp_path,
        special_tokens_map={
            "bos_token": {"content": "<|start|>", "lstrip": False},
            "eos_token": "hell",
            "unk_token": "<nowhere>",
            "additional_special_tokens": ["<|end|>", {"content": "<unused0>"}],
        },
        tokenizer_config={"bos_token": None, "chat_template": "{{ bos_token }}|{{ eos_token }}"},
    )
    assert t.special == {
        "bos_token": "<|start|>",
        "eos_token": "hell",
        "unk_token": "<nowhere>",
        "additional_special_tokens": ["<|end|>", "<unused0>"],
    }
    hell, o = 260, t.encode("o")[0]
    assert t.eos == {hell, 257} and t.decode([hell, o]) == "o"  # 257: <|end|>, by its text
    assert t.encode("a<unused0>") == [*t.encode("a"), 261]  # one token, as every special token
    assert render_chat(t.chat_template, ASK, t.special) == "<|start|>|hell"


def test_tokenizer_config_goes_before_special_tokens_map(tmp_path):
    t = folder_tokenizer(
        tmp_path, tokenizer_config={"eos_token": "<|end|>"}, special_tokens_map={"eos_token": "<|start|>"}
    )
    assert t.eos == {257} and t.special["eos_token"] == "<|end|>"


def test_tokens_that_tokenizer_config_adds(tmp_path):
    """transformers adds the tokens of added_tokens_decoder that tokenizer.json lacks, in the order of their
    ids."""
    t = folder_tokenizer(
        tmp_path,
        tokenizer_config={
            "added_tokens_decoder": {
                "273": {"content": "<second>", "special": False},
                "272": {"content": "<first>", "special": True},
                "256": {"content": "<|start|>", "special": True},
            }
        },
    )
    assert t.encode("<second><first><|start|>") == [273, 272, 256] and t.decode([272, 273]) == "<second>"


@pytest.mark.parametrize(
    "template, leading",
    [
        (["s", "A"], [256]),
        (["s", "A", "e"], [256]),
        (["A", "e"], []),
        (["s", "e", "A"], [256, 257]),
        (["A"], []),
    ],
)
def test_what_comes_before_a_text(tmp_path, template, leading):
    """The tokens that the post-processor puts before a text are kept, whatever it puts behind."""
    pieces = {
        "s": {"SpecialToken": {"id": "<|start|>", "type_id": 0}},
        "A": {"Sequence": {"id": "A", "type_id": 0}},
        "e": {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
    }
    processor = {
        "type": "TemplateProcessing",
        "single": [pieces[piece] for piece in template],
        "pair": [pieces["A"], {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            text: {"id": text, "ids": [index], "tokens": [text]}
            for text, index in (("<|start|>", 256), ("<|end|>", 257))
        },
    }
    t = folder_tokenizer(tmp_path, lambda found: found.update(post_processor=processor))
    assert t.encode("hi") == leading + t.encode("hi", raw=False) and t.bos == (leading or [None])[0]


def byte_fallback(space_prefix=True):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a", "▁▁"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    return gguf_tokenizer(
        tokens,
        kinds,
        [0.0] * len(tokens),
        model="llama",
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=space_prefix,
    )


@pytest.mark.parametrize("vocabulary", ["byte fallback", "byte fallback without a prefix", "byte level"])
def test_streaming_and_decode_agree_on_any_ids(vocabulary):
    t = {
        "byte fallback": byte_fallback,
        "byte fallback without a prefix": lambda: byte_fallback(False),
        "byte level": gguf_tokenizer,
    }[vocabulary]()
    chance, euro = random.Random(0), [0xE2, 0x82, 0xAC, 0xFF, 0xC3, 0xA9, 0x80, 0x20, 0x41]
    if vocabulary == "byte level":
        bytes_of = (
            {byte: t.encode(chr(byte))[0] for byte in (0x20, 0x41)}
            | {byte: index for byte, index in zip((0xE2, 0x82, 0xAC), t.encode("€"))}
            | {byte: index for byte, index in zip((0xC3, 0xA9), t.encode("é"))}
        )
        choices = [*bytes_of.values(), 260, 256, 257, *range(150, 200)]
    else:
        choices = [*(3 + byte for byte in euro), *range(259, t.size), 0, 1, 2, 10**6]
    differ = []
    for _ in range(300):
        ids = chance.choices(choices, k=chance.randint(1, 14))
        stream = t.stream()
        pieces = [stream.push(index) for index in ids]
        if "".join(pieces) + stream.finish() != t.decode(ids):
            differ.append(ids)
    assert not differ


def test_a_valid_run_of_bytes_comes_whole_and_an_invalid_one_as_decode_shows_it():
    t = byte_fallback()
    euro, a = [3 + byte for byte in "€".encode()], 260
    stream = t.stream()
    assert [stream.push(index) for index in [a, *euro, a]] == ["a", "", "", "", "€a"]
    stream = t.stream()
    assert [stream.push(index) for index in [a, *euro, 3 + 0xFF, a]] == [
        "a",
        "",
        "",
        "",
        "",
        "\ufffd" * 4 + "a",
    ]


# --- chats that were refused ---


@pytest.mark.parametrize(
    "options, shown",
    [
        ("", '{"b": "é<&\'", "a": [1]}'),
        ("ensure_ascii=True", '{"b": "\\u00e9<&\'", "a": [1]}'),
        ("indent=1", '{\n "b": "é<&\'",\n "a": [\n  1\n ]\n}'),
        ("separators=(',', ':')", '{"b":"é<&\'","a":[1]}'),
        ("sort_keys=True", '{"a": [1], "b": "é<&\'"}'),
    ],
)
def test_tojson_takes_what_transformers_takes(options, shown):
    """transformers, utils/chat_template_utils.py: tojson(x, ensure_ascii=False, indent, separators,
    sort_keys)."""
    template = "{{ {'b': messages[0].content, 'a': [1]} | tojson(%s) }}" % options
    assert render_chat(template, [{"role": "user", "content": "é<&'"}], {}) == shown


def test_generation_blocks_render_their_body():
    template = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ loop.index }}{{ m.content }}{% break %}"
        "{% endgeneration %}{% endif %}{% endfor %}."
    )
    assert render_chat(template, ASK, {}) == "1hello."


@pytest.mark.parametrize(
    "name, value",
    [("eot", 272), ("eom", 10**9), ("eos", 4294967295), ("eot", -1), ("padding", 272), ("bos", 272)],
)
def test_an_id_out_of_range_is_left_out_with_a_warning(capsys, name, value):
    """llama.cpp logs "bad special token" and goes on."""
    t = gguf_tokenizer(**{f"{name}_token_id": value})
    assert value not in t.eos and t.encode("h")
    said = capsys.readouterr().err
    assert (
        f"{name}_token_id {value} is outside the vocabulary of 272; it is left out" in said
        and said.count("\n") == 1
    )


def test_an_end_id_of_a_folder_out_of_range_is_left_out_with_a_warning(tmp_path, capsys):
    t = folder_tokenizer(
        tmp_path, generation_config={"eos_token_id": [257, 99999, -3]}, config={"vocab_size": 300}
    )
    assert t.eos == {257}
    assert "99999 is outside the vocabulary of 300" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"bos_token_id": 272, "add_bos_token": True}, "bos_token_id 272 is outside the vocabulary"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; expected a token id"),
        ({"eot_token_id": True}, "eot_token_id is True; expected a token id"),
        ({"add_bos_token": 3}, "expected true or false"),
        ({"template": 7}, "no text"),
        ({"kinds": ["x"] * 272}, "no numbers"),
        ({"tokens": [1] * 272}, "no text"),
    ],
)
def test_metadata_of_a_wrong_type_is_said(changes, says):
    with pytest.raises(LabError, match=says):
        gguf_tokenizer(**changes)


# --- untrusted text ---


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ 'a' * 10**10 }}", "memory"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "memory|processor time",
        ),
        ("{{ 'a' * 10**8 }}", "a prompt of 100000000 characters|processor time"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "1 s of processor time",
        ),
        ("{{ 10**(10**9) }}", "1 s of processor time"),
        ("{{ '%1000000000000d' % 1 }}", "memory"),
        ("{{ [0] * 10**12 }}", "memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% include 'x' %}", "cannot be rendered"),
    ],
)
def test_a_hostile_chat_template_is_one_line(short_limits, template, says):
    began = time.monotonic()
    with pytest.raises(LabError, match=says) as caught:
        render_chat(template, ASK, {})
    assert "\n" not in str(caught.value) and "--raw" in str(caught.value) and len(str(caught.value)) < 700
    assert time.monotonic() - began < 60


def doubling(kind, pattern="h"):
    step = {"type": "Replace", "pattern": {"String": pattern}, "content": pattern * 2}
    return {"type": "Sequence", kind: [step] * 60}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": doubling("normalizers")},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(h+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
)
def test_a_hostile_normalizer_is_one_line(tmp_path, short_limits, change):
    t = folder_tokenizer(tmp_path, lambda found: found.update(change))
    with pytest.raises(LabError, match="processor time|memory|cannot encode") as caught:
        t.encode("h" * 60 + "!")
    assert (
        "\n" not in str(caught.value)
        and "tokenizer.json" in str(caught.value)
        and "--ids" in str(caught.value)
    )


def test_a_tokenizer_whose_process_is_gone_still_gives_one_line(tmp_path):
    t = folder_tokenizer(tmp_path)
    t.process._process.kill()
    for _ in range(2):
        with pytest.raises(LabError, match="SIGKILL.*use --ids"):
            t.encode("h")


def test_a_hostile_decoder_is_one_line(tmp_path, short_limits):
    t = folder_tokenizer(tmp_path, lambda found: found.update(decoder=doubling("decoders")))
    with pytest.raises(LabError, match="processor time|memory"):
        t.stream().push(t.encode("h")[0])


def test_an_unknown_token_error_and_a_panic_are_one_line(tmp_path):
    def word_level(found):
        found.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}, added_tokens=[])

    with pytest.raises(LabError, match="cannot encode this text .*UNK.*use --ids"):
        folder_tokenizer(tmp_path, word_level).encode("b")
    steps = [
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
    ]  # panics on an empty text
    t = folder_tokenizer(
        tmp_path, lambda found: found.update(decoder={"type": "Sequence", "decoders": steps})
    )
    with pytest.raises(
        LabError, match="cannot decode these ids .PanicException: index out of bounds.*"
    ) as caught:
        t.decode([])
    assert "\n" not in str(caught.value)


class Panic(BaseException):
    """As the tokenizers package's PanicException: no Exception."""


def test_what_is_no_exception_is_an_answer():
    def encode(text):
        raise Panic("index out of\nbounds")

    answer = text_process._answer(SimpleNamespace(encode=encode), op="encode", text="a")
    assert answer == {"kind": "other", "error": "Panic: index out of bounds"}


@pytest.mark.parametrize(
    "content", ["[" * 5000, '{"a":' * 5000, "[" * 200_000, "", "null", '{"version": "1.0"}']
)
def test_a_mangled_tokenizer_json_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LabError, match="tokenizer.json is mangled") as caught:
        tokenizer.from_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nested"])
def test_what_is_no_file_is_one_line(tmp_path, name, kind):
    folder_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif kind == "folder":
        (tmp_path / name).mkdir()
    elif name == "chat_template.jinja":
        (tmp_path / name).write_bytes(b"a" * (1 << 25))
    else:
        (tmp_path / name).write_text('{"a":' * 5000)
    with pytest.raises(LabError, match=name) as caught:
        tokenizer.from_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", ["\\x1b[2J\\x1b]0;owned\\x07", "\\u202eevil", "a\\nb\\r\\x08\\x9b1m"])
def test_control_characters_of_a_template_do_not_reach_the_terminal(tiny_gguf, tmp_path, capfd, message):
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    (folder / "chat_template.jinja").write_text("{{ raise_exception('%s') }}" % message)
    assert cli.main(["run", str(folder), *RUN, "--prompt", "hi"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and "refuses these messages" in err


def test_a_warning_is_one_line_without_control_characters(capsys):
    tokenizer.warn("a\x1b[31m\nb")
    assert capsys.readouterr().err == "lab: a\\x1b[31m b\n"


def test_the_process_ends_with_its_tokenizer():
    t = gguf_tokenizer()
    process = t.process._process
    del t
    assert process.poll() is not None


def test_the_process_imports_little():
    probe = (
        "import sys; from lab.model.text import backend, chat_template; chat_template._environment(); "
        "assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


# --- errors and output ---


def tiny_decoder(**options):
    return Decoder(load(RandomSource(CONFIGS["llama"], seed=1)), select("torch", "cpu"), **options)


def test_the_models_own_limit_ends_a_row_and_keeps_its_text():
    decoder = tiny_decoder(max_context=256, batch=2)
    long, short = generate_batch(decoder, [[1] * 250, [2] * 3], 12, tokenizer=gguf_tokenizer())
    assert (len(long.output_ids), long.stopped_by) == (7, "length") and long.text is not None
    assert (len(short.output_ids), short.stopped_by) == (12, "length")
    assert decoder.cache.utilisation()["pages_used"] == 0
    assert generate(decoder, [1] * 256, 5).stopped_by == "length"


def test_no_advice_that_cannot_help():
    with pytest.raises(LabError) as caught:
        generate(tiny_decoder(max_context=256), [1] * 257, 2)
    assert "--max-context" not in str(caught.value) and "was made for" in str(caught.value)


def test_run_writes_what_it_has_when_the_models_limit_is_reached(tiny_gguf, tmp_path, capfd):
    out = tmp_path / "run.json"
    assert (
        cli.main(
            ["run", str(tiny_gguf), *RUN, "--ids", ",".join(["5"] * 250), "--ignore-eos", "--json", str(out)]
        )
        == 0
    )
    written, printed = json.loads(out.read_text()), capfd.readouterr()
    assert written["stopped_by"] == "length" and len(written["output_ids"]) == 7
    assert printed.out == written["text"] + "\n"
    assert "was made for 256 tokens" in printed.err and "--max-context" not in printed.err


@pytest.mark.parametrize("words", [["--ids", "32,33,200,201"], ["--prompt", "é漢\U0001f389", "--no-stream"]])
def test_text_that_the_output_cannot_hold(tmp_path, words):
    """The tiny model's answer has bytes that are no UTF-8, so U+FFFD, which is no ASCII."""
    folder = write_folder(tmp_path / "tiny", CONFIGS["llama"])
    done = commands.lab(
        "run",
        folder,
        *RUN,
        *words,
        "--ignore-eos",
        "--max-new-tokens",
        24,
        "--json",
        tmp_path / "x.json",
        env={"PYTHONIOENCODING": "ascii:strict"},
    )
    text = json.loads((tmp_path / "x.json").read_bytes().decode("utf-8"))["text"]
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout == text.encode("ascii", "backslashreplace").decode() + "\n"
    assert not text.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_verb_prints_what_it_must(monkeypatch, encoding):
    name = "漢\udcff"  # and a byte that is no UTF-8
    for words in (
        ("run", name, "--prompt", "x", "--backend", "torch"),
        ("explain", name),
        ("compare", name, name),
        ("check", "--op", name),
        (name,),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert cli.main(list(words)) == 2
        streams[1].flush()
        assert streams[1].buffer.getvalue().count(b"\n") == 1, words


def test_standard_streams_take_any_text(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    cli.take_any_text()
    for stream in streams:
        stream.write("é\udcff")
        stream.flush()
        assert stream.buffer.getvalue() == b"\\xe9\\udcff"


@pytest.mark.parametrize("data", ["hé llo", "hé llo\n", "hé llo\r\n"])
def test_prompt_from_standard_input(tiny_gguf, tmp_path, monkeypatch, data):
    ids = []
    for prompt in ("hé llo", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        assert (
            cli.main(
                [
                    "run",
                    str(tiny_gguf),
                    *RUN,
                    "--prompt",
                    prompt,
                    "--max-new-tokens",
                    "1",
                    "--json",
                    str(tmp_path / "x.json"),
                ]
            )
            == 0
        )
        ids.append(json.loads((tmp_path / "x.json").read_text())["prompt_ids"])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "data, says", [(b"\xff", "not valid UTF-8"), (b"a" * (run.MAX_PROMPT + 1), "more than 16 MiB")]
)
def test_standard_input_that_is_no_prompt(tiny_gguf, monkeypatch, capfd, data, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli.main(["run", str(tiny_gguf), *RUN, "--prompt", "-"]) == 2
    assert says in capfd.readouterr().err


def test_a_slow_choice_is_said_before_it_begins():
    chosen = {"decode_step": "cuda", "rope": "torch"}
    assert "many seconds a token" in run.slowness(SimpleNamespace(chosen=chosen), "persistent", "cpu")
    assert run.slowness(SimpleNamespace(chosen=chosen), "persistent", "cuda") is None
    assert run.slowness(SimpleNamespace(chosen=chosen), "basic", "cpu") is None
    assert run.slowness(SimpleNamespace(chosen={"decode_step": "torch"}), "persistent", "cpu") is None
    assert "seconds a token" in run.slowness(SimpleNamespace(chosen={"rope": "triton"}), "basic", "cpu")


def test_the_slow_choice_is_said_before_the_weights_are_read(tiny_gguf, monkeypatch, capfd):
    def stop(*_):
        raise LabError("the weights are read")

    monkeypatch.setattr(weights, "load", stop)
    assert (
        cli.main(
            [
                "run",
                str(tiny_gguf),
                "--backend",
                "cuda",
                "--device",
                "cpu",
                "--plan",
                "persistent",
                "--dtype",
                "bf16",
                "--ids",
                "1",
            ]
        )
        == 2
    )
    first, second = capfd.readouterr().err.splitlines()
    assert "plan persistent on a CPU" in first and second == "lab: error: the weights are read"


def test_chat_templates_without_a_default_are_said(tmp_path, capsys):
    t = folder_tokenizer(
        tmp_path, tokenizer_config={"chat_template": [{"name": "tool_use", "template": "x"}]}
    )
    assert t.chat_template is None and "none of its chat templates is the default" in capsys.readouterr().err


# --- numbers of the command line ---

WRONG = ["1_0", " 10", "10 ", "１０", "٣", "+1", "0x10", "", "-", "1.0", "1e3", "ten", "1\n"]


@pytest.mark.parametrize("text", WRONG)
def test_integers_are_plain(text):
    with pytest.raises(ValueError):
        integer(text)


@pytest.mark.parametrize(
    "text", ["1_0.5", " 1", "nan", "inf", "-inf", "1e999", "１.5", "", ".", "0x1p3", "1,5"]
)
def test_numbers_are_plain(text):
    with pytest.raises(ValueError):
        number(text)


def test_shares_are_plain():
    assert parse_share("5%") == parse_share("0.05") == 0.05
    for text in ("1_0%", " 5%", "nan", "٥%"):
        with pytest.raises(LabError, match="not a share"):
            parse_share(text)


def test_plain_numbers_are_taken():
    assert [integer("0"), integer("-12"), integer("007")] == [0, -12, 7]
    assert [number("1.5"), number("-2"), number(".5"), number("1e-3"), number("3.")] == [
        1.5,
        -2.0,
        0.5,
        1e-3,
        3.0,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--ids", "1_0"),
        ("run", "--ids", "1, 2"),
        ("run", "--ids", "１"),
        ("run", "--ids", "1", "--max-new-tokens", "1_0"),
        ("run", "--ids", "1", "--seed", "1_0"),
        ("run", "--ids", "1", "--temperature", "1_0.0"),
        ("run", "--ids", "1", "--top-k", " 5"),
        ("run", "--ids", "1", "--max-context", "６４"),
        ("run", "--ids", "1", "--page-size", "1_6"),
        ("check", "--op", "rmsnorm", "--seed", "1_0"),
        ("bench", "ops", "rmsnorm", "--batch", "1_0"),
        ("bench", "ops", "rmsnorm", "--seconds", "0_1"),
        ("ledger", "llama-3.2-1b", "--batch", "1_0"),
        ("compare", "a", "b", "--min-us", "1_0"),
        ("inspect", "rmsnorm", "--case", "1_0"),
        ("inspect", "rmsnorm", "--sizes", "batch=1_0"),
    ],
)
def test_every_verb_takes_plain_numbers_alone(words, tiny_gguf, capfd):
    verb, *rest = words
    extra = [str(tiny_gguf), *RUN] if verb == "run" else []
    assert cli.main([verb, *extra, *rest]) == 2
    out, err = capfd.readouterr()
    wrong = rest[-1].rpartition("=")[2]
    assert out == "" and err.count("\n") == 1 and wrong in err, err


@pytest.mark.parametrize("when", ["before it is sent", "after its answer was read"])
def test_an_interrupted_request_takes_no_other_answer(when, tmp_path, monkeypatch):
    """As by Ctrl-C in a notebook: the next request got no answer, and after two minutes the process was
    ended."""
    words = open_source(str(write_folder(tmp_path / "model", CONFIGS["llama"])), "auto").tokenizer()
    want, function = words.encode("Hi"), "dumps" if when.startswith("before") else "loads"

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_process.json, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            words.encode("Hello")
    assert words.encode("Hi") == want != words.encode("Hello")
