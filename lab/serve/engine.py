"""The thread that owns the model: it takes requests from the server's event loop, runs the queue, and sends
text back as it comes. Decoder, queue and tokenizer are used by this thread alone."""

from __future__ import annotations

import asyncio
import contextlib
import queue as queues
import sys
import threading
import traceback
from dataclasses import dataclass, field

from lab.errors import LabError, one_line
from lab.model.opening import Opened
from lab.model.queue import Queue, Task
from lab.model.sampling import ByRow, Sampling


@dataclass(frozen=True)
class Request:
    """What is asked for: text to be continued, or the messages of a conversation. stop: texts at which the
    answer ends; they are not part of it."""

    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Token:
    """A token with its log-probability, and the likeliest tokens with theirs: (text, number)."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, and the log-probabilities of its tokens where they were asked for. The last
    piece has a reason; a failure has the status of HTTP and an `error`."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    reason: str | None = None  # "stop" or "length"
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: int = 200
    error: str | None = None


@dataclass(eq=False)
class Answer:
    """An answer on its way: pieces come to `pieces`, on the event loop that has asked."""

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)
    task: Task | None = None
    stream: object = None
    held: str = ""  # text that may be the beginning of a stop text
    reported: list[Token] = field(default_factory=list)  # of tokens whose text was not sent yet
    ended: bool = False
    cancelled: bool = False


class Busy(LabError):
    """More requests than the server takes at a time."""


class Engine:
    """A context manager: the thread runs inside. max_queue: requests at a time, those that run included."""

    def __init__(self, opened: Opened, max_queue: int):
        self.opened, self.tokenizer, self.max_queue = opened, opened.tokenizer, max_queue
        self.queue = Queue(opened.decoder)
        self.inbox: queues.SimpleQueue[Answer | None] = queues.SimpleQueue()  # None: end
        self.open: set[Answer] = set()  # changed by the event loop alone
        self.by_task: dict[Task, Answer] = {}
        self.ended = False  # whether no answer can come any more
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def prepare(self) -> None:
        """Captures the steps that most requests need, so that the first ones do not wait for that."""
        self.queue.prepare()
        self.queue.prepare(ByRow(draws=True))

    def __enter__(self) -> Engine:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.inbox.put(None)
        self.thread.join(timeout=30)

    # What the event loop calls.

    def ask(self, request: Request) -> Answer:
        """Raises Busy where too many requests are open, and LabError where the engine has ended."""
        if self.ended or not self.thread.is_alive():
            raise LabError("the engine has ended")
        if len(self.open) >= self.max_queue:
            raise Busy(f"{self.max_queue} requests are waiting or running; try again later")
        answer = Answer(request, asyncio.get_running_loop())
        self.inbox.put(answer)
        if self.ended:  # meanwhile; perhaps nobody looks into the inbox any more
            raise LabError("the engine has ended")
        self.open.add(answer)
        return answer

    def leave(self, answer: Answer) -> None:
        """The caller is done with an answer, or no longer wants it."""
        self.open.discard(answer)
        if not answer.ended:
            answer.cancelled = True
            self.inbox.put(answer)

    # What the engine's thread does.

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:  # as where the GPU is lost: even clearing the queue fails
            traceback.print_exc(file=sys.stderr)
            self.ended = True  # before the inbox is emptied: ask() looks in the other order
            self._fail_all(error)
            while not self.inbox.empty():
                answer = self.inbox.get()
                if answer is not None and not answer.ended:
                    self._fail(answer, 500, f"the model failed: {one_line(str(error))}")

    def _serve(self) -> None:
        busy = False
        while True:
            while not busy or not self.inbox.empty():
                answer = self.inbox.get()
                if answer is None:
                    self.queue.clear()
                    return
                self._take(answer)
                busy = bool(self.queue.waiting or self.queue.running or self.queue.in_flight)
            try:
                busy = self.queue.step()
                self._send_ends()
            except Exception as error:  # every open answer fails, and the server lives
                traceback.print_exc(file=sys.stderr)
                self._fail_all(error)
                self.queue.clear()
                busy = False

    def _take(self, answer: Answer) -> None:
        if answer.cancelled:
            if answer.task is not None and not answer.ended:
                self.queue.cancel(answer.task)
                self._close(answer)
            answer.ended = True
            return
        request, tokenizer = answer.request, self.tokenizer
        try:
            if request.messages is not None:
                ids = tokenizer.encode_chat(request.messages)
            else:
                ids = request.prompt if isinstance(request.prompt, list) else tokenizer.encode(request.prompt)
            answer.stream = tokenizer.stream()  # before submit(): a task always has a stream for its tokens
            answer.task = self.queue.submit(
                ids, request.max_new_tokens, request.sampling, tokenizer.eos, self._token
            )
            self.by_task[answer.task] = answer
        except LabError as error:
            self._fail(answer, 400, str(error))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self._fail(answer, 500, one_line(str(error)))

    def _token(self, task: Task, token: int) -> None:
        answer = self.by_task[task]
        if task.sampling.logprobs is not None:
            own, top = task.logprobs[-1]
            text = lambda token: self.tokenizer.decode([token])
            likeliest = [(text(other), value) for other, value in top.items()]
            answer.reported.append(Token(text(token), own, likeliest))
        answer.held += answer.stream.push(token)
        if self._stopped(answer):
            self.queue.cancel(task)
            task.stopped_by = "stop"
            return
        # As much as could be the beginning of a stop text is held back.
        longest = max(map(len, answer.request.stop), default=1) - 1
        sure = len(answer.held) - longest
        if sure > 0:
            text, answer.held = answer.held[:sure], answer.held[sure:]
            self._send(answer, Piece(text, self._reported(answer)))

    def _stopped(self, answer: Answer) -> bool:
        """Whether a stop text is there; what follows it is dropped."""
        places = [answer.held.find(stop) for stop in answer.request.stop]
        found = [place for place in places if place >= 0]
        if found:
            answer.held = answer.held[: min(found)]
        return bool(found)

    def _send_ends(self) -> None:
        for task, answer in list(self.by_task.items()):
            if task.stopped_by is None:
                continue
            if task.error:
                self._fail(answer, 500, task.error)
                continue
            answer.held += "" if answer.stream is None else answer.stream.finish()
            answer.stream = None
            stopped = self._stopped(answer)
            last = Piece(
                answer.held,
                self._reported(answer),
                "stop" if stopped else task.stopped_by,
                len(task.prompt_ids),
                len(task.output_ids),
            )
            self._close(answer)
            self._send(answer, last)

    def _reported(self, answer: Answer) -> tuple[Token, ...]:
        tokens, answer.reported = tuple(answer.reported), []
        return tokens

    def _fail_all(self, error: Exception) -> None:
        for answer in list(self.by_task.values()):
            self._fail(answer, 500, f"the model failed: {one_line(str(error))}")

    def _fail(self, answer: Answer, status: int, message: str) -> None:
        self._close(answer)
        self._send(answer, Piece(status=status, error=message))

    def _close(self, answer: Answer) -> None:
        answer.ended = True
        self.by_task.pop(answer.task, None)
        if answer.stream is not None:
            with contextlib.suppress(LabError):  # the tokenizer's process has ended; what remains is unknown
                answer.stream.finish()
            answer.stream = None

    def _send(self, answer: Answer, piece: Piece) -> None:
        try:
            answer.loop.call_soon_threadsafe(answer.pieces.put_nowait, piece)
        except RuntimeError:  # the event loop has ended, and nobody waits
            pass
