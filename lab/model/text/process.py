"""A process for untrusted text: it loads tokenizers, renders chat templates, encodes and decodes.

A tokenizer.json or a chat template is data from a stranger that can take all memory (`'a' * 10**10`), all
time (nested loops, a normalizer that doubles the text forty times), or abort its process (a failed allocation
or a panic inside the tokenizers package). So `TextProcess` starts a Python process that imports tokenizers
and jinja2 alone, not torch, with limits on its memory and on the processor time of each request. Whatever
goes wrong in it is one LabError here.

The two processes exchange lines of JSON over a pair of pipes: {"op", arguments..., "seconds", "number"},
answered by {"value", "number"} or {"error", "kind", "number"}. The number tells whose answer it is, for
Ctrl-C may interrupt the caller between a request and its answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.errors import LabError, Unavailable, one_line

MEMORY = 2 << 30  # bytes of address space; a vocabulary of 250,000 tokens takes a quarter
SECONDS = {"load": 20}  # of processor time, by request
OTHER_SECONDS = 10
WALL = 12  # how many times as long a request may take on a machine that is busy
MAX_ANSWER = 1 << 27  # bytes
FAILS = {"load": "is mangled", "render": "cannot be rendered", "encode": "cannot encode this text"}


class TextProcess:
    """The caller's side. The process ends with this object, or with the program."""

    def __init__(self):
        # -I: neither environment nor current folder adds modules. The import path is the caller's own.
        start = (
            f"import sys; sys.path = {sys.path!r}; from lab.model.text.process import serve; serve({MEMORY})"
        )
        # One thread and one heap: each further one reserves address space, which is what the limit counts.
        # Libraries preloaded for the lab (a sanitizer's) reserve terabytes. A session of its own: Ctrl-C is
        # the caller's to handle.
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", start],
            env=environment,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._asked, self._buffer, self._number = deque(), bytearray(), 0
        self._end = weakref.finalize(self, _end, self._process)

    def request(self, op: str, subject: str, otherwise: str, **arguments):
        """What `op` of lab.model.text.process._Server gives for the arguments.

        subject, otherwise: what errors begin with ("the chat template") and what to do instead ("--raw").
        Raises LabError for whatever goes wrong, and where a limit is passed; the process is gone then.
        """
        taken = []
        self.post(taken.append, op, subject, otherwise, **arguments)
        self.collect()
        return taken[0]

    def post(self, take: Callable, op: str, subject: str, otherwise: str, **arguments) -> None:
        """Sends a request and does not wait: collect() gives the answer to `take`. See request()."""
        self._number += 1
        asked = _Asked(take, op, subject, otherwise, SECONDS.get(op, OTHER_SECONDS), self._number)
        self._asked.append(asked)
        try:
            request = {"op": op, "seconds": asked.seconds, "number": asked.number, **arguments}
            line = json.dumps(request).encode() + b"\n"
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # the process ended: now, or at an earlier request
            self._fail(asked)

    def collect(self, patience: float | None = None) -> None:
        """Gives the answers of posted requests to those who take them, in order.

        patience: seconds to wait for those that have not come yet; None: until all are there, within their
        limits. Raises LabError as request() does.
        """
        begun = time.monotonic()
        while self._asked:
            # The last one: the answers of those before come earlier, or never if one was interrupted.
            asked = self._asked[-1]
            deadline = min(asked.deadline, asked.deadline if patience is None else begun + patience)
            try:
                answer = json.loads(self._read_line(deadline))
            except _Late:
                if time.monotonic() < asked.deadline:
                    return
                self._end()
                self._asked.clear()
                raise LabError(
                    f"{asked.subject} takes more than {WALL * asked.seconds} s; use {asked.otherwise}"
                ) from None
            except (BrokenPipeError, ValueError):
                self._fail(asked)
            number = answer.pop("number")
            while self._asked and self._asked[0].number < number:
                self._asked.popleft()  # its answer was read, and then Ctrl-C came
            if self._asked and self._asked[0].number == number:
                asked = self._asked.popleft()
                asked.take(_value(answer, asked))

    def _fail(self, asked: _Asked):
        self._end()
        self._asked.clear()
        raise LabError(
            f"{asked.subject} {_cause(self._process.returncode, asked.seconds)}; use {asked.otherwise}"
        ) from None

    def _read_line(self, deadline: float) -> bytes:
        """The next line. Raises _Late where it is not complete at the deadline; what has come of it then
        stays in the buffer, for the next call."""
        pipe, searched = self._process.stdout.fileno(), 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise _Late
            piece = os.read(pipe, 1 << 20)
            self._buffer += piece
            if not piece or len(self._buffer) > MAX_ANSWER:
                raise BrokenPipeError
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


