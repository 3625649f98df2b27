"""`lab chat` with its lines from a pipe."""

import io
import signal
import sys

from lab import cli
from lab.model.decoder import Decoder
from lab.model.queue import Queue
from tests.tiny_models import CONFIGS, write_folder


def chat(monkeypatch, folder, text, *more):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    words = ["chat", str(folder), "--backend", "torch", "--device", "cpu", "--max-new-tokens", "5"]
    return cli.main([*words, *more])


def test_each_line_is_asked_with_what_was_said_before(tmp_path, monkeypatch, capsys):
    folder, prompts = write_folder(tmp_path / "model", CONFIGS["llama"]), []
    submit = Queue.submit

    def noted(queue, ids, *more):
        prompts.append(ids)
        return submit(queue, ids, *more)

    monkeypatch.setattr(Queue, "submit", noted)
    assert chat(monkeypatch, folder, b"Hello\n\nAnd?\n/new\nHello\n") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert prompts[0] == prompts[2] and len(prompts[1]) > 2 * len(prompts[0]) - 10 and len(prompts) == 3


def test_what_cannot_be_answered_is_one_line(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "model", CONFIGS["llama"])
    assert chat(monkeypatch, folder, b"\xff\xfe\n") == 2
    assert chat(monkeypatch, folder, b"a" * 2000 + b"\n") == 2
    assert chat(monkeypatch, folder, b"", "--min-p", "7") == 2
    assert chat(monkeypatch, folder, b"Hello\n", "--system", "\udcff") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and "UTF-8" in errors[0] and "min_p" in errors[2], errors
    assert errors[3] == "lab: error: --system is not valid UTF-8 text"


def test_ctrl_c_ends_the_answer_and_interrupts_nothing_midway(tmp_path, monkeypatch, capsys):
    folder, step, steps = write_folder(tmp_path / "model", CONFIGS["llama"]), Decoder.step, []

    def interrupted(*given):
        steps.append("begun")
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        step(*given)
        steps.append("done")

    monkeypatch.setattr(Decoder, "step", interrupted)
    handler, ended, submit = signal.getsignal(signal.SIGINT), [], Queue.submit
    monkeypatch.setattr(Queue, "submit", lambda *given: ended.append(submit(*given)) or ended[-1])
    assert chat(monkeypatch, folder, b"Hello\nAnd?\n") == 0
    assert steps == ["begun", "done"] * (len(steps) // 2)
    assert ended[0].stopped_by == "cancelled" and len(ended[0].output_ids) == 1
    assert ended[1].stopped_by in ("length", "stop"), "the next line is answered"
    assert signal.getsignal(signal.SIGINT) is handler
