"""Text to token ids and back, from GGUF metadata or a Hugging Face folder, and the chat template.

Here the files are read and their ids checked. What was read is used in a process of its own
(process.py), where backend.py builds the pipeline and chat_template.py renders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError, shown, warn
from lab.files import is_there, read_json, read_text
from lab.model.text.process import TextProcess

# GGUF's tokenizer.ggml.pre -> the pre-tokenizer that it names. The names that llama.cpp (src/llama-vocab.cpp)
# reads as Llama 3's imply two things more: a word that is a token is taken whole, and raw text begins with
# the beginning token.
LLAMA3, QWEN2, SMOLLM, GPT2 = "llama3", "qwen2", "smollm", "gpt2"
PRE_TOKENIZERS = {
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "falcon3": LLAMA3,
    "falcon-h1": LLAMA3,
    "pixtral": LLAMA3,
    "midm-2.0": LLAMA3,
    "lfm2": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "smollm": SMOLLM,
    "gpt-2": GPT2,
}
NO_DEFAULT = "{}: none of its chat templates is the default: text is fed as it is"
MOST_TEMPLATE = 1 << 24  # bytes of a chat template
# GGUF token types (llama.cpp's llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# Tokens that end a turn, by their text, even where the file gives them another type or names another end
# token: the list that llama.cpp keeps for the same purpose (special_eog_ids in src/llama-vocab.cpp), without
# its tokens for code infilling. "</s>" counts where it is a control token only: byte-level vocabularies hold
# it as HTML.
END_OF_TURN = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<turn|>",
        "<|tool_response>",
    )
)
INVALID_BYTE = "<0xFF>"  # the byte-fallback token of a byte that is in no UTF-8 text
# The special tokens that chat templates know by name, and how GGUF's keys call them (it does spell
# "seperator" so).
TEMPLATE_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
# What llama.cpp takes where a vocabulary of kind "llama" names none.
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


@dataclass
class Tokenizer:
    """`eos` are the ids that end generation; `leading` go before raw text, as the model's tokenizer does."""

    process: TextProcess | None
    eos: frozenset[int] = frozenset()
    leading: tuple[int, ...] = ()
    chat_template: str | None = None
    special: Mapping[str, object] = field(default_factory=dict)  # bos_token... as templates name them
    size: int = 0  # of the vocabulary, added tokens included
    where: str = "the tokenizer"  # what errors begin with
    source: dict = field(default_factory=dict, repr=False)  # what the pipeline is built from

    @property
    def backend(self):
        """The pipeline, built once more, in this process and without limits: to look into a trusted one."""
        from lab.model.text.backend import build

        return build(**self.source)

    @property
    def bos(self) -> int | None:
        """The id that raw text begins with, if any."""
        return self.leading[0] if self.leading else None

    def encode(self, text: str, raw: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised. raw: begin with `leading`."""
        ids = self._request("encode", text=text)
        return [*self.leading, *ids] if raw else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens and ends of turns; bytes that are no UTF-8 become U+FFFD."""
        return self._request("decode", ids=[int(index) for index in ids])

    def stream(self, late: bool = False) -> "RemoteStream":
        """A TextStream of this tokenizer: ids in, whole characters out. late: see RemoteStream."""
        return RemoteStream(self, self._request("stream"), late)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of `messages` ({"role", "content"}) through the model's chat template, ready for the reply."""
        if self.chat_template is None:
            raise LabError("this model has no chat template; use --raw")
        return self.encode(render_chat(self.chat_template, messages, self.special, self.process), raw=False)

    def _request(self, op: str, **arguments):
        return self.process.request(op, self.where, "--ids", **arguments)


@dataclass
class RemoteStream:
    """A TextStream in the tokenizer's process.

    A request and its answer take as long as a token of a small model on a GPU. So with `late`, `push` waits
    for the answer for at most a hundredth of the time between two tokens; the text may then come with a
    later token.
    """

    tokenizer: Tokenizer
    number: int
    late: bool = False
    pieces: list[str] = field(default_factory=list)  # text that has come
    pushed: float = field(default_factory=time.monotonic)  # when the last token was

    def push(self, token: int) -> str:
        tokenizer, now = self.tokenizer, time.monotonic()
        tokenizer.process.post(
            self.pieces.append, "push", tokenizer.where, "--ids", stream=self.number, token=int(token)
        )
        tokenizer.process.collect((now - self.pushed) / 100 if self.late else None)
        self.pushed = now
        return self._taken()

    def finish(self) -> str:
        """What is still to come, at the end of the output."""
        rest = self.tokenizer._request("finish", stream=self.number)
        return self._taken() + rest

    def _taken(self) -> str:
        text = "".join(self.pieces)
        self.pieces.clear()
        return text


class TextStream:
    """Turns ids into text as they come, whole characters only: a character may span several tokens.

    Text is decoded from the last two emitted pieces on, so that a decoder that looks at its left neighbour (a
    space before a word) sees it. `push` and `finish` together give exactly `decode` of all ids.

    invalid_byte: in a vocabulary with byte tokens (<0x00> to <0xFF>), the id of a byte that is in no UTF-8
    text. The decoder shows a run of byte tokens as text only if the whole run is UTF-8, so a run is held back
    until it ends: it has not ended while such a byte, put behind it, would change it.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], invalid_byte: int | None = None):
        self.decode, self.invalid_byte, self.ids = decode, invalid_byte, []
        self.start = self.emitted = 0  # ids[start:emitted] is the left context, already emitted

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # perhaps an unfinished character: wait for its other bytes
        if self.invalid_byte is not None and not self._pending(self.invalid_byte).startswith(text):
            return ""  # an unfinished run of bytes
        self.start, self.emitted = self.emitted, len(self.ids)
        return text

    def finish(self) -> str:
        """What is still held back, at the end of the output."""
        text = self._pending()
        self.start = self.emitted = len(self.ids)
        return text

    def _pending(self, *following: int) -> str:
        before = self.decode(self.ids[self.start : self.emitted]) if self.emitted else ""
        return self.decode([*self.ids[self.start :], *following])[len(before) :]


def render_chat(
    template: str,
    messages: list[dict[str, str]],
    special: Mapping[str, object],
    process: TextProcess | None = None,
) -> str:
    """The text that a Hugging Face chat template makes of `messages` (see chat_template.py), in a process of
    its own.

    Raises LabError for a template that refuses the messages, cannot be rendered, or takes too much memory or
    time.
    """
    return (process or TextProcess()).request(
        "render", "the chat template", "--raw", template=template, messages=messages, special=dict(special)
    )


def ends_by_text(control: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """The tokens (text: id) that end a turn, of those that are control (or special) tokens and of others."""
    found = {text: index for text, index in {**others, **control}.items() if text in END_OF_TURN}
    if "</s>" in control and "<|tool_response>" not in found:
        found["</s>"] = control["</s>"]
    if {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys():
        found.pop("<|end|>", None)  # here it ends a part of the turn; llama.cpp leaves it out, too
    return found


def ends_of_vocabulary(tokens: list[str], kinds: list[int]) -> set[int]:
    """The ids of a GGUF vocabulary that end a turn by their text."""
    control, others = {}, {}
    for index, (token, kind) in enumerate(zip(tokens, kinds)):
        (control if kind == CONTROL else others)[token] = index
    return set(ends_by_text(control, others).values())


# --- GGUF ---


def from_gguf(scalars: Mapping, array: Callable[[str], list | None], where: str) -> Tokenizer:
    """scalars: metadata by key; array(key): an array of the metadata or None."""
    key = "tokenizer.ggml."
    tokens, model = _strings(array(key + "tokens"), where), scalars.get(key + "model")
    if not tokens or model is None:
        raise LabError(f"{where}: there is no tokenizer in it; use --ids")
    if model not in ("gpt2", "llama"):
        raise LabError(
            f"{where}: tokenizer model {model!r} is not supported (supported: gpt2, llama); use --ids"
        )
    pre = scalars.get(key + "pre", "default")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise LabError(
            f"{where}: pre-tokenizer {pre!r} is not supported (supported: "
            f"{', '.join(PRE_TOKENIZERS)}); use --ids"
        )
    kinds = _numbers(array(key + "token_type"), int, where) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise LabError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    scores = _numbers(array(key + "scores"), float, where) if model == "llama" else None
    if model == "llama" and (len(scores) != len(tokens) or any(score != score for score in scores)):
        raise LabError(f"{where}: its tokenizer has no score for each token; use --ids")

    def flag(name, default):
        value = scalars.get(f"{key}{name}", default)
        if not isinstance(value, bool):
            raise LabError(f"{where}: {name} is {value!r}; expected true or false")
        return value

    add_bos = flag("add_bos_token", model == "llama" or PRE_TOKENIZERS[pre] == LLAMA3)
    defaults = SENTENCEPIECE_IDS if model == "llama" else {}

    def token_id(name, needed=False):
        """The id, or None where the file names none. One out of range is left out if it is not needed."""
        index = scalars.get(f"{key}{name}_token_id", defaults.get(name))
        wrong = _wrong_id(index, len(tokens))
        if index is None or not wrong:
            return index
        if needed or not _is_integer(index):
            raise LabError(f"{where}: {name}_token_id {wrong}")
        warn(f"{where}: {name}_token_id {wrong}; it is left out")
        return None

    ids = {
        name: token_id(name, needed=name == "unknown" and model == "llama" or name == "bos" and add_bos)
        for name in (*TEMPLATE_TOKENS.values(), "eot", "eom")
    }
    ends = {ids["eos"], ids["eot"], ids["eom"]} - {None} | ends_of_vocabulary(tokens, kinds)
    template = scalars.get("tokenizer.chat_template")
    if template is None and any(name.startswith("tokenizer.chat_template.") for name in scalars):
        warn(NO_DEFAULT.format(where))
    if not isinstance(template, str | None):
        raise LabError(f"{where}: tokenizer.chat_template is no text")
    source = {
        "kind": "from_vocabulary",
        "model": model,
        "pre": pre,
        "tokens": tokens,
        "kinds": kinds,
        "merges": _strings(array(key + "merges"), where),
        "scores": scores,
        "space_prefix": flag("add_space_prefix", True),
        "unknown": None if ids["unknown"] is None else tokens[ids["unknown"]],
    }
    process, subject = TextProcess(), f"{where}: its tokenizer"
    process.request("load", subject, "--ids", source=source, hidden=sorted(ends))
    special = {name: tokens[ids[short]] for name, short in TEMPLATE_TOKENS.items() if ids[short] is not None}
    leading = (ids["bos"],) if add_bos and ids["bos"] is not None else ()
    return Tokenizer(process, frozenset(ends), leading, template, special, len(tokens), subject, source)


def _strings(values, where: str) -> list[str]:
    values = [] if values is None else list(values)
    if not all(isinstance(value, str) for value in values):
        raise LabError(f"{where}: its tokenizer is mangled: tokens or merges that are no text; use --ids")
    return values


def _numbers(values, kind: type, where: str) -> list:
    try:
        return [] if values is None else [kind(value) for value in values]
    except (TypeError, ValueError):
        raise LabError(
            f"{where}: its tokenizer is mangled: types or scores that are no numbers; use --ids"
        ) from None


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_id(index, size: int) -> str | None:
    """What is wrong with a token id, or None."""
    if not _is_integer(index):
        return f"is {index!r}; expected a token id"
    return None if 0 <= index < size else f"{index} is outside the vocabulary of {size}"


# --- Hugging Face ---


def from_huggingface(folder: Path) -> Tokenizer | None:
    """From tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json,
    config.json and chat_template.jinja.

    None when the folder has no tokenizer at all; LabError when it has one that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not is_there(path):
        return None
    options, names, generation, config = (
        _optional_json(folder / name)
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        )
    )
    special = _special_tokens(options, names, folder)
    listed = special.get("additional_special_tokens", [])
    texts = [text for name, text in special.items() if name != "additional_special_tokens"] + listed
    source = {
        "kind": "from_file",
        "path": str(path),
        "special": texts,
        "added": _added_tokens(options, folder),
    }
    process = TextProcess()
    loaded = process.request("load", str(path), "--ids", source=source, eos=special.get("eos_token"))
    _say_contradiction(options.get("add_bos_token"), loaded["leading"], folder)
    vocabulary = max(loaded["size"], config["vocab_size"] if isinstance(config.get("vocab_size"), int) else 0)
    ends = set(loaded["ends"])
    for name, found in (("generation_config.json", generation), ("config.json", config)):
        ends |= _listed_ends(found.get("eos_token_id"), folder / name, vocabulary)
    return Tokenizer(
        process,
        frozenset(ends),
        tuple(loaded["leading"]),
        _template(options, folder),
        special,
        loaded["size"],
        str(path),
        source,
    )