@dataclass
class _Asked:
    """A request whose answer has not been read yet."""

    take: Callable
    op: str
    subject: str
    otherwise: str
    seconds: int
    number: int
    deadline: float = 0.0

    def __post_init__(self):
        self.deadline = time.monotonic() + WALL * self.seconds


def _value(answer: dict, asked: _Asked):
    """The value in an answer. Raises LabError or Unavailable for an error in it."""
    if "value" in answer:
        return answer["value"]
    kind, message = answer["kind"], answer["error"]
    if kind == "memory":
        raise LabError(
            f"{asked.subject} takes more than the {MEMORY >> 30} GiB of memory that it may; "
            f"use {asked.otherwise}"
        )
    if kind == "other":
        fails = FAILS.get(asked.op, "cannot decode these ids")
        raise LabError(f"{asked.subject} {fails} ({message}); use {asked.otherwise}")
    raise (Unavailable if kind == "unavailable" else LabError)(message)


class _Late(Exception):
    pass


def _end(process: subprocess.Popen) -> None:
    """Ends the process. One that is ending by itself keeps its own return code."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except BrokenPipeError:  # what was not written yet has no reader any more
            pass
    process.wait()


def _cause(status: int, seconds: int) -> str:
    if -status == signal.SIGXCPU:
        return f"takes more than {seconds} s of processor time"
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return (
        f"ends its process ({how}): it is mangled, or takes more than the {MEMORY >> 30} GiB of memory "
        "that it may"
    )


# --- the process itself ---


def serve(memory: int) -> None:
    """Answers requests from standard input until it is closed."""
    import resource

    limit(resource, resource.RLIMIT_AS, memory)
    limit(resource, resource.RLIMIT_CORE, 0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print goes nowhere
    server = _Server()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource, resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + request.pop("seconds"))
        number = request.pop("number")
        answers.write(json.dumps({**_answer(server, **request), "number": number}).encode() + b"\n")
        answers.flush()


def limit(resource, which: int, value: int) -> None:
    """Sets a soft limit, as far as the hard one goes. A system without it leaves the caller's time limit."""
    hard = resource.getrlimit(which)[1]
    try:
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ValueError, OSError):
        pass


def _answer(server: _Server, op: str, **arguments) -> dict:
    try:
        return {"value": getattr(server, op)(**arguments)}
    except LabError as error:
        kind = "unavailable" if isinstance(error, Unavailable) else "mistake"
        return {"kind": kind, "error": _short(error)}
    except MemoryError:
        return {"kind": "memory", "error": ""}
    except BaseException as error:  # the tokenizers package's PanicException is no Exception
        return {"kind": "other", "error": f"{type(error).__name__}: {_short(error)}"}


def _short(error: BaseException) -> str:
    text = one_line(str(error)[:2000])
    return text if len(text) <= 400 else text[:400] + "..."


class _Server:
    """One tokenizer at most, and any number of streams of output."""

    def __init__(self):
        self.text, self.streams, self.begun = None, {}, 0

    def load(self, source: dict, hidden: Sequence[int] = (), eos: str | None = None) -> dict:
        """source: see lab.model.text.backend.build. hidden: ids never shown. eos: text of the end token."""
        from lab.model.text import backend as pipelines

        backend = pipelines.build(**source)
        ends = set(pipelines.ends_of_file(backend).values()) if source["kind"] == "from_file" else set()
        ends |= {backend.token_to_id(eos)} - {None} if eos is not None else set()
        self.text = pipelines.TextBackend(backend, {*hidden, *ends})
        return {
            "size": backend.get_vocab_size(with_added_tokens=True),
            "ends": sorted(ends),
            "leading": pipelines.leading_tokens(backend),
        }

    def render(self, template: str, messages: list[dict], special: dict) -> str:
        from lab.model.text.chat_template import render

        return render(template, messages, special)

    def encode(self, text: str) -> list[int]:
        return self.text.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.text.decode(ids)

    def stream(self) -> int:
        self.begun += 1
        self.streams[self.begun] = self.text.stream()
        return self.begun

    def push(self, stream: int, token: int) -> str:
        return self.streams[stream].push(token)

    def finish(self, stream: int) -> str:
        return self.streams.pop(stream).finish()
