"""Faults of models, text and `lab run` that other inputs of known kinds showed: one test for each."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from test_text_faults import ROOT, RUN, gguf_tokenizer, with_tokens
from tiny_models import (
    CONFIGS,
    byte_level_vocabulary,
    huggingface_config,
    tensors,
    tokenizer_json,
    write_folder,
    write_gguf,
)

from lab import cli
from lab.dispatch_table import read_table
from lab.errors import LabError
from lab.files import write_whole
from lab.model.config import from_huggingface
from lab.model.sources import open_source
from lab.model.text import tokenizer
from lab.model.text.backend import LONGEST_PIECE
from lab.text import for_terminal
from lab.tune import tuned


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("run") / "tiny.gguf", CONFIGS["llama"])


def hf_config(**changes):
    return from_huggingface({**huggingface_config(CONFIGS["llama"]), **changes}, "m", "config.json")


def one_line_error(call, *says):
    with pytest.raises(LabError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and all(word in message for word in says), message


# --- metadata of a model ---

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "within, beside, counts", [(None, 64, 64), (128, 64, 64), (128, None, 128), (None, None, 256)]
)
def test_the_original_context_beside_the_rope_parameters_goes_first(within, beside, counts):
    """transformers 5, modeling_rope_utils.py, standardize_rope_params: the outer one has priority, then the
    inner one, then max_position_embeddings."""
    found = hf_config(
        rope_scaling={**LLAMA3, "original_max_position_embeddings": within},
        original_max_position_embeddings=beside,
    )
    assert found.rope_scaling.original_context == counts


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2}}, "rope_type ['linear'] is not supported"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "rope_type {'a': 1} is not supported"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": -64}}, "must be above 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "original_max_position_embeddings": 0},
            "must be above 0",
        ),
        ({"num_key_value_heads": True}, "num_key_value_heads is True; expected int"),
        ({"num_key_value_heads": [True, True]}, "num_key_value_heads is True; expected int"),
        ({"vocab_size": True}, "vocab_size is True; expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected bool"),
    ],
)
def test_values_of_a_wrong_type_or_sign_are_refused_by_name(changes, says):
    one_line_error(lambda: hf_config(**changes), says)


def test_a_gguf_boolean_is_no_number_of_heads(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        CONFIGS["llama"],
        changed={"add_head_count_kv": None},
        extra=[("add_bool", "llama.attention.head_count_kv", True)],
    )
    one_line_error(lambda: open_source(str(path)), "llama.attention.head_count_kv is True; expected int")


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_refused(tmp_path, whole):
    """transformers loads the base model that the file names, and adds the adapter: other weights than those
    beside it."""
    folder = write_folder(tmp_path / "m", CONFIGS["llama"]) if whole else tmp_path
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
    )
    one_line_error(lambda: open_source(str(folder)), "adapter_config.json", "merge it")


@pytest.mark.parametrize("file", ["", ".", "..", "x" * 5000, "a\0b", "../m.safetensors"])
def test_an_index_that_names_no_file_beside_it(tmp_path, file):
    folder = write_folder(tmp_path / "m", CONFIGS["llama"], shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line_error(lambda: open_source(str(folder)), "model.safetensors.index.json")


def test_a_models_name_does_not_steer_the_terminal(tmp_path, capsys):
    folder = write_folder(tmp_path / "a\x1b[2Jb", CONFIGS["llama"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {"type": "linear", "factor": 2.0}})
    )
    open_source(str(folder)).config.check_context(300)
    assert "\x1b" not in (said := capsys.readouterr().err) and said.count("\n") == 1 and "a\\x1b[2Jb" in said


# --- tokenizers and templates ---


@pytest.mark.parametrize("text", ["[EOS]", "<eos>", "<|flush|>", "<|calls|>", "<|tool_response>", "<turn|>"])
def test_ends_of_turns_of_further_families(text):
    """llama.cpp, src/llama-vocab.cpp, special_eog_ids."""
    assert gguf_tokenizer(with_tokens(text)).eos == {257, 271}


@pytest.mark.parametrize(
    "texts, ends",
    [
        (("<|flush|>", "<|calls|>", "<|end|>"), {"<|flush|>", "<|calls|>"}),
        (("<|return|>", "<|call|>", "<|end|>"), {"<|return|>", "<|call|>"}),
        (("<|flush|>", "<|end|>"), {"<|flush|>", "<|end|>"}),
        (("</s>", "<|tool_response>"), {"<|tool_response>"}),
        (("</s>",), {"</s>"}),
    ],
)
def test_ends_that_end_no_turn_beside_others(texts, ends):
    """llama.cpp, src/llama-vocab.cpp: its exceptions for harmony, solar-open and gemma 4."""
    assert tokenizer.ends_by_text({text: i for i, text in enumerate(texts)}, {}).keys() == ends


def sentencepiece(*pieces, score=0.0):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (1 + len(pieces))]
    return gguf_tokenizer(
        tokens, kinds, [score] * len(tokens), model="llama", bos_token_id=None, eos_token_id=None
    )


def test_the_unknown_token_is_recognised_in_text():
    """llama.cpp, src/llama-vocab.cpp: tokens of type UNKNOWN are among those that are split off before all
    else (cache_special_tokens), as transformers does with unk_token."""
    t = sentencepiece("a")
    assert t.encode("a<unk>a").count(0) == 1 and t.decode([260, 0, 260]) == "aa"


def test_scores_that_are_no_numbers_are_refused():
    one_line_error(lambda: sentencepiece("a", score=float("nan")), "score")


def test_a_piece_that_would_take_all_time_is_refused_at_once():
    started = time.monotonic()
    one_line_error(lambda: sentencepiece("a" * 200_000), f"at most {LONGEST_PIECE}", "--ids")
    assert time.monotonic() - started < 10


def test_a_repeated_token_is_said_with_the_files_name():
    tokens, _ = byte_level_vocabulary(272)
    one_line_error(lambda: gguf_tokenizer(tokens[:-1] + tokens[:1]), "file", "repeats tokens", "--ids")


def test_a_gguf_with_named_templates_alone_says_so(tmp_path, capsys):
    tokens, merges = byte_level_vocabulary(272)
    path = write_gguf(
        tmp_path / "m.gguf",
        CONFIGS["llama"],
        tokenizer=False,
        extra=[
            ("add_tokenizer_model", "gpt2"),
            ("add_tokenizer_pre", "smollm"),
            ("add_token_list", tokens),
            ("add_token_merges", merges),
            ("add_eos_token_id", 257),
            ("add_chat_template", [{"name": "tool_use", "template": "x"}]),
        ],
    )
    assert open_source(str(path)).tokenizer().chat_template is None
    assert "none of its chat templates is the default" in capsys.readouterr().err


def test_a_folder_with_additional_templates_alone_says_so(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(272))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert tokenizer.from_huggingface(tmp_path).chat_template is None
    assert "none of its chat templates is the default" in capsys.readouterr().err


@pytest.mark.parametrize(
    "processor, flag, said",
    [
        (True, False, "says add_bos_token false"),
        (False, True, "says add_bos_token true"),
        (True, True, ""),
        (False, False, ""),
        (True, None, ""),
        (False, None, ""),
    ],
)
def test_a_flag_that_contradicts_the_post_processor_is_said(tmp_path, capsys, processor, flag, said):
    """transformers 5 takes add_bos_token and add_eos_token out of what a tokenizer of a tokenizer.json is
    made with: its post-processor counts."""
    found = json.loads(tokenizer_json(272))
    if processor:
        begin = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        found["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text],
            "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [256], "tokens": ["<|start|>"]}},
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|start|>", "add_bos_token": flag})
    )
    assert tokenizer.from_huggingface(tmp_path).leading == ((256,) if processor else ())
    err = capsys.readouterr().err
    assert said in err and bool(err) == bool(said)


def folder_with(folder, **files):
    (folder / "tokenizer.json").write_text(tokenizer_json(272))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def test_extra_special_tokens_are_special_tokens(tmp_path):
    """transformers: an object gives further names to templates; transformers 5 writes a list of what 4 called
    additional_special_tokens."""
    (tmp_path / "a").mkdir()
    t = tokenizer.from_huggingface(
        folder_with(
            tmp_path / "a",
            tokenizer_config={
                "extra_special_tokens": {"image_token": "<unused1>"},
                "chat_template": "{{ image_token }}h",
            },
        )
    )
    assert (
        t.encode_chat([]) == [t.encode("<unused1>")[0], t.encode("h")[0]] and len(t.encode("<unused1>")) == 1
    )
    (tmp_path / "b").mkdir()
    t = tokenizer.from_huggingface(
        folder_with(tmp_path / "b", tokenizer_config={"extra_special_tokens": ["<unused1>"]})
    )
    assert len(t.encode("<unused1>")) == 1 and t.special["additional_special_tokens"] == ["<unused1>"]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"special_tokens_map": {"bos_token": 5}}, "special_tokens_map.json: bos_token is 5"),
        ({"tokenizer_config": {"eos_token": ["<|end|>"]}}, "eos_token is ['<|end|>']"),
        ({"tokenizer_config": {"bos_token": {"content": None}}}, "bos_token is"),
        ({"tokenizer_config": {"additional_special_tokens": [7]}}, "additional_special_tokens is 7"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is mangled"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
            "added_tokens_decoder is mangled",
        ),
    ],
)
def test_tokens_that_are_no_text_are_refused(tmp_path, files, says):
    one_line_error(lambda: tokenizer.from_huggingface(folder_with(tmp_path, **files)), says, "--ids")


def test_dropout_of_merges_is_switched_off(tmp_path):
    """BPE-dropout (Provilkov et al., 2020) is for training; llama.cpp does not know it."""
    plain = tokenizer.from_huggingface(folder_with(tmp_path)).encode("hello hello hello")
    found = json.loads(tokenizer_json(272))
    found["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    t = tokenizer.from_huggingface(tmp_path)
    assert [t.encode("hello hello hello") for _ in range(5)] == [plain] * 5


def test_a_templates_refusal_holds_no_control_characters():
    one_line_error(
        lambda: tokenizer.render_chat("{{ raise_exception('a\x1b[2Jb\nc\x9b1m') }}", [], {}), "a\\x1b[2Jb c"
    )


# --- the cost of streamed text ---


def test_streaming_does_not_wait_for_the_text_process():
    """While the process is stopped, tokens can be pushed; their text comes when it goes on, at the end at the
    latest."""
    t = gguf_tokenizer()
    ids = t.encode("hello streaming world " * 5)
    stream, process = t.stream(late=True), t.process._process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        pieces = [stream.push(token) for token in ids]
        waited = time.monotonic() - started
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert waited < 5 and pieces == [""] * len(ids)
    assert stream.finish() == t.decode(ids)
    assert t.decode(ids[:3]) == t.decode(ids)[: len(t.decode(ids[:3]))]


def test_a_streamed_token_costs_less_than_a_third_of_a_millisecond():
    t = gguf_tokenizer()
    ids, costs = t.encode("hello streaming world " * 20), []
    for _ in range(5):
        stream, started = t.stream(late=True), time.process_time()
        for token in ids:
            stream.push(token)
        costs.append((time.process_time() - started) / len(ids))
        stream.finish()
    assert min(costs) < 0.3e-3


def test_requests_between_pushes_keep_their_answers_apart():
    t = gguf_tokenizer()
    ids, stream = t.encode("hello world"), t.stream(late=True)
    other, pieces = t.encode("hell"), []
    for token in ids:
        pieces.append(stream.push(token))
        assert t.encode("hell") == other
    assert "".join(pieces) + stream.finish() == "hello world"


def test_a_process_that_ends_between_pushes_is_one_line():
    t = gguf_tokenizer()
    stream = t.stream(late=True)
    stream.push(10)
    os.kill(t.process._process.pid, signal.SIGKILL)
    t.process._process.wait()
    one_line_error(lambda: [stream.push(10) for _ in range(3)] and stream.finish(), "its tokenizer")
    one_line_error(lambda: t.encode("a"), "its tokenizer")


# --- lab run ---


def test_a_cache_that_is_too_small_keeps_the_text_and_writes_the_record(tiny_gguf, tmp_path, capfd):
    out = tmp_path / "run.json"
    words = ["run", str(tiny_gguf), *RUN, "--ids", "1,2,3", "--ignore-eos", "--max-new-tokens", "20"]
    assert cli.main([*words, "--max-context", "8", "--json", str(out)]) == 0
    written, printed = json.loads(out.read_text()), capfd.readouterr()
    assert written["stopped_by"] == "length" and len(written["output_ids"]) == 6
    assert printed.out == written["text"] + "\n"
    said = [line for line in printed.err.splitlines() if "cache" in line]
    assert said == [
        "lab: the cache holds 8 tokens, prompt included: the text stops there; raise --max-context"
    ]
    assert cli.main([*words, "--max-context", "30", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["output_ids"][:6] == written["output_ids"]
    assert "the cache holds" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b1m\x07\x08\r\x00\x7f", "\\x9b1m\\x07\\x08\\r\\x00\\x7f"),
        ("é漢\U0001f469\u200d\U0001f4bb\u05d0", "é漢\U0001f469\u200d\U0001f4bb\u05d0"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_control_characters_are_escaped_for_a_terminal(text, shown):
    assert for_terminal(text) == shown


@pytest.mark.parametrize("stream", [True, False])
def test_text_of_a_model_does_not_steer_the_terminal(tmp_path, capfdbinary, stream):
    """A model that says one byte for ever, ESC: shown as an escape on a terminal, as it is in a file."""
    config, escape = CONFIGS["llama"], byte_level_vocabulary(272)[0].index(chr(256 + 27))
    weights = {
        name: torch.zeros_like(tensor) if name.endswith("proj.weight") else tensor
        for name, tensor in tensors(config).items()
    }
    head = torch.zeros(272, config.hidden)  # the layers add nothing, so the head sees token 32 itself
    head[escape] = weights["model.norm.weight"].sign() * weights["model.embed_tokens.weight"][32].sign()
    weights["lm_head.weight"] = head
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    words = ["run", str(path), *RUN, "--ids", "32", "--max-new-tokens", "1"]
    words += [] if stream else ["--no-stream"]
    assert cli.main(words) == 0
    assert capfdbinary.readouterr().out == b"\x1b\n"
    master, terminal = pty.openpty()
    try:
        assert commands.lab(*words, given={1: terminal}).returncode == 0
        assert os.read(master, 1000) == b"\\x1b\r\n"
    finally:
        os.close(master)
        os.close(terminal)


def test_an_error_before_any_text_prints_nothing(tiny_gguf, capfd):
    assert cli.main(["run", str(tiny_gguf), *RUN, "--raw", "--prompt", ""]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1


def test_an_empty_name_of_a_model_is_no_folder(capfd):
    assert cli.main(["run", "", *RUN, "--ids", "1"]) == 2
    assert "unknown model ''" in capfd.readouterr().err


@pytest.mark.parametrize("closed, status", [((2,), 0), ((1,), 0), ((0, 1, 2), 0), ("2>/dev/full", 2)])
def test_standard_streams_that_are_closed_or_full(tiny_gguf, tmp_path, closed, status):
    out = tmp_path / "run.json"
    words = ["run", tiny_gguf, *RUN, "--prompt", "hi", "--max-new-tokens", "2", "--json", out]
    with open("/dev/full", "wb") as full:
        given = {2: full} if closed == "2>/dev/full" else dict.fromkeys(closed)
        found = commands.lab(*words, given=given)
    assert found.returncode == status and "Traceback" not in found.stderr
    assert status or len(json.loads(out.read_text())["output_ids"]) == 2


def test_a_real_process_without_standard_streams(tiny_gguf, tmp_path):
    out = tmp_path / "run.json"
    words = [sys.executable, "-m", "lab", "run", tiny_gguf, *RUN, "--ids", "1", "--max-new-tokens", "2"]
    script = 'exec "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, "sh", *words, "--json", out], cwd=ROOT).returncode == 0
    assert len(json.loads(out.read_text())["output_ids"]) == 2


def test_ids_that_are_no_ids_are_shown_briefly(tiny_gguf, capfd):
    assert cli.main(["run", str(tiny_gguf), *RUN, "--ids", "9" * 5000]) == 2
    assert len(capfd.readouterr().err) < 300


# --- files that are read and written ---

BAD_TABLES = [
    "[" * 5000,
    '{"rope": ' * 5000,
    '{"rope": 5}',
    '{"rope": [{"batch": true, "context": null, "backend": "cuda"}]}',
    '{"rope": [{"batch": 1%s, "context": null, "backend": "cuda"}]}' % ("0" * 400),
    '{"rope": [{"batch": NaN, "context": null, "backend": "cuda"}]}',
    '{"rope": [{"batch": 1, "context": Infinity, "backend": "cuda"}]}',
    '{"rope": [{"batch": [1], "context": null, "backend": "cuda"}]}',
    '{"a": %s}' % ("1" * 5000),
    "\xff",
    "",
]


@pytest.mark.parametrize("content", BAD_TABLES)
@pytest.mark.parametrize("read", [read_table, tuned.read])
def test_a_table_made_to_hurt_is_one_line(tmp_path, content, read):
    path = tmp_path / "table.json"
    path.write_bytes(content.encode("latin-1"))
    one_line_error(lambda: read(path), "table.json")


@pytest.mark.parametrize("read", [read_table, tuned.read])
@pytest.mark.parametrize(
    "kind, says", [("pipe", "is a pipe"), ("device", "is a device"), ("folder", "is a folder")]
)
def test_a_table_that_is_no_file_is_one_line(tmp_path, read, kind, says):
    path = tmp_path / "table.json"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    one_line_error(lambda: read(path), says)


def test_tables_are_utf8_whatever_the_locale_says(tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes('{"entries": [], "é": 1}'.encode())
    words = f"from lab.tune import tuned; assert tuned.read({str(path)!r}) == []"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, env=environment).returncode == 0


def test_an_empty_name_of_a_table_is_no_table(tiny_gguf, capfd):
    assert cli.main(["run", str(tiny_gguf), *RUN, "--ids", "1", "--dispatch", ""]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_cannot_be_written(tmp_path, name):
    with pytest.raises(LabError, match="cannot write"):
        write_whole(f"{tmp_path}/{name}", "text")
    assert not list(tmp_path.iterdir())


def test_gpu_check_prints_what_it_must():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(
        [sys.executable, "-m", "lab.machine.gpu_check", "--steps", "é\x1b[2J"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert found.returncode and found.stderr.count(b"\n") == 1
    assert b"\x1b" not in found.stderr and b"gpu-check: error: unknown step" in found.stderr
