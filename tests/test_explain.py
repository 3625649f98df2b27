"""lab explain: in the terminal and as a page."""
import re
from types import SimpleNamespace

import pytest
import synthetic_records

from lab import explain
from lab.errors import LabError
from lab.report import twins


def arguments(op, **options):
    return SimpleNamespace(**{"op": op, "html": None, "reports": "no such folder", **options})


def run(capsys, monkeypatch, op, columns, **options):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert explain.main(arguments(op, **options)) == 0
    return capsys.readouterr().out


def test_side_by_side_on_a_wide_terminal(capsys, monkeypatch):
    out = run(capsys, monkeypatch, "rmsnorm", 140)
    cuda, triton = twins.pair("rmsnorm")
    for title in cuda.titles:
        assert title in out
    assert any("CUDA: " in line and "Triton: " in line for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 140


def test_one_below_the_other_on_a_narrow_terminal(capsys, monkeypatch):
    out = run(capsys, monkeypatch, "rmsnorm", 80)
    assert "CUDA: " in out and "Triton: " in out
    assert not any("CUDA: " in line and "Triton: " in line for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 80


def test_bytes_come_from_the_contract():
    import torch

    from lab.ops import find
    contract = find("silu_mul")
    sizes = contract.cases[0].sizes
    x = torch.empty(sizes["rows"], 2 * sizes["cols"], dtype=torch.bfloat16)
    facts = dict(explain.bytes_of("silu_mul"))
    assert f"{contract.nbytes(x):,} must cross DRAM" in facts["bytes"]


def test_last_measured_figures(tmp_path):
    rows = synthetic_records.make(models=["llama-3.2-1b"], batches=(1, 4), contexts=(1024,))
    synthetic_records.write(tmp_path / "card", rows)
    synthetic_records.write(tmp_path / "laptop", synthetic_records.make("cpu", emulated=True))
    found = explain.measured("linear", tmp_path)
    assert [where for where, _ in found] == ["Synthetic GPU (not measured), run 20250101T120000-synt"] * 4
    assert re.match(r"CUDA: [\d.]+ us, \d+% of the ceiling \(linear lm_head, batch 1, bf16, cold cache, n 60\)",
                    found[0][1])
    assert explain.measured("no_such_op", tmp_path) == []


def test_unreadable_records_are_said_not_raised(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    assert explain.measured("linear", tmp_path)[0][1].startswith("not shown: ")


def test_html(tmp_path, capsys):
    page = tmp_path / "new" / "rope.html"
    assert explain.main(arguments("rope", html=str(page))) == 0
    text = page.read_text()
    assert "rope in CUDA and in Triton" in text and "cuda_src/rope.cu" in text
    assert re.search(r"https?://", text) is None
    assert list(page.parent.iterdir()) == [page]


def test_unknown_op():
    with pytest.raises(LabError, match="unknown op 'rmsnrom': did you mean rmsnorm"):
        explain.main(arguments("rmsnrom"))
