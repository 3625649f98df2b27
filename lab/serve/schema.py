"""What a request's JSON may hold: OpenAI's names, and a few more for sampling. Names that the server does not
know are refused, as what they ask for would not be done."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lab.errors import LabError
from lab.model.batch_file import biases, check_content
from lab.model.sampling import Sampling
from lab.serve.engine import Request

COMMON = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "user",
}
ENDPOINTS = {
    "completion": COMMON | {"prompt"},
    "chat": COMMON | {"messages", "max_completion_tokens", "top_logprobs"},
}
NUMBERS = (  # the name and the default of each; OpenAI's where it has one
    ("temperature", 1.0),
    ("top_p", 1.0),
    ("top_k", 0),
    ("min_p", 0.0),
    ("repetition_penalty", 1.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
)


@dataclass(frozen=True)
class Wanted:
    """A request, and in what form it is answered."""

    request: Request
    stream: bool
    usage: bool  # a stream ends with the number of tokens


def parse(kind: str, given, most: int) -> Wanted:
    """kind: completion or chat. most: tokens that an answer may have. Raises LabError for everything that
    is not as it should be."""
    if not isinstance(given, dict):
        raise LabError("the body must be a JSON object")
    unknown = sorted(given.keys() - ENDPOINTS[kind])
    if unknown:
        raise LabError(f"unknown parameter {unknown[0]!r}")
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("n", 1) != 1:
        raise LabError("n: this server gives one answer to a request")
    prompt, messages = None, None
    if kind == "chat":
        messages = [_message(m) for m in _list(given.get("messages"))]
        check_content("messages", messages)
    else:
        prompt = given.get("prompt")
        check_content("ids" if isinstance(prompt, list) else "prompt", prompt)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise LabError("stream_options may hold include_usage alone")
    if options and not given.get("stream"):
        raise LabError("stream_options goes with stream: true")
    return Wanted(
        Request(prompt, messages, _tokens(given, kind, most), _sampling(given, kind), _stops(given)),
        _flag(given, "stream"),
        _flag(options, "include_usage"),
    )


def _list(value) -> list:
    if not isinstance(value, list):
        raise LabError("messages must be a list")
    return value


def _message(given):
    """OpenAI's clients may send content as a list of parts."""
    parts = given.get("content") if isinstance(given, dict) else None
    if isinstance(parts, list) and all(
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in parts
    ):
        return {**given, "content": "".join(part["text"] for part in parts)}
    return given


def _flag(given: dict, name: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        raise LabError(f"{name} must be true or false")
    return value


def _tokens(given: dict, kind: str, most: int) -> int:
    names = ("max_completion_tokens", "max_tokens")
    asked = [given[name] for name in names if name in given]
    if len(asked) == 2 and asked[0] != asked[1]:
        raise LabError("max_tokens and max_completion_tokens contradict each other: give one of them")
    wanted = asked[0] if asked else (min(16, most) if kind == "completion" else most)
    if type(wanted) is not int or not 1 <= wanted <= most:
        raise LabError(f"max_tokens {wanted!r}: it must be a whole number from 1 to {most}")
    return wanted


def _sampling(given: dict, kind: str) -> Sampling:
    numbers = {name: given.get(name, default) for name, default in NUMBERS}
    seed = given.get("seed", secrets.randbits(63))
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
        raise LabError(f"seed {seed!r}: it must be a whole number of 64 bits")
    if kind == "chat":
        reported = given.get("top_logprobs", 0) if _flag(given, "logprobs") else None
        if reported is None and "top_logprobs" in given:
            raise LabError("top_logprobs goes with logprobs: true")
    else:
        reported = given.get("logprobs")
    return Sampling(
        **numbers, seed=seed % (1 << 64), logit_bias=biases(given.get("logit_bias", {})), logprobs=reported
    )


def _stops(given: dict) -> tuple[str, ...]:
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not (
        isinstance(stops, list)
        and len(stops) <= 4
        and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops)
    ):
        raise LabError("stop must be a text, or at most four, of 1 to 256 characters")
    return tuple(stops)
