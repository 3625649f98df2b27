"""A kernel whose settings nobody raced is called untuned wherever its time stands; explain shows one size."""

import re

import pytest
import synthetic_records as synthetic
from test_bad_records import op_row

from lab import cli
from lab.harness import untuned
from lab.judge import results
from lab.records.schema import Env, Fairness, LedgerRow, ModelRow, OpRow, Writer
from lab.report import fairness, heatmaps, load, model_figures, op_figures, ops, verdict
from lab.tune import tuned


def card(backend, tried, op="decode_attention", **fields):
    return Fairness(
        "r", op, backend, "bf16", "sm_90a", {"batch": 1}, f"{backend}_kernel", tried=tried, **fields
    )


def rows(**config):
    """Two languages' decode_attention: CUDA's was raced, of Triton's the cards and `config` tell."""
    given = dict(
        op="decode_attention", shape={"q_heads": 8}, bytes=1 << 20, flops=1 << 20, gbps=100.0, of_ceiling=0.5
    )
    return [
        op_row(10.0, backend="cuda", **given, config={"tuned": True} if config else {}),
        op_row(20.0, backend="triton", **given, config=config),
    ]


def run_of(folder, *lines):
    with Writer(folder) as out:
        out.append(Env("r", "before", "cuda", gpu="H100"), *lines)
    return load.load(folder)[0]


@pytest.mark.parametrize(
    "config, cards, said",
    [
        ({}, [card("cuda", 54), card("triton", 0)], True),
        ({}, [card("cuda", 54), card("triton", 9)], False),
        ({}, [], False),
        ({"tuned": False}, [], True),
        ({"tuned": False}, [card("triton", 9)], True),
        ({"tuned": True}, [card("triton", 0)], False),
    ],
)
def test_untuned_is_read_from_the_row_and_else_from_the_cards(tmp_path, undrawn, config, cards, said):
    run = run_of(tmp_path, *rows(**config), *cards)
    f = ops.focus(run)
    made = [
        op_figures.utilisation(run, f),
        heatmaps.crossover(run, f),
        heatmaps.winners(run, f, "decode_attention"),
        op_figures.against(run, f, "decode_attention"),
    ]
    for figure in made:
        words = figure.conditions + figure.table.to_string()
        assert ("untuned" in figure.conditions) == ("untuned" in figure.table.to_string()) == said, words
    assert ("in 1 one side is untuned" in made[0].reading) == said
    assert any(n.text.startswith("Untuned: triton decode_attention:") for n in run.notices) == said
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (
        "untuned: Triton decode_attention" in (tmp_path / "README.md").read_text()
        or "one side is untuned" in (tmp_path / "README.md").read_text()
    ) == said


