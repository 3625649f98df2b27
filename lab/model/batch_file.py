"""`lab run --batch-file`: prompts from a file of JSON lines, answers as JSON lines in the same order.

Each line is an object with one of `prompt` (text), `ids` (token ids) and `messages` ([{"role", "content"}]),
and any of `max_new_tokens` and the fields of lab.model.sampling.Sampling; what a line leaves out is what the
options say. logit_bias is an object of token ids and numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace

from lab.errors import LabError
from lab.files import read_text, strict_json
from lab.model.queue import Queue, Task
from lab.model.sampling import Sampling
from lab.names import known
from lab.numbers import integer

PROMPTS = ("prompt", "ids", "messages")
OPTIONS = tuple(field.name for field in fields(Sampling))
MAX_ENTRIES = 100_000


@dataclass
class Entry:
    """A line: one of text, ids and messages, how many tokens at most, and how they are chosen."""

    where: str
    kind: str
    content: object
    max_new_tokens: int
    sampling: Sampling


def read_batch(path: str, max_new_tokens: int, sampling: Sampling) -> list[Entry]:
    """The entries of a file. Raises LabError, which names the line, for everything that is not as it should
    be."""
    entries = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        if len(entries) == MAX_ENTRIES:
            raise LabError(f"{path} has more than {MAX_ENTRIES} entries")
        where = f"{path}, line {number}"
        try:
            given = strict_json(line)
        except (ValueError, RecursionError) as error:
            raise LabError(f"{where}: no JSON ({error})") from None
        try:
            entries.append(_entry(where, given, max_new_tokens, sampling))
        except LabError as error:
            raise LabError(f"{where}: {error}") from None
    if not entries:
        raise LabError(f"{path} has no prompts: write one JSON object a line")
    return entries


def _entry(where: str, given, max_new_tokens: int, sampling: Sampling) -> Entry:
    if not isinstance(given, dict):
        raise LabError('expected an object, as in {"prompt": "Hello"}')
    for key in given:
        known(key, (*PROMPTS, "max_new_tokens", *OPTIONS), "key")
    kinds = [kind for kind in PROMPTS if kind in given]
    if len(kinds) != 1:
        raise LabError(f"give exactly one of {', '.join(PROMPTS)}")
    kind, content = kinds[0], given[kinds[0]]
    check_content(kind, content)
    most = given.get("max_new_tokens", max_new_tokens)
    if type(most) is not int or most < 1:
        raise LabError(f"max_new_tokens {most!r}: it must be a whole number from 1")
    return Entry(where, kind, content, most, sampling_with(sampling, given))


def check_content(kind: str, content) -> None:
    """Raises LabError unless a prompt has the types that its kind asks for."""
    if kind == "prompt" and not isinstance(content, str):
        raise LabError("prompt must be a string")
    if kind == "ids" and not (isinstance(content, list) and all(type(i) is int for i in content)):
        raise LabError("ids must be a list of whole numbers")
    if kind == "messages":
        whole = isinstance(content, list) and content
        for message in content if whole else [None]:
            if not (
                isinstance(message, dict)
                and message.keys() == {"role", "content"}
                and all(isinstance(value, str) for value in message.values())
            ):
                raise LabError('messages must be a list of {"role": text, "content": text}')
    for text in [content] if kind == "prompt" else [m["content"] for m in content if kind == "messages"]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LabError(f"{kind}: half of a surrogate pair is no text") from None


def sampling_with(default: Sampling, given: dict) -> Sampling:
    """`default` with the fields that `given`, parsed from JSON, has. Raises LabError."""
    changed = {name: given[name] for name in OPTIONS if name in given}
    if "logit_bias" in changed:
        changed["logit_bias"] = biases(changed["logit_bias"])
    return replace(default, **changed)


def biases(given) -> tuple[tuple[int, float], ...]:
    """A JSON object of token ids and numbers as Sampling takes it. Raises LabError."""
    wrong = LabError('logit_bias must be an object of token ids and numbers, as in {"42": -5}')
    if not isinstance(given, dict):
        raise wrong
    try:
        found = tuple((integer(token), bias) for token, bias in given.items())
    except ValueError:
        raise wrong from None
    if any(type(bias) not in (int, float) for _, bias in found):
        raise wrong
    return found


def encode_entry(tokenizer, entry: Entry, raw: bool) -> list[int]:
    """The entry's token ids. Raises LabError, which names its line."""
    if entry.kind == "ids":
        return entry.content
    if tokenizer is None:
        raise LabError(f"{entry.where}: this model has no tokenizer here; give ids")
    try:
        if entry.kind == "messages":
            return tokenizer.encode_chat(entry.content)
        if raw or tokenizer.chat_template is None:
            return tokenizer.encode(entry.content)
        return tokenizer.encode_chat([{"role": "user", "content": entry.content}])
    except LabError as error:
        raise LabError(f"{entry.where}: {error}") from None


def run_batch(args, sampling: Sampling) -> int:
    """Reads args.batch_file and prints an object for each of its lines, in its order, as soon as it is
    there. The status is 1 where an answer failed."""
    from lab.model.opening import open_model

    entries = read_batch(args.batch_file, args.max_new_tokens, sampling)
    prompts: list[list[int]] = []

    def longest(tokenizer) -> int:
        prompts.extend(encode_entry(tokenizer, entry, args.raw) for entry in entries)
        return max(len(ids) + entry.max_new_tokens for ids, entry in zip(prompts, entries))

    needs_text = any(entry.kind != "ids" for entry in entries)
    opened = open_model(args, min(8 if args.batch is None else args.batch, len(entries)), needs_text, longest)
    queue, tokenizer = Queue(opened.decoder), opened.tokenizer
    ends = tokenizer.eos if tokenizer and not args.ignore_eos else ()
    tasks: list[Task] = []
    for entry, ids in zip(entries, prompts):
        try:
            tasks.append(queue.submit(ids, entry.max_new_tokens, entry.sampling, ends))
        except LabError as error:
            raise LabError(f"{entry.where}: {error}") from None
    shown, more = 0, True
    try:
        while more:
            more = queue.step()
            while shown < len(tasks) and tasks[shown].stopped_by is not None:
                print(json.dumps(record_of(tasks[shown], tokenizer)), flush=True)
                shown += 1
    finally:
        queue.clear()
    return 1 if any(task.error for task in tasks) else 0


def record_of(task: Task, tokenizer) -> dict:
    """What is printed of an answer."""
    record = {
        "index": task.number,
        "prompt_tokens": len(task.prompt_ids),
        "output_ids": task.output_ids,
        "text": tokenizer.decode(task.output_ids) if tokenizer else None,
        "stopped_by": task.stopped_by,
    }
    if task.error:
        record["error"] = task.error
    if task.sampling.logprobs is not None:
        record["logprobs"] = [{"logprob": own, "top": top} for own, top in task.logprobs]
    return record
