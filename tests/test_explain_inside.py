"""lab explain: helpers at the place of the call, the pager, and what Triton's compiler did."""

import re
import sys

import pytest

from lab import cli
from lab.errors import LabError
from lab.harness.shapes import Point
from lab.learn import compiled, pager, unfold
from lab.ops import find
from lab.report import twins


def pieces(op, language, which, step):
    twin = twins.pair(op)[language]
    return [
        piece
        for chunk in twin.steps[step].chunks
        for piece in unfold.pieces(twin.language, twin.name, chunk.first, len(chunk.lines), which)
    ]


def test_a_helper_stands_right_below_its_call():
    found = pieces("linear", 0, "loops", 2)
    at = next(i for i, p in enumerate(found) if p.helper and p.helper.name == "RowStream::multiply")
    assert "stream.multiply(acc" in "".join(found[at - 1].lines[-3:])
    assert found[at].depth == found[at - 1].depth + 1
    for i, piece in enumerate(found):  # what is interrupted goes on at the next line
        if not piece.helper and piece.depth:
            before = next(p for p in reversed(found[:i]) if p.depth == piece.depth)
            assert piece.first == before.first + len(before.lines)


def test_no_line_of_a_kernel_is_lost_or_shown_twice():
    for op in twins.known_ops():
        for twin in twins.pair(op):
            for chunk in (c for step in twin.steps.values() for c in step.chunks):
                given = twin.language, twin.name, chunk.first, len(chunk.lines)
                own = [p for p in unfold.pieces(*given, "loops") if p.depth == 0]
                assert [line for piece in own for line in piece.lines] == chunk.lines, (op, chunk.first)


def test_by_default_the_inner_loop_is_unfolded_and_little_else():
    names = {}
    for which in ("loops", "all"):
        names[which] = [p.helper.name for p in pieces("decode_attention", 0, which, 4) if p.helper]
    # A, of which these are methods, is a template's parameter.
    assert {"LaneAttention::attend", "MmaAttention::attend"} <= set(names["loops"])
    assert len(names["loops"]) < len(names["all"])
    assert not [p for p in pieces("linear", 0, "none", 2) if p.helper]
    assert [p.helper.name for p in pieces("decode_attention", 1, "loops", 4) if p.helper] == ["attend"]


def test_a_helper_is_unfolded_once():
    twin, seen = twins.pair("linear_add")[0], set()
    names = [
        piece.helper.name
        for step in twin.steps.values()
        for chunk in step.chunks
        for piece in unfold.pieces(twin.language, twin.name, chunk.first, len(chunk.lines), "all", seen)
        if piece.helper
    ]
    assert len(names) == len(set(names)) > 3


def test_a_terminal_gets_a_pager_and_a_pipe_does_not(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "paged"
    keep = f"import sys; open({str(kept)!r}, 'w').write(sys.stdin.read())"
    monkeypatch.setenv("PAGER", f'"{sys.executable}" -c "{keep}"')
    explain = ["explain", "silu_mul", "--no-compiled"]
    assert cli.main(explain) == 0
    assert "2. Load" in capsys.readouterr().out and not kept.exists()
    for stream in (sys.stdout, sys.stdin):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert cli.main(explain) == 0
    assert capsys.readouterr().out == "" and "cuda_src/silu_mul.cu" in kept.read_text()
    for none in ("", "cat", "no-such-pager"):
        monkeypatch.setenv("PAGER", none)
        assert pager.command() is None


def test_leaving_the_pager_early_is_no_error():
    pager.show("line\n" * 1_000_000, [sys.executable, "-c", "pass"])


@pytest.mark.parametrize("batch", (1, 16))
def test_what_tritons_compiler_did_is_said_by_line(batch):
    (kernel,) = compiled.at_point(
        find("linear"), Point("linear", None, batch, None, {"n": 512, "k": 1024}), "bf16"
    )
    source = (twins.ROOT / "triton_kernels/linear.py").read_text().splitlines()
    said = {source[n - 1].strip(): "; ".join(texts) for n, texts in kernel.by_line.items()}
    load = next(texts for line, texts in said.items() if line.startswith("wv = tl.load"))
    dots = [texts for line, texts in said.items() if line.startswith("acc = tl.dot")]
    if batch == 1:
        assert "8 neighbours a thread" in load and "load of 16 bytes" in load and not dots
        reduced = next(texts for line, texts in said.items() if line.startswith("total = tl.sum"))
        assert "shuffle" in reduced  # of a function that the line calls
    else:
        assert re.search(r"a ring of [2-9] stages", load) and "cp.async of 16 bytes" in load
        assert "on tensor cores" in dots[0]
    assert "on tensor cores" not in load


def test_explain_says_it_beside_the_triton_code_and_at_the_size_of_the_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["explain", "rmsnorm", "--unfold", "none"]) == 0
    out = capsys.readouterr().out
    cols = int(out.split("size: ")[1].split("cols=")[1].split()[0].rstrip(","))
    # Loaded at once: the row, filled up to a power of two.
    assert f"compiled: {1 << (cols - 1).bit_length()} bf16 at once" in out
    assert "Triton's compiler: at this size rmsnorm_kernel" in out


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    monkeypatch.setattr(compiled.triton_code, "launches", lambda *_: 1 / 0)
    with pytest.raises(LabError, match="ZeroDivisionError"):
        compiled.at_point(find("linear"), Point("linear", None, 1, None, {"n": 512, "k": 1024}), "bf16")
