"""What `lab serve` does without its HTTP side: requests read strictly, and the thread that owns the model."""

import asyncio
import time

import pytest
import torch

from lab.dispatch import select
from lab.errors import LabError
from lab.files import strict_json
from lab.model.decoder import Decoder
from lab.model.opening import Opened
from lab.model.sampling import GREEDY
from lab.model.sources import open_source
from lab.model.weights import load
from lab.serve.command import hosts_of
from lab.serve.engine import Engine, Request
from lab.serve.schema import parse
from tests.tiny_models import CONFIGS, write_folder

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def engine(tmp_path):
    source = open_source(str(write_folder(tmp_path / "tiny", CONFIGS["llama"])), "auto")
    decoder = Decoder(load(source, torch.float32, "cpu"), select("torch", "cpu"), 2, 100)
    return Engine(Opened("tiny", decoder, source.tokenizer()), max_queue=8)


async def last_piece(answer):
    while True:
        piece = await asyncio.wait_for(answer.pieces.get(), 20)
        if piece.error or piece.reason:
            return piece


def ask(engine, *requests):
    """The last piece of each request's answer, all asked at once."""

    async def main():
        answers = [engine.ask(request) for request in requests]
        pieces = [await last_piece(answer) for answer in answers]
        for answer in answers:
            engine.leave(answer)
        return pieces

    return asyncio.run(main())


def prompt(*ids, new=4):
    return Request(list(ids), None, new, GREEDY)


def test_every_client_is_told_when_the_device_is_lost(engine, monkeypatch, capsys):
    """Then even clearing the queue fails; nobody may wait for an answer that never comes."""

    def lost(*_):
        raise RuntimeError("the device is lost")

    with engine:
        assert ask(engine, prompt(1))[0].reason == "length"
        monkeypatch.setattr(engine.queue.decoder, "step", lost)
        monkeypatch.setattr(engine.queue.decoder, "finish", lost)
        pieces = ask(engine, *(prompt(n) for n in range(5)))
        assert [piece.status for piece in pieces] == [500] * 5
        assert all("the device is lost" in piece.error for piece in pieces)
        deadline = time.monotonic() + 20
        while engine.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LabError, match="has ended"):
            ask(engine, prompt(1))
    assert not engine.open and "the device is lost" in capsys.readouterr().err


def test_a_request_whose_text_stream_cannot_begin_fails_alone(engine, monkeypatch):
    stream, calls = engine.tokenizer.stream, []

    def second_fails():
        calls.append(1)
        if len(calls) == 2:
            raise LabError("no stream")
        return stream()

    monkeypatch.setattr(engine.tokenizer, "stream", second_fails)
    with engine:
        first, second, third = ask(engine, prompt(1), prompt(2), prompt(3))
    assert first.reason == third.reason == "length" and second.error == "no stream"
    cache = engine.queue.cache
    assert len(cache.free) == cache.pages and not engine.queue.running


@pytest.mark.parametrize(
    "kind, given, says",
    [
        ("chat", {**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, "contradict"),
        ("chat", {**CHAT, "stream_options": {"include_usage": True}}, "stream: true"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]}, "list"),
        ("chat", {**CHAT, "prompt": "Hello"}, "unknown parameter 'prompt'"),
        ("completion", {"prompt": [1.5]}, "whole numbers"),
        ("completion", {}, "string"),
    ],
)
def test_what_would_be_ignored_is_refused(kind, given, says):
    with pytest.raises(LabError, match=says):
        parse(kind, given, 10)


def test_equal_limits_are_no_contradiction():
    wanted = parse("chat", {**CHAT, "max_tokens": 5, "max_completion_tokens": 5}, 10)
    assert wanted.request.max_new_tokens == 5


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}', "{", b'"\xff"'])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        strict_json(text)


@pytest.mark.parametrize("host, header", [("::1", "[::1]:8000"), ("127.0.0.1", "localhost:8000")])
def test_a_server_of_this_machine_answers_to_its_own_address_alone(host, header):
    """Starlette compares what stands before the first colon."""
    assert header.split(":")[0] in hosts_of(host)
    assert "evil.example" not in hosts_of(host) and "*" not in hosts_of(host)
    assert hosts_of("0.0.0.0") == ["*"]
