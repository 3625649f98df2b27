"""The HTTP side of `lab serve`: routes, limits, status codes, and the forms of OpenAI's answers."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lab.errors import LabError
from lab.files import strict_json
from lab.serve.engine import Answer, Busy, Engine, Piece, Token
from lab.serve.schema import Wanted, parse

BODY_SECONDS = 30.0  # in which a request's body must have come


@dataclass(frozen=True)
class Limits:
    new_tokens: int
    body: int  # bytes


def make_app(engine: Engine, limits: Limits, hosts: list[str]) -> Starlette:
    """hosts: names by which the server may be called; others get status 400."""
    name, started = engine.opened.name, int(time.time())

    async def models(http: HttpRequest) -> Response:
        model = {"id": name, "object": "model", "created": started, "owned_by": "lab"}
        return JSONResponse({"object": "list", "data": [model]})

    def endpoint(kind: str) -> Callable:
        async def handle(http: HttpRequest) -> Response:
            given = await read_body(http, limits.body)
            try:
                wanted = parse(kind, given, limits.new_tokens)
            except LabError as error:
                raise HTTPException(400, str(error)) from None
            if given.get("model", name) != name:
                raise HTTPException(404, f"the model here is {name!r}")
            try:
                answer = engine.ask(wanted.request)
            except Busy as error:
                raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
            except LabError as error:
                raise HTTPException(503, str(error)) from None
            return await respond(http, engine, answer, wanted, Form(kind, name))

        return handle

    return Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/completions", endpoint("completion"), methods=["POST"]),
            Route("/v1/chat/completions", endpoint("chat"), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: refused, Exception: failed},
    )


async def refused(http: HttpRequest, error: HTTPException) -> Response:
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)


async def failed(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed; its terminal says why"), 500)


def error_body(status: int, message: str) -> dict:
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def read_body(http: HttpRequest, most: int):
    """The JSON of a request's body. Raises HTTPException."""
    # A web page can send other types to a server of this machine without its leave, but not this one.
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    length = http.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise HTTPException(413, f"the body is larger than {most} bytes")

    async def received() -> bytes:
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"the body is larger than {most} bytes")
        return bytes(body)

    try:
        body = await asyncio.wait_for(received(), BODY_SECONDS)
        return strict_json(body)
    except (TimeoutError, asyncio.TimeoutError):
        raise HTTPException(408, "the body did not come in time") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from None


async def respond(http: HttpRequest, engine: Engine, answer: Answer, wanted: Wanted, form: Form) -> Response:
    """The whole answer, or a stream once its first piece is there: what is refused then has its status."""
    try:
        first = await next_piece(http, answer)
        if first.error:
            raise HTTPException(first.status, first.error)
        if not wanted.stream:
            pieces = [first]
            while pieces[-1].reason is None:
                pieces.append(await next_piece(http, answer))
                if pieces[-1].error:
                    raise HTTPException(pieces[-1].status, pieces[-1].error)
            engine.leave(answer)
            return JSONResponse(form.whole(pieces))
    except BaseException:
        engine.leave(answer)
        raise
    return Stream(engine, answer, events(answer, first, wanted.usage, form))


class Stream(StreamingResponse):
    """Server-sent events. However it ends, as when the client goes away, the sequence ends, too."""

    def __init__(self, engine: Engine, answer: Answer, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.engine, self.answer = engine, answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.engine.leave(self.answer)


async def next_piece(http: HttpRequest, answer: Answer) -> Piece:
    """Raises HTTPException where the client has gone away meanwhile, which is looked for with every piece."""
    while True:
        if await http.is_disconnected():
            raise HTTPException(400, "the client went away")
        try:
            return await asyncio.wait_for(answer.pieces.get(), 0.5)
        except (TimeoutError, asyncio.TimeoutError):
            pass


async def events(answer: Answer, first: Piece, usage: bool, form: Form) -> AsyncIterator[str]:
    event = lambda value: f"data: {json.dumps(value)}\n\n"
    piece, opening = first, True
    while True:
        if piece.error:
            yield event(error_body(piece.status, piece.error))
            return
        yield event(form.chunk(piece, opening))
        if piece.reason is not None:
            break
        piece, opening = await answer.pieces.get(), False
    if usage:
        yield event({**form.head(True), "choices": [], "usage": form.usage(piece)})
    yield "data: [DONE]\n\n"


class Form:
    """The forms of one answer, which has an id of its own. kind: completion or chat."""

    def __init__(self, kind: str, model: str):
        self.chat, self.model, self.created = kind == "chat", model, int(time.time())
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.offset = 0  # characters so far, for text_offset

    def head(self, chunk: bool) -> dict:
        chat = "chat.completion.chunk" if chunk else "chat.completion"
        kind = chat if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, last: Piece) -> dict:
        total = last.prompt_tokens + last.output_tokens
        return {
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.output_tokens,
            "total_tokens": total,
        }

    def whole(self, pieces: list[Piece]) -> dict:
        text, tokens = "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens]
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = self._choice(said, tokens, pieces[-1].reason)
        return {**self.head(False), "choices": [choice], "usage": self.usage(pieces[-1])}

    def chunk(self, piece: Piece, opening: bool) -> dict:
        delta = {"role": "assistant"} if opening else {}
        said = {"delta": {**delta, "content": piece.text}} if self.chat else {"text": piece.text}
        return {**self.head(True), "choices": [self._choice(said, piece.tokens, piece.reason)]}

    def _choice(self, said: dict, tokens, reason: str | None) -> dict:
        logprobs = (self._chat_logprobs if self.chat else self._logprobs)(tokens) if tokens else None
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}

    def _chat_logprobs(self, tokens: list[Token]) -> dict:
        entry = lambda text, value: {"token": text, "logprob": value, "bytes": list(text.encode())}
        return {
            "content": [
                {**entry(t.text, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens
            ]
        }

    def _logprobs(self, tokens: list[Token]) -> dict:
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token.text)
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens],
            "text_offset": offsets,
        }
