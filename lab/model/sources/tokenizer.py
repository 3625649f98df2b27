"""Text to token ids and back, from GGUF metadata or a Hugging Face folder, and the chat template.

Both kinds run on the `tokenizers` library. GGUF files hold a vocabulary and merges or scores, not a pipeline, so the
pipeline of each pre-tokenizer name is rebuilt here; a name that is not listed is an error, never a guess.
"""
from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError, Unavailable

try:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
except ImportError as error:
    raise Unavailable(f"text needs the package tokenizers ({error}): run `pip install tokenizers`, or use --ids"
                      ) from None

# Splits of the pre-tokenizers, as published in the tokenizer.json of Llama 3 and of Qwen2; they differ in digits.
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# GGUF's tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whether a word that is a token is taken whole)
_LLAMA3, _QWEN2, _SMOLLM, _GPT2 = "llama3", "qwen2", "smollm", "gpt2"
PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3, "llama-v3": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "smollm": _SMOLLM, "gpt-2": _GPT2,
}
# GGUF token types (llama.cpp's llama_token_type)
CONTROL, USER_DEFINED = 3, 4
# Control tokens that end a turn even where the file names only one end token; llama.cpp keeps the same kind of list.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


@dataclass
class Tokenizer:
    """`eos` are the ids that end generation; `bos` is put before raw text when the model's own tokenizer does so."""
    backend: Backend
    eos: frozenset[int] = frozenset()
    bos: int | None = None
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)    # bos_token, eos_token... as templates name them

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, raw: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised. raw: begin with bos if the model wants one."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if raw and self.bos is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self.decode)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of `messages` ({"role", "content"}) through the model's chat template, ready for the reply."""
        if self.chat_template is None:
            raise LabError("this model has no chat template; use --raw")
        return self.encode(render_chat(self.chat_template, messages, self.special), raw=False)


class TextStream:
    """Turns ids into text as they come, whole characters only: a character may span several tokens.

    Text is decoded from the last two emitted pieces on, so that a decoder that looks at its left neighbour (a space
    before a word) sees it. `push` and `finish` together give exactly the text of all ids.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str]):
        self.decode, self.ids = decode, []
        self.start = self.emitted = 0       # ids[start:emitted] is the left context, already emitted

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""                       # perhaps an unfinished character: wait for its other bytes
        self.start, self.emitted = self.emitted, len(self.ids)
        return text

    def finish(self) -> str:
        """What is still held back, at the end of the output."""
        text = self._pending()
        self.start = self.emitted = len(self.ids)
        return text

    def _pending(self) -> str:
        before = self.decode(self.ids[self.start:self.emitted])
        return self.decode(self.ids[self.start:])[len(before):]


def render_chat(template: str, messages: list[dict[str, str]], special: Mapping[str, str]) -> str:
    """Renders a Hugging Face chat template. The template is code from a stranger: it runs in jinja2's sandbox."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise Unavailable(f"chat templates need the package jinja2 ({error}): run `pip install jinja2`") from None

    def raise_exception(message):
        raise LabError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except LabError:
        raise
    except Exception as error:
        raise LabError(f"the chat template cannot be rendered ({type(error).__name__}: {error}); use --raw") from error


# --- GGUF ---

