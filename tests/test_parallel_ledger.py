"""The account of a token of several GPUs: on the terminal, in the picture, and what is refused.
tests/test_ranks.py measures one."""

from xml.etree import ElementTree

import pytest
import synthetic_records as synthetic
from commands import lab

from lab.harness import ledger_verb
from lab.records.schema import Env, LedgerRow
from lab.report import figures, ledger_figures, load

BASE = dict(run="r", model="m", backend="cuda", plan="fused", dtype="bf16", batch=1, context=1024, ranks=2)
OPS = dict(norm_linear=30.0, rope_append_attention=20.0, linear=25.0, norm_linear_silu_mul=40.0)
OPS |= dict(norm_linear_argmax=9.0, embedding=2.0, all_reduce_add=1.5, all_argmax=0.5)


def rows():
    for order, (op, us) in enumerate(OPS.items()):
        yield LedgerRow(**BASE, row="chain", order=order, op=op, us=us, of_token=us / 128, calls=1)
    yield LedgerRow(**BASE, row="total", order=9, us=128.0, us_p10=127.0, us_p90=129.0, n=5, of_token=1.0)


def test_the_exchange_is_a_part_of_the_picture_however_small_it_is(tmp_path):
    synthetic.write(tmp_path, [Env("r", "before", "cuda"), *rows()])
    (run,) = load.load(tmp_path)
    figure = ledger_figures.token(run, "m", "fused")
    assert "--tensor-parallel 2" in figure.command and figure.command.startswith("lab ledger m ")
    assert set(figure.table.iloc[:, 0]) == {"CUDA fused on 2 GPUs, chains"}
    said = "".join(ElementTree.tostring(figures.drawn(figure), "unicode"))
    for name, is_there in (("all_reduce_add", True), ("all_argmax", True), ("norm_linear_argmax", False)):
        assert (f">{name}<" in said) == is_there, name


def test_the_terminal_says_how_many_ranks_there_were():
    said = ledger_verb.text_of(list(rows()))
    assert "m cuda fused bf16 on 2 ranks batch 1 context 1024" in said and "all_reduce_add" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["smollm2-135m", "--tensor-parallel", 0], "it must be at least 1"),
        (["smollm2-135m", "--tensor-parallel", 3, "--swap"], "--swap does not go with --tensor-parallel"),
        (["smollm2-135m", "--tensor-parallel", 2], "9 query heads do not divide over 2 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, message, tmp_path):
    done = lab("ledger", *words, "--out", tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
