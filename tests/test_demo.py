"""`make demo` on a tiny model: three backends agree, and a single wrong token is not overlooked."""

import pytest
from tiny_models import CONFIGS, write_gguf

from lab.machine import demo


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"])
    monkeypatch.setattr(demo, "MODEL", str(path))
    monkeypatch.setattr(demo, "TOKENS", 6)
    monkeypatch.setattr(demo, "report", lambda out: 0)
    return path


def test_three_backends_agree(tiny, capsys):
    assert demo.main([]) == 0
    out = capsys.readouterr().out
    assert "cuda and triton: the same " in out and "All three agree token for token." in out


def test_a_wrong_token_is_not_overlooked(tiny, capsys, monkeypatch):
    right = demo.decode

    def wrong(backend, *rest):
        answer = right(backend, *rest)
        if backend == "triton":
            answer.ids[-1] ^= 1
        return answer

    monkeypatch.setattr(demo, "decode", wrong)
    assert demo.main([]) == 1
    out = capsys.readouterr().out
    assert "cuda and triton: DIFFER at token" in out and "torch and cuda: the same" in out


def test_out_of_time_still_decodes_the_least(tiny, capsys):
    assert demo.main(["--seconds", "0"]) == 0
    assert f"the same {demo.LEAST} tokens" in capsys.readouterr().out


def test_a_model_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", "/nowhere/model.gguf")
    assert demo.run([]) == 2
    assert capsys.readouterr().err.startswith("demo: error: unknown model")


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.run(["--out", str(tmp_path / "file" / "demo")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"demo: error: {tmp_path}/file/demo: Not a directory\n"