def _say_contradiction(add_bos, leading: list[int], folder: Path) -> None:
    """Warns where add_bos_token of tokenizer_config.json and the post-processor of tokenizer.json differ.

    The post-processor counts, as in transformers 5; transformers 4 followed the flag for some tokenizer
    classes.
    """
    if isinstance(add_bos, bool) and add_bos != bool(leading):
        does = "puts a token before raw text" if leading else "puts none before raw text"
        warn(
            f"{folder / 'tokenizer_config.json'} says add_bos_token {str(add_bos).lower()}, and the "
            f"post-processor of tokenizer.json {does}: the latter counts"
        )


def _optional_json(path: Path) -> dict:
    """The object in a JSON file, empty where there is no such file."""
    return read_json(path) if is_there(path) else {}


def _special_tokens(options: dict, names: dict, folder: Path) -> dict[str, object]:
    """Texts by name (bos_token...): of tokenizer_config.json, else of special_tokens_map.json.

    extra_special_tokens is a list (transformers 5's name of additional_special_tokens), or an object of
    further names, which templates know as well.
    """
    special = {}
    for source, file in ((options, "tokenizer_config.json"), (names, "special_tokens_map.json")):
        extra = source.get("extra_special_tokens")
        named_so = {
            name: token
            for name, token in (extra.items() if isinstance(extra, dict) else ())
            if name.endswith("_token")
        }
        for name, token in {**named_so, **{name: source.get(name) for name in TEMPLATE_TOKENS}}.items():
            if token and name not in special:
                special[name] = _token_text(token, folder / file, name)
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(name)
            if isinstance(listed, list) and listed and "additional_special_tokens" not in special:
                special["additional_special_tokens"] = [
                    _token_text(token, folder / file, name) for token in listed
                ]
    return special


