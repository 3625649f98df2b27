"""`lab chat`: a conversation with a model in a terminal."""

from __future__ import annotations

import contextlib
import signal
import sys

from lab.errors import LabError, warn
from lab.options import model_arguments, sampling_arguments
from lab.text import for_terminal

HELP = "an empty line is left out; /new begins anew; Ctrl-C stops an answer; Ctrl-D ends"
LONGEST = 1 << 20  # characters of a line


def add_arguments(parser) -> None:
    model_arguments(parser)
    sampling_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="of an answer")


def main(args) -> int:
    from lab.model.opening import open_model
    from lab.model.queue import Queue
    from lab.model.run import sampling_of

    args.logprobs = None
    sampling = sampling_of(args)
    if args.max_new_tokens < 1:
        raise LabError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1")
    opened = open_model(args, 1, needs_text=True)
    if opened.tokenizer.chat_template is None:
        raise LabError(f"model {opened.name} has no chat template; `lab run --raw` completes text")
    queue = Queue(opened.decoder)
    queue.prepare()
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        print(f"{opened.name}: {HELP}")
    start = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages = list(start)
    while True:
        line = read_line("> " if terminal else "")
        if line is None:
            return 0
        if not line.strip():
            continue
        if line.strip() == "/new":
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = reply(queue, opened.tokenizer, asked, args.max_new_tokens, sampling)
        except LabError as error:  # as a conversation that has become too long
            if not terminal:
                raise
            warn(f"{error}; /new begins anew")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def read_line(prompt: str) -> str | None:
    """A line of standard input; None at its end. Ctrl-C at the prompt ends the conversation, too."""
    if sys.stdin is None:
        return None
    print(prompt, end="", flush=True)
    try:
        line = sys.stdin.readline(LONGEST)
    except UnicodeDecodeError:
        raise LabError("standard input is not valid UTF-8 text") from None
    if not line:
        if prompt:
            print()
        return None
    return line.removesuffix("\n")


@contextlib.contextmanager
def noted_interrupts():
    """Gives a list that Ctrl-C makes longer: so it interrupts nothing midway, as a step of the queue while
    pages change hands. Pressed again, it does interrupt."""
    pressed: list[bool] = []

    def note(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in the background of a shell
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def reply(queue, tokenizer, messages, max_new_tokens, sampling) -> str:
    """Prints the answer to `messages` as it comes, and returns it. Ctrl-C ends it where it is."""
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            where = "--system" if message["role"] == "system" else "this"
            raise LabError(f"{where} is not valid UTF-8 text") from None
    clean = for_terminal if sys.stdout.isatty() else str
    stream, pieces = tokenizer.stream(late=True), []

    def show(text: str) -> None:
        pieces.append(text)
        print(clean(text), end="", flush=True)

    ids = tokenizer.encode_chat(messages)
    task = queue.submit(
        ids, max_new_tokens, sampling, tokenizer.eos, lambda _, token: show(stream.push(token))
    )
    try:
        with noted_interrupts() as pressed:
            while queue.step() and not pressed:
                pass
    except KeyboardInterrupt:
        pass
    finally:  # what was said stands
        queue.clear()
        show(stream.finish())
        print(flush=True)
    if task.error:
        raise LabError(task.error)
    return "".join(pieces)
