"""Columns of a terminal are as wide as what stands in them."""

from lab.harness import ledger_verb
from lab.records.schema import LedgerRow
from lab.text import columns


def test_columns_do_not_shift_at_long_names():
    assert columns(
        [("op", "us"), ("norm_linear_silu_mul", "5.0"), ("x", "123456.0")], right=(1,), indent="  "
    ) == [
        "  op                          us",
        "  norm_linear_silu_mul       5.0",
        "  x                     123456.0",
    ]
    assert columns([]) == []


def test_a_ledger_does_not_shift():
    base = dict(run="r", model="m", backend="cuda", plan="basic", dtype="bf16", batch=1, context=64)
    lines = ledger_verb.text_of(
        [
            LedgerRow(**base, row="kernel", op="rope_append_attention", kernel="k" * 50, us=5.0, calls=3),
            LedgerRow(**base, row="total", us=123456789.0, of_token=1.0),
        ]
    ).splitlines()
    head = next(line for line in lines if line.startswith("  op"))
    assert all(len(line) <= len(head) for line in lines if line.startswith("  ")) and lines[-1].endswith(
        "100.0%"
    )