def _token_text(token, path: Path, name: str) -> str:
    """The text of a token, which the file gives as it is or as the "content" of an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise LabError(f"{path}: {name} is {shown(token)}; expected the text of a token; use --ids")
    return text


def _added_tokens(options: dict, folder: Path) -> list[dict]:
    """The tokens that tokenizer_config.json adds, in the order of their ids."""
    found = options.get("added_tokens_decoder") or {}
    try:
        ordered = [token for _, token in sorted(found.items(), key=lambda item: int(item[0]))]
        assert all(isinstance(token["content"], str) for token in ordered)
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError):
        raise LabError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is mangled; use --ids"
        ) from None
    return ordered


def _listed_ends(found, path: Path, vocabulary: int) -> set[int]:
    """The token ids of an eos_token_id: one, or a list. One outside the vocabulary is left out, with a
    warning."""
    if found is None:
        ids = []
    elif isinstance(found, list):
        ids = found
    else:
        ids = [found]
    if not all(map(_is_integer, ids)):
        raise LabError(f"{path}: eos_token_id is {found!r}; expected token ids")
    for index in ids:
        if wrong := _wrong_id(index, vocabulary):
            warn(f"{path}: eos_token_id {wrong}; it is left out")
    return {index for index in ids if not _wrong_id(index, vocabulary)}


def _template(options: dict, folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if is_there(path):
        return read_text(path, MOST_TEMPLATE)
    template = options.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {
            t["name"]: t.get("template")
            for t in template
            if isinstance(t, dict) and isinstance(t.get("name"), str)
        }
        template = named.get("default")
        if template is None:
            warn(NO_DEFAULT.format(folder / "tokenizer_config.json"))
    if template is None and any((folder / "additional_chat_templates").glob("*.jinja")):
        warn(NO_DEFAULT.format(folder / "additional_chat_templates"))
    if not isinstance(template, str | None):
        raise LabError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return template
