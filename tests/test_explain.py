"""lab explain: in the terminal and as a page."""

import re
from types import SimpleNamespace

import pytest
import synthetic_records

from lab import rungs
from lab.errors import LabError
from lab.learn import explain, unfold
from lab.records import schema
from lab.report import twins


def arguments(op, **options):
    return SimpleNamespace(
        **{
            "op": op,
            "rungs": False,
            "step": None,
            "unfold": "none",
            "compiled": False,
            "glossary": None,
            "html": None,
            "reports": "no such folder",
            **options,
        }
    )


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


def test_side_by_side_from_100_columns_on(capsys, monkeypatch):
    for columns, beside in ((100, True), (99, False)):
        out = run(capsys, monkeypatch, "silu_mul", columns)
        assert any("CUDA: " in line and "Triton: " in line for line in out.splitlines()) is beside


def test_the_loop_of_a_helper_is_unfolded_with_file_and_line(capsys, monkeypatch):
    out = run(capsys, monkeypatch, "linear", 240, step=2, unfold="all")
    lines = (twins.ROOT / "cuda_src/core/stream_rows.cuh").read_text().splitlines()
    shown = re.findall(r"cuda_src/core/stream_rows\.cuh:(\d+) RowStream::multiply", out)
    assert len(shown) == 1 and " void multiply(float (&acc)" in lines[int(shown[0]) - 1]
    assert "1. Locate" not in out and "RowStream::multiply" not in run(
        capsys, monkeypatch, "linear", 240, step=2
    )


def unfolded(twin, chunk, which="all"):
    """The helpers of a chunk."""
    pieces = unfold.pieces(twin.language, twin.name, chunk.first, len(chunk.lines), which)
    return [piece.helper for piece in pieces if piece.helper]


def test_each_unfolded_helper_is_the_one_that_is_called():
    for op, language in [(op, n) for op in twins.known_ops() for n in (0, 1)]:
        twin = twins.pair(op)[language]
        for chunk in (c for step in twin.steps.values() for c in step.chunks):
            for helper in unfolded(twin, chunk):
                source = (twins.ROOT / helper.file).read_text().splitlines()
                name = helper.name.split("::")[-1]
                assert f"{name}(" in "".join(source[helper.first - 1 : helper.first + 1])
                opened, closed = helper.code.count("{"), helper.code.count("}")
                assert language or opened == closed, f"{helper.name} is cut off"
    twin, _ = twins.pair("linear")
    packed = [c for step in twin.steps.values() for c in step.chunks if c.kernel == "linear_packed_kernel"]
    found = [helper for chunk in packed for helper in unfolded(twin, chunk)]
    assert packed and not [h.name for h in found if h.name.startswith("MmaRows")]  # another kernel's type


def test_a_step_that_is_not_there_is_one_line(capsys, monkeypatch):
    with pytest.raises(LabError, match="has the steps 1 to 4"):
        run(capsys, monkeypatch, "rmsnorm", 140, step=9)
    with pytest.raises(LabError, match="not about --html"):
        run(capsys, monkeypatch, "rmsnorm", 140, unfold="all", html="page.html")


def test_bytes_come_from_the_contract():
    import torch

    from lab.ops import find

    contract = find("silu_mul")
    sizes = contract.cases[0].sizes
    x = torch.empty(sizes["rows"], 2 * sizes["cols"], dtype=torch.bfloat16)
    facts = dict(explain.bytes_of("silu_mul")[0])
    assert f"{contract.nbytes(contract.bound(x)):,} must cross DRAM" in facts["bytes"]


def test_last_measured_figures(tmp_path):
    rows = synthetic_records.make(models=["llama-3.2-1b"], batches=(1, 4), contexts=(1024,))
    synthetic_records.write(tmp_path / "card", rows)
    synthetic_records.write(tmp_path / "laptop", synthetic_records.make("cpu", emulated=True))
    found, size = explain.measured("linear", tmp_path)
    assert [where for where, _ in found] == ["size", "bytes", "arithmetic"] + [
        "Synthetic GPU (not measured), run 20250101T120000-synt"
    ] * 4
    assert re.match(r"CUDA: [\d.]+ us, \d+% of the ceiling \(cold cache, n 60\)", found[3][1])
    assert size[0]["batch"] == 1 and size[1] == "bf16"  # what Triton's compiler is asked for
    assert explain.measured("no_such_op", tmp_path) == ([], None)


