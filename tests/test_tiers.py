"""tests/tiers.py names tests that there are."""

import ast
import re
from pathlib import Path

import pytest
import tiers

FUNCTIONS = [
    f"{path.stem}::{node.name}"
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
]


@pytest.mark.parametrize("pattern", [*tiers.SLOW, *tiers.NOT_QUICK])
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