def from_gguf(scalars: Mapping, array: Callable[[str], list | None], where: str) -> Tokenizer:
    """scalars: metadata by key; array(key): an array of the metadata or None."""
    key = "tokenizer.ggml."
    tokens, model = array(key + "tokens"), scalars.get(key + "model")
    if not tokens or model is None:
        raise LabError(f"{where}: there is no tokenizer in it; use --ids")
    kinds = array(key + "token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise LabError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    try:
        if model == "gpt2":
            backend = _byte_level(tokens, array(key + "merges") or [], scalars.get(key + "pre", "default"), where)
        elif model == "llama":
            backend = _sentencepiece(tokens, array(key + "scores"), scalars, where)
        else:
            raise LabError(f"{where}: tokenizer model {model!r} is not supported (supported: gpt2, llama); use --ids")
        backend.add_special_tokens([_added(token) for token, kind in zip(tokens, kinds) if kind == CONTROL])
        backend.add_tokens([_added(token) for token, kind in zip(tokens, kinds) if kind == USER_DEFINED])
    except LabError:
        raise
    except Exception as error:
        raise LabError(f"{where}: its tokenizer is mangled: {error}") from error
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise LabError(f"{where}: its vocabulary repeats tokens")

    def token_id(name):
        index = scalars.get(f"{key}{name}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise LabError(f"{where}: {name}_token_id {index} is outside the vocabulary of {len(tokens)}")
        return index

    bos, eos = token_id("bos"), token_id("eos")
    ends = {eos, token_id("eot"), token_id("eom")} - {None}
    ends |= {index for index, (token, kind) in enumerate(zip(tokens, kinds))
             if kind == CONTROL and token in END_OF_TURN}
    special = {f"{name}_token": tokens[index] for name, index in (("bos", bos), ("eos", eos)) if index is not None}
    add_bos = scalars.get(key + "add_bos_token", model == "llama")
    return Tokenizer(backend, frozenset(ends), bos if add_bos else None,
                     scalars.get("tokenizer.chat_template"), special)


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _byte_level(tokens: list[str], merges: list[str], pre: str, where: str) -> Backend:
    """Byte-level BPE (GPT-2): text is split, its bytes mapped to printable characters, and pairs merged by rank."""
    kind = PRE_TOKENIZERS.get(pre)
    if kind is None:
        raise LabError(f"{where}: pre-tokenizer {pre!r} is not supported (supported: {', '.join(PRE_TOKENIZERS)}); "
                       "use --ids")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs,
                                 ignore_merges=kind == _LLAMA3))
    if kind == _QWEN2:
        backend.normalizer = normalizers.NFC()
    if kind in (_LLAMA3, _QWEN2):
        split = Regex(_SPLIT % ("{1,3}" if kind == _LLAMA3 else ""))
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == _SMOLLM else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], scores: list[float] | None, scalars: Mapping, where: str) -> Backend:
    """SentencePiece BPE (Llama 2, Mistral): the adjacent pair whose joined piece scores highest merges first.

    As ranked merges: every split of a piece into two pieces, ordered by the score of the whole, best first.
    """
    if not scores or len(scores) != len(tokens):
        raise LabError(f"{where}: its tokenizer has no score for each token; use --ids")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for piece, score in zip(tokens, scores):
        splits = [(vocab[piece[:cut]], vocab[piece[cut:]]) for cut in range(1, len(piece))
                  if piece[:cut] in vocab and piece[cut:] in vocab]
        merges += [(-score, tokens[left], tokens[right]) for left, right in sorted(splits)]
    merges.sort(key=lambda merge: merge[0])
    unknown = scalars.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Backend(models.BPE(vocab=vocab, merges=[(left, right) for _, left, right in merges],
                                 unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = scalars.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


# --- Hugging Face ---

def from_huggingface(folder: Path) -> Tokenizer | None:
    """From tokenizer.json, tokenizer_config.json, generation_config.json, config.json and chat_template.jinja.

    None when the folder has no tokenizer at all; LabError when it has one that cannot be read.
    """
    from lab.files import read_json

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise LabError(f"{path} is mangled: {error}") from error

    def optional(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    options, generation, config = (optional(name) for name in (
        "tokenizer_config.json", "generation_config.json", "config.json"))
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = options.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    ends = {backend.token_to_id(special["eos_token"])} if "eos_token" in special else set()
    for source in (generation, config):
        ids = source.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(token is None or isinstance(token, int) for token in ids):
            raise LabError(f"{folder}: eos_token_id is {ids!r}; expected token ids")
        ends |= set(ids)
    template = options.get("chat_template")
    if isinstance(template, list):          # several named templates
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                        None)
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LabError(f"{path} cannot be read: {error}") from error
    return Tokenizer(backend, frozenset(ends - {None}), _leading_token(backend), template, special)


def _leading_token(backend: Backend) -> int | None:
    """The id that the tokenizer's own post-processor puts before a text, if any (Llama's begin-of-text)."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    return full[0] if full[-len(plain):] == plain and len(full) == len(plain) + 1 else None