def test_an_op_with_nothing_to_choose_is_not_called_untuned():
    assert untuned.by_cards([card("triton", 0, "rope"), card("triton", 0), card("cuda", None)]) == {
        ("triton", "decode_attention")
    }
    shape = {"q_heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 16}
    entries = tuned.read(tuned.path_of("cuda", "sm_90"))
    assert untuned.raced("cuda", "decode_attention", 1, 2, shape, entries) is True
    assert untuned.raced("cuda", "decode_attention", 1, 2, shape | {"head_dim": 65}, entries) is False
    assert untuned.raced("cuda", "decode_attention", 1, 4, shape, entries) is None  # float32: one kernel
    assert untuned.raced("torch", "linear", 1, 2, {"n": 8, "k": 8}, []) is None
    assert untuned.raced("cuda", "rope", 1, 2, {}, []) is None


def test_tokens_of_a_plan_with_an_untuned_op_say_which(tmp_path):
    base = dict(run="r", model="m", backend="triton", plan="basic", dtype="bf16", batch=1, context=64)
    run = run_of(
        tmp_path,
        *rows(),
        card("triton", 0),
        LedgerRow(**base, row="kernel", op="decode_attention", us=5.0),
        LedgerRow(**base, row="total", us=9.0),
        ModelRow(**base, mode="graph", us=9.0),
        ModelRow(**(base | {"plan": "fused"}), mode="graph", us=9.5),
    )
    assert run.model.set_index("plan")["tuning"].to_dict() == {
        "basic": "untuned: decode_attention",
        "fused": "",
    }
    assert "untuned: Triton decode_attention" in model_figures.latency(run, "m").conditions
    assert any("(untuned: decode_attention)" in detail for _, _, detail in verdict.cards(run, "m"))
    assert "the best Triton (basic, untuned: decode_attention)" in verdict.sentences(run, ops.focus(run))[0]


def test_compile_times_of_a_file_and_of_a_kernel_stand_in_rows_of_their_own(tmp_path):
    run = run_of(tmp_path, card("cuda", 54, compile_s=20.6), card("triton", 0, compile_s=1.27))
    _, frame = fairness.card(run.fairness)
    shown = {row[0]: row[1:] for row in frame.itertuples(index=False, name=None)}
    assert [v for k, v in shown.items() if "(s)" in k] == [("20.60", "–"), ("–", "1.270")]
    assert shown["settings the tuner raced"] == ("54", "0 (untuned)")


def test_explain_shows_bytes_and_times_of_one_size_from_any_folder(tmp_path, monkeypatch, capsys):
    from lab.learn import explain
    from lab.ops import find

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["explain", "decode_attention"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"NVIDIA H100 [^:]*: Triton(, untuned)?: [\d.]+ us", said) and "example:" not in said
    run_of(tmp_path / "untuned", *rows(tuned=False))
    told = [text for _, text in explain.measured("decode_attention", tmp_path / "untuned")[0]]
    assert any(text.startswith("Triton, untuned: 20.0 us") for text in told), told
    assert any(text.startswith("CUDA: 10.0 us") for text in told), told
    made = synthetic.make(models=["llama-3.2-1b"], batches=(1, 4), contexts=(1024,))
    synthetic.write(tmp_path / "made", made)
    facts = dict(explain.measured("linear", tmp_path / "made")[0][:3])
    assert "n=128256 k=2048, batch 1, bf16" in facts["size"]
    contract = find("linear")
    import torch

    x, w = torch.empty(1, 2048, dtype=torch.bfloat16), torch.empty(128256, 2048, dtype=torch.bfloat16)
    assert f"{contract.nbytes(contract.bound(x, w)):,} must cross DRAM" in facts["bytes"]


def shape_rows(tuned_of_triton, us=20.0, run="r"):
    given = dict(
        op="decode_attention",
        shape={"q_heads": 8},
        batch=1,
        context=1024,
        models=["llama-3.2-1b"],
        dtype="bf16",
        us_p10=us,
        us_p90=us,
        n=60,
    )
    return [
        OpRow(run, backend="cuda", us=us / 2, **given, config={"tuned": True}),
        OpRow(
            run,
            backend="triton",
            us=us,
            **given,
            config={"tuned": tuned_of_triton},
            verdict={"cuda": "slower"},
        ),
    ]


@pytest.mark.parametrize("config, said", [(True, "triton 640.0"), (False, "triton 640.0 (untuned)")])
def test_crossover_marks_the_untuned_side(tmp_path, capsys, config, said):
    run_of(tmp_path, *shape_rows(config, us=40.0))
    assert cli.main(["bench", "crossover", "llama-3.2-1b", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(said)


def test_compare_marks_the_side_that_was_untuned(tmp_path, capsys):
    for name, config, us in (("a", False, 20.0), ("b", True, 10.0), ("c", False, 40.0)):
        run_of(tmp_path / name, *shape_rows(config, us))
    for other, said in (("b", "(A untuned)"), ("c", "(untuned)")):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / other)])
        lines = capsys.readouterr().out.splitlines()
        assert [line.endswith(said) for line in lines if " triton " in line] == [True]
        assert not any("untuned" in line for line in lines if " cuda " in line)


def test_try_says_that_a_rival_is_untuned():
    cuda, triton = shape_rows(False)
    own = OpRow(
        "r",
        "decode_attention",
        "mine",
        "bf16",
        1,
        {"q_heads": 8},
        context=1024,
        us=5.0,
        verdict={"cuda": "faster", "triton": "faster"},
    )
    (line,) = results.verdicts([cuda, triton, own], "mine")
    assert line.endswith("faster than cuda, faster than triton (untuned)")
    (line,) = results.verdicts([*shape_rows(True), own], "mine")
    assert "untuned" not in line
