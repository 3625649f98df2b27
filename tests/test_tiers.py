"""tests/tiers.py names tests that there are."""

import ast
import re
from pathlib import Path

import pytest
import tiers

from lab.formats import kv
from lab.ops import decode_step

FUNCTIONS = [
    f"{path.stem}::{node.name}"
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
]


@pytest.mark.parametrize("pattern", [*tiers.SLOW, *tiers.SLOW_ON_A_CPU, *tiers.NOT_QUICK])
def test_a_pattern_is_of_a_test(pattern):
    """Of a pattern with parameters, what stands before them."""
    before = re.compile(re.split(r"\.\*|\\\[", pattern)[0])
    assert any(map(before.search, FUNCTIONS))


@pytest.mark.parametrize(
    "name, tier",
    [
        ("test_ops::test_meets_its_contract[rope-bf16-0-cuda]", "quick"),
        ("test_ops::test_meets_its_contract[rope-bf16-0-gpu_shapes]", "default"),
        ("test_ops::test_meets_its_contract[rope-fp16-2-cuda]", "slow"),
        ("test_ops::test_meets_its_contract[rope-fp16-12-cuda]", "slow"),
        ("test_model::test_no_such_name", "default"),
        ("test_add_an_op::test_contributing_adds_an_op", "slow"),
    ],
)
def test_tiers(name, tier):
    assert tiers.tier(name) == tier


def test_on_a_gpu_float16_is_no_repetition():
    assert tiers.tier("test_ops::test_meets_its_contract[rope-fp16-12-cuda]", gpu=True) == "quick"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_make_test_has_decode_steps_of_every_kind(backend):
    """Its cases are left out by number: those that stay must hold each of these."""
    stay = [
        case
        for i, case in enumerate(decode_step.op.cases)
        if tiers.tier(f"test_ops::test_meets_its_contract[decode_step-bf16-{i}-{backend}]") != "slow"
    ]
    live = [case.sizes for case in stay if case.sizes.get("position", 0) >= 0]
    assert {sizes.get("kv_dtype") for sizes in live} == {None, *kv.DTYPES}
    assert any(sizes.get("format") for sizes in live) and any(sizes.get("ranks") for sizes in live)
    assert max(max(sizes["hidden"], sizes["intermediate"]) for sizes in live) > 2048  # more than a tile
