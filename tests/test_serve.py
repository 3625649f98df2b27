"""`lab serve`: a real server on this machine, spoken to by plain HTTP and by OpenAI's own client."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lab.dispatch import select
from lab.model.decoder import Decoder
from lab.model.opening import Opened
from lab.model.queue import Queue
from lab.model.sources import open_source
from lab.model.weights import load
from lab.serve.engine import Engine
from tests.tiny_models import CONFIGS, write_folder

pytest.importorskip("starlette", reason="lab serve needs starlette: pip install -e '.[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="lab serve needs uvicorn: pip install -e '.[serve]'")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(port, engine) of a server in a thread of this process."""
    from lab.serve.app import Limits, make_app

    folder = write_folder(tmp_path_factory.mktemp("serve") / "tiny", CONFIGS["llama"])
    source = open_source(str(folder), "auto")
    decoder = Decoder(load(source, torch.float32, "cpu"), select("torch", "cpu"), 4, 200)
    engine = Engine(Opened("tiny", decoder, source.tokenizer()), max_queue=64)
    app = make_app(engine, Limits(new_tokens=150, body=4096), ["127.0.0.1"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    with engine:
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield port, engine
        running.should_exit = True
        thread.join(10)


def ask(port, path="/v1/chat/completions", body=CHAT, method="POST", **headers):
    """(status, parsed body)"""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = body if isinstance(body, (str, bytes)) else json.dumps(body)
    link.request(method, path, given, {"content-type": "application/json", **headers})
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def settled(engine):
    """Waits until nothing runs; returns whether every row and page is free then."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (engine.open or engine.by_task or engine.queue.running):
        time.sleep(0.02)
    cache = engine.queue.cache
    return not engine.open and not engine.queue.running and len(cache.free) == cache.pages


@pytest.mark.parametrize(
    "status, given",
    [
        (400, dict(body="{")),
        (400, dict(body="[]")),
        (400, dict(body="[" * 4000)),
        (400, dict(body={**CHAT, "temprature": 1})),
        (400, dict(body={**CHAT, "n": 2})),
        (400, dict(body={**CHAT, "messages": "Hello"})),
        (400, dict(body={**CHAT, "messages": [{"role": "user", "content": "\ud800"}]})),
        (400, dict(body={**CHAT, "max_tokens": 151})),
        (400, dict(body={**CHAT, "max_tokens": True})),
        (400, dict(body={**CHAT, "temperature": -1})),
        (400, dict(body={**CHAT, "logit_bias": {"1": 10**400}})),
        (400, dict(body={**CHAT, "logit_bias": {"99999": 1}})),
        (400, dict(body={**CHAT, "top_logprobs": 2})),
        (400, dict(body={**CHAT, "stop": [""]})),
        (400, dict(body={**CHAT, "stream_options": {"x": 1}, "stream": True})),
        (400, dict(body={**CHAT, "messages": [{"role": "user", "content": "a" * 600}]})),  # of 200 tokens
        (400, dict(body={**CHAT, "messages": [{"role": "user", "content": "a" * 600}], "stream": True})),
        (400, dict(path="/v1/completions", body={"prompt": [-1]})),
        (400, dict(path="/v1/completions", body={"prompt": ["a", "b"]})),
        (400, dict(Host="evil.example")),
        (404, dict(body={**CHAT, "model": "gpt-4"})),
        (404, dict(path="/v1/embeddings")),
        (405, dict(method="GET")),
        (413, dict(body={**CHAT, "user": "a" * 5000})),
        (415, {"content-type": "text/plain"}),
    ],
)
def test_bad_requests_have_their_status(server, status, given):
    got, answer = ask(server[0], **given)
    assert got == status, answer
    assert "Host" in given or answer["error"]["message"]


def test_a_body_of_no_stated_length_is_limited(server):
    link = http.client.HTTPConnection("127.0.0.1", server[0], timeout=20)
    pieces = iter([b"a" * 3000] * 3)
    headers = {"content-type": "application/json"}
    link.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    assert link.getresponse().status == 413


def test_answers_are_those_of_the_queue(server):
    port, engine = server
    body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    status, answer = ask(port, "/v1/completions", body)
    assert status == 200 and settled(engine)
    queue = Queue(engine.queue.decoder)
    task = queue.submit(engine.tokenizer.encode("Hello"), 6, stop_ids=engine.tokenizer.eos)
    queue.run()
    choice = answer["choices"][0]
    assert choice["text"] == engine.tokenizer.decode(task.output_ids)
    assert len(choice["logprobs"]["tokens"]) == len(task.output_ids) == answer["usage"]["completion_tokens"]
    assert choice["finish_reason"] == "length"


def test_a_stop_text_ends_the_answer_before_it(server):
    port, engine = server
    body = {"prompt": "Hello", "max_tokens": 60, "temperature": 0}
    whole = ask(port, "/v1/completions", body)[1]["choices"][0]["text"]
    stop = whole[7:10]
    assert len(stop) == 3
    choice = ask(port, "/v1/completions", {**body, "stop": ["never there", stop]})[1]["choices"][0]
    assert choice["text"] == whole[: whole.find(stop)] and choice["finish_reason"] == "stop"
    assert settled(engine)


def test_many_clients_at_once_and_too_many(server):
    port, engine = server
    seen = {}
    with ThreadPoolExecutor(150) as pool:
        for status, _ in pool.map(lambda _: ask(port), range(200)):
            seen[status] = seen.get(status, 0) + 1
    assert seen.keys() <= {200, 429} and seen[200] >= 64
    assert settled(engine) and ask(port)[0] == 200


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, streams, monkeypatch):
    port, engine = server
    assert settled(engine)
    step, cancel, cancelled = engine.queue.decoder.step, engine.queue.cancel, []
    monkeypatch.setattr(engine.queue.decoder, "step", lambda *given: (time.sleep(0.02), step(*given)))
    monkeypatch.setattr(engine.queue, "cancel", lambda task: (cancelled.append(task), cancel(task)))
    body = json.dumps({"prompt": "Hello", "max_tokens": 150, "stream": streams, "logit_bias": {"271": -100}})
    begun = engine.queue.submitted
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as link:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            if streams:
                assert b"200 OK" in link.recv(100)
            else:
                while engine.queue.submitted == begun:
                    time.sleep(0.005)
                begun += 1
    assert settled(engine) and ask(port)[0] == 200
    # 150 tokens take 3 seconds here; it is noticed within half a second that nobody waits.
    assert len(cancelled) == 3 and all(len(task.output_ids) < 100 for task in cancelled)


def test_a_failure_of_the_model_is_status_500_and_the_server_lives(server, monkeypatch):
    port, engine = server
    assert settled(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.queue.decoder, "step", lambda *_: 1 / 0)
        assert ask(port)[0] == 500
    assert ask(port)[0] == 200 and settled(engine)


def test_the_client_of_openai(server):
    openai = pytest.importorskip("openai", reason="needs openai: pip install -e '.[serve-test]'")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = dict(model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, seed=3)
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens <= 8
    assert all(len(token.top_logprobs) == 2 for token in whole.choices[0].logprobs.content)
    chunks = list(
        client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"min_p": 0.0}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason
    completion = client.completions.create(model="tiny", prompt="Hello", max_tokens=3)
    assert completion.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(**asked, top_p=7)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="Hello")