def test_unreadable_records_are_said_not_raised(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    assert explain.measured("linear", tmp_path)[0][0][1].startswith("not shown: ")


def test_html(tmp_path, capsys):
    page = tmp_path / "new" / "rope.html"
    assert explain.main(arguments("rope", html=str(page))) == 0
    text = page.read_text()
    assert "rope in CUDA and in Triton" in text and "cuda_src/rope.cu" in text
    assert re.search(r"https?://", text) is None
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize("name", rungs.NAMES)
def test_rungs_side_by_side_with_why_one_is_absent(capsys, monkeypatch, name):
    out = run(capsys, monkeypatch, name, 140, rungs=True)
    flat = " ".join(out.split())
    assert "measured: not yet" in flat
    for rung in rungs.rungs(name):
        assert (
            f"{rung.title} ─" in out
            and f"changes: {rung.idea}" in flat
            and f"should gain: {rung.gain}" in flat
        )
    absent = sum(len(rung.absent) for rung in rungs.rungs(name))
    assert flat.count("No such rung in Triton: ") == absent and (absent > 0 or name == "quantised_linear")
    op = rungs.ladder_of(name).op
    assert f"The op itself: cuda_src/{op}.cu." in flat and f"The op itself: triton_kernels/{op}.py." in flat
    assert max(map(len, out.splitlines())) <= 140


def test_what_a_rung_was_measured_to_gain(tmp_path):
    """A run with a GPU's figures made up for the purpose."""

    def row(number, us):
        return schema.OpRow(
            "r",
            "rmsnorm",
            "cuda",
            "bf16",
            64,
            {"cols": 8192},
            us=us,
            us_p10=us,
            us_p90=us,
            n=9,
            bytes=1 << 21,
            rung=number,
            gbps=1.0,
            of_ceiling=2.0 / us,
        )

    synthetic_records.write(
        tmp_path, [schema.Env("r", "before", "cuda", gpu="made up"), row(1, 80.0), row(2, 4.0)]
    )
    _, _, rows = twins.ladder("rmsnorm")
    assert explain.measured_rungs("rmsnorm", rows, tmp_path) == [
        ("measured", "made up, run r: cols=8192, batch 64, bf16, cold cache")
    ]
    said = [dict(row.intro)["measured"] for row in rows]
    assert said[:3] == [
        "CUDA 80.0 us, 2% of the ceiling",
        "CUDA 4.0 us, 50% of the ceiling, 20.00 times as fast as rung 1",
        "not in that run",
    ]


def test_rungs_as_a_page(tmp_path):
    page = tmp_path / "ladder.html"
    assert explain.main(arguments("linear", rungs=True, html=str(page))) == 0
    text = page.read_text()
    assert "The ladder of linear in CUDA and in Triton" in text and "triton_kernels/ladder/linear.py" in text
    assert text.count("No such rung in Triton: ") == sum(len(rung.absent) for rung in rungs.rungs("linear"))
    assert "The code is that of 7. Split-K, below." in text


def test_an_op_without_a_ladder():
    with pytest.raises(LabError, match="rope has no ladder: choose from linear, quantised_linear, rmsnorm"):
        explain.main(arguments("rope", rungs=True))


def test_unknown_op():
    with pytest.raises(LabError, match="unknown op 'rmsnrom': did you mean rmsnorm"):
        explain.main(arguments("rmsnrom"))
    with pytest.raises(LabError, match="unknown op 'int5': did you mean int8.* weight format: .*mxfp4"):
        explain.main(arguments("int5"))


@pytest.mark.parametrize("name", ("int4", "int4-g128"))
def test_a_weight_format_side_by_side(capsys, monkeypatch, name):
    out = run(capsys, monkeypatch, name, 140, reports=None)
    for title in twins.pair("formats/int4")[0].titles:
        assert f"{title} ─" in out
    assert any("CUDA: " in line and "Triton: " in line for line in out.splitlines())
    assert "subtract_pair<T>(" in out and "if T == tl.bfloat16:" in out
    # 32 bits of scale and minimum for 32 codes of 4 bits, 16 bits of scale for 128.
    assert "int4-g32-min: 5 bits a weight; " in out and "int4-g128: 4.125 bits a weight; " in out


def test_every_weight_format_as_a_page(tmp_path, capsys):
    for name in twins.known_formats():
        page = tmp_path / f"{name}.html"
        assert explain.main(arguments(name, reports=None, html=str(page))) == 0
        text = page.read_text()
        assert f"{name} in CUDA and in Triton" in text
        assert f"cuda_src/formats/{name}.cuh" in text and f"triton_kernels/formats/{name}.py" in text


def test_what_a_weight_format_has_not():
    with pytest.raises(LabError, match="unknown weight format 'int4-g64': choose from int4-g32, "):
        explain.main(arguments("int4-g64", reports=None))
    with pytest.raises(LabError, match="--rungs is about ops, and fp8 is a weight format"):
        explain.main(arguments("fp8", reports=None, rungs=True))
    with pytest.raises(LabError, match="--reports is about ops, and fp8 is a weight format"):
        explain.main(arguments("fp8", reports="reports"))


def test_the_table_of_ops_ends_with_the_weight_formats(capsys):
    from lab.formats import FORMATS
    from lab.ops import table

    assert table.main(SimpleNamespace(json=False)) == 0
    shown = dict(re.findall(r"^(\S+) +([\d.]+) bits a weight  \w", capsys.readouterr().out, re.M))
    assert list(shown) == list(FORMATS)
    for name, f in FORMATS.items():
        rows, k = 8, 1 << 16  # so many columns that the scale of a row does not count
        assert float(shown[name]) == pytest.approx(8 * f.bytes_of(rows, k) / (rows * k), rel=1e-3)
