"""Tokenizer pipelines on the `tokenizers` library, built from what a GGUF file or a tokenizer.json holds.

All of this runs in a process of its own (lab/model/text/process.py): vocabularies, normalizers and decoders
are somebody else's data, and some of them take all memory, all time, or abort the process that uses them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lab.errors import Unavailable
from lab.model.text.tokenizer import (
    CONTROL,
    INVALID_BYTE,
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    SMOLLM,
    UNKNOWN,
    USER_DEFINED,
    TextStream,
    ends_by_text,
    ends_of_vocabulary,
)

try:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
except ImportError as error:
    raise Unavailable(
        f"text needs the package tokenizers ({error}): run `pip install tokenizers`, or use --ids"
    ) from None

# Splits of the pre-tokenizers, as published in the tokenizer.json of Llama 3 and of Qwen2: digits differ.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


LONGEST_PIECE = 256  # characters; SentencePiece's own limit is 16 unless its training says otherwise


def build(kind: str, **source) -> Backend:
    """kind: "from_file" or "from_vocabulary", which get the rest."""
    return {"from_file": from_file, "from_vocabulary": from_vocabulary}[kind](**source)


class TextBackend:
    """Encodes and decodes with one pipeline.

    hidden: ids that are never shown, besides the pipeline's special tokens.
    """

    def __init__(self, backend: Backend, hidden: Collection[int] = ()):
        self.backend, self.hidden = backend, frozenset(hidden)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added; special tokens written in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        shown = [index for index in ids if index not in self.hidden]
        return self.backend.decode(shown, skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self.decode, self.backend.token_to_id(INVALID_BYTE))


# --- GGUF: a vocabulary with merges or scores; the pipeline of each pre-tokenizer name is rebuilt here ---


def from_vocabulary(
    model: str,
    pre: str | None,
    tokens: list[str],
    kinds: list[int],
    merges: list[str],
    scores: list[float] | None,
    space_prefix: bool,
    unknown: str | None,
) -> Backend:
    """model, pre: GGUF's tokenizer.ggml.model and .pre; a name that is not listed was refused before."""
    if model == "gpt2":
        backend = _byte_level(tokens, merges, pre)
    else:
        backend = _sentencepiece(tokens, scores, space_prefix, unknown)
    ends = ends_of_vocabulary(tokens, kinds)
    backend.add_special_tokens(
        [
            _added(token)
            for index, (token, kind) in enumerate(zip(tokens, kinds))
            if kind in (CONTROL, UNKNOWN) or index in ends
        ]
    )
    backend.add_tokens(
        [
            _added(token)
            for index, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == USER_DEFINED and index not in ends
        ]
    )
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ValueError("its vocabulary repeats tokens")
    return backend


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _byte_level(tokens: list[str], merges: list[str], pre: str | None) -> Backend:
    """Byte-level BPE (GPT-2): text is split, its bytes become printable characters, pairs merge by rank."""
    kind = PRE_TOKENIZERS[pre]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Backend(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=pairs,
            ignore_merges=kind == LLAMA3,
        )
    )
    if kind == QWEN2:
        backend.normalizer = normalizers.NFC()
    if kind in (LLAMA3, QWEN2):
        split = Regex(_SPLIT % ("{1,3}" if kind == LLAMA3 else ""))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == SMOLLM else []
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: list[str], scores: list[float], space_prefix: bool, unknown: str | None
) -> Backend:
    """SentencePiece BPE (Llama 2, Mistral): the adjacent pair whose joined piece scores highest merges first.

    As ranked merges: every split of a piece into two pieces, ordered by the score of the whole, best first.
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    longest = max(map(len, tokens))
    if longest > LONGEST_PIECE:
        raise ValueError(f"a token of {longest} characters; at most {LONGEST_PIECE} are taken")
    merges = []
    for piece, score in zip(tokens, scores):
        splits = [
            (vocab[piece[:cut]], vocab[piece[cut:]])
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        merges += [(-score, tokens[left], tokens[right]) for left, right in sorted(splits)]
    merges.sort(key=lambda merge: merge[0])
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    if space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        backend.normalizer = spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return backend


# --- Hugging Face: a whole pipeline ---


def from_file(path: str, added: list[dict], special: list[str]) -> Backend:
    """The pipeline of a tokenizer.json, made into what transformers makes of it.

    Truncation and padding that were saved in it are switched off, and so is the dropout of merges, which is
    for training: with it a text has other ids each time. added: tokens of tokenizer_config.json
    ("added_tokens_decoder"), in order; special: texts of the tokens that the other files name (bos_token and
    so on), which become special tokens if the vocabulary has them.
    """
    backend = Backend.from_file(path)
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    backend.add_tokens(
        [
            AddedToken(token["content"], **{flag: bool(token.get(flag, False)) for flag in flags})
            for token in added
            if token["content"] not in known
        ]
    )
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    ends = ends_of_file(backend)
    backend.add_special_tokens(
        [
            _added(token)
            for token in dict.fromkeys([*special, *ends])
            if token not in known and backend.token_to_id(token) is not None
        ]
    )
    return backend


def ends_of_file(backend: Backend) -> dict[str, int]:
    """The added tokens (text: id) of a tokenizer.json that end a turn by their text."""
    control, others = {}, {}
    for index, token in backend.get_added_tokens_decoder().items():
        (control if token.special else others)[token.content] = index
    return ends_by_text(control, others)


def leading_tokens(backend: Backend) -> list[int]:
    """The ids that the post-processor puts before a text (Llama's begin-of-text), whatever it puts behind.

    The post-processor is tried on a text of one token in a vocabulary of one word.
    """
    probe = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    probe.post_processor = backend.post_processor
    tried = probe.encode("a", add_special_tokens=True)
    return tried.ids[: tried.special_tokens_mask.index(0)]
