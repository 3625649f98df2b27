"""What `lab bench` and `lab bench crossover` print of the records of a run."""

import json
import re

import pytest
import synthetic_records

from lab import cli
from lab.harness import printed
from lab.records import compare, schema
from lab.records.schema import ModelRow, OpRow


def op(backend, us, **other):
    given = dict(batch=1, shape={"n": 6144, "k": 4096}, role="qkv", models=["llama-3.1-8b"], of_ceiling=0.9)
    return OpRow(
        "r", "linear", backend, "bf16", us=us, us_p10=us * 0.99, us_p90=us * 1.01, n=20, **(given | other)
    )


def step(backend, plan, us, **other):
    given = dict(mode="graph", dtype="bf16", batch=4, context=1024)
    return ModelRow(
        "r", "llama-3.1-8b", backend, plan, us=us, us_p10=us * 0.99, us_p90=us * 1.01, n=20, **(given | other)
    )


def line_with(text, *words):
    (found,) = (line for line in text.splitlines() if all(word in line for word in words))
    return re.split(r"  +", found.strip())


def test_a_line_of_an_op_has_both_languages_the_best_peer_and_a_verdict():
    rows = [op("cuda", 17.0), op("triton", 20.0, of_ceiling=0.8), op("torch", 30.0), op("cublas", 25.0)]
    rows.append(op("cuda", 9.0, cache="warm"))  # of these, cold ones are shown
    text = printed.text_of(rows, "out/x y")
    cells = line_with(text, "linear qkv")
    assert cells == ["linear qkv", "b1 n=6144 k=4096", "17.0", "20.0", "25.0", "cublas", "90%", "faster"]
    assert "next: lab report 'out/x y'" in text and "lab bench crossover --out 'out/x y'" in text
    assert "crossover" not in printed.text_of(rows[:1], "x"), "one language has no other to choose"


def test_a_line_of_a_model_has_its_rate_and_spread():
    text = printed.text_of([step("cuda", "fused", 8000.0), step("cuda", "basic", 9000.0, mode="eager")], "x")
    cells = line_with(text, "cuda", "fused")
    assert cells[7:10] == ["8.000", "500.0", "495.0 to 505.1"]
    assert text.index("graph") < text.index("eager")


def test_rungs_are_compared_with_the_rung_below_of_the_same_language():
    rows = [op("cuda", us, rung=n, config={"name": f"R{n}"}) for n, us in ((1, 100.0), (2, 50.0), (4, 40.0))]
    rows += [op("triton", us, rung=n, config={"name": f"R{n}"}) for n, us in ((1, 90.0), (4, 45.0))]
    text = printed.text_of(rows, "x")
    assert line_with(text, "R4") == ["4", "R4", "40.0", "90%", "1.25", "45.0", "90%", "2.00"]
    assert "linear qkv" not in text


def test_long_tables_are_cut_and_say_so():
    rows = [op("cuda", 17.0, batch=n) for n in range(1, printed.LINES + 4)]
    text = printed.text_of(rows, "x")
    assert "... and 3 more lines" in text and text.count("linear qkv") == printed.LINES


@pytest.mark.parametrize("emulated", (False, True))
def test_a_whole_synthetic_run_is_printed(emulated):
    rows = synthetic_records.make("r", emulated=emulated)
    text = printed.text_of(rows, "x")
    assert "decode steps" in text and "ops in " in text
    assert ("nothing about a GPU" in text) is emulated


def test_crossover_names_the_fastest_whole_token_and_how_to_use_its_table(tmp_path, capsys):
    rows = [op("cuda", 17.0), op("triton", 20.0)]
    rows += [step("triton", "fused", 5300.0), step("cuda", "basic", 5600.0)]
    rows.append(step("cuda", "persistent", 5000.0))
    rows.append(step("cuda", "fused", 4000.0, overrides={"linear": "triton"}))  # a mix is no backend's token
    with schema.Writer(tmp_path) as writer:
        writer.append(schema.Env("r", "before", "cuda"), *rows)
    table = tmp_path / "table.json"
    asked = ["bench", "crossover", "llama-3.1-8b", "--out", str(tmp_path), "--export", str(table)]
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    assert line_with(out, "1024", "ms")[2:] == ["cuda persistent 5.000 ms", "triton fused 5.300 ms"]
    assert f"--dispatch {table}" in out
    assert json.loads(table.read_text())["linear"][0]["backend"] == "cuda"
    assert compare.open_run(tmp_path).rows


def test_crossover_of_a_run_without_ops_says_so(tmp_path, capsys):
    with schema.Writer(tmp_path) as writer:
        writer.append(schema.Env("r", "before", "cuda"), step("cuda", "fused", 5300.0))
    for more in ((), ("--export", str(tmp_path / "table.json"))):
        assert cli.main(["bench", "crossover", "--out", str(tmp_path), *more]) == 2
        assert "has no op records of a model: run `lab bench ops` first" in capsys.readouterr().err


def test_crossover_refuses_what_it_would_not_read(capsys):
    for words, said in (
        (["crossover", "--batch", "1"], "it takes MODEL, --out, --dtype and --export, not --batch"),
        (["crossover", "--weight-format", "fp8"], "not --weight-format"),
        (["crossover", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["ops", "--export", "table.json"], "--export is of `lab bench crossover`"),
    ):
        assert cli.main(["bench", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
