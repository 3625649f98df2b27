"""Launch arguments have names: in C++ a struct for each op, filled by name from Python; in Triton
keywords."""

import ast
import inspect
import re
import statistics
import time
import timeit
from pathlib import Path

import pytest
import torch

from lab.ops import OPS

_host = pytest.importorskip("lab._host")
ROOT = Path(__file__).resolve().parent.parent
HEADERS = [*sorted((ROOT / "cuda_src/launchers").glob("*.h")), ROOT / "cuda_src/ladder/launchers.h"]
DECLARATION = re.compile(r"^void (\w+)\(([^)]*)\);", re.M)
MOST = 8  # arguments that a reader can tell apart by their place
FLOAT32 = 0  # DType in launchers/arguments.h


def launchers():
    """(name, parameters) of every declaration."""
    return [
        (name, parameters.split(","))
        for path in HEADERS
        for name, parameters in DECLARATION.findall(path.read_text())
    ]


def test_no_launcher_takes_a_row_of_numbers():
    found = launchers()
    assert {name for name, _ in found} >= {op.name for op in OPS}
    assert {name: len(parameters) for name, parameters in found if len(parameters) > MOST} == {}
    structs = re.findall(r"struct (\w+) \{(.*?)\};", "".join(h.read_text() for h in HEADERS), re.S)
    for name, parameters in found:
        assert re.fullmatch(r"const \w+Args& a", parameters[-1].strip()), name
        assert parameters[-1].split()[1].rstrip("&") in dict(structs), name


@pytest.mark.parametrize("name", [name for name, _ in launchers()])
def test_python_sees_the_names(name):
    """What help() shows: all arguments by name, but for the rung of a ladder; at most 15, because of
    more CPython makes a dict."""
    parameters = inspect.signature(getattr(_host, name)).parameters.values()
    named = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in parameters if p.name not in named] == (
        ["rung"] if name.endswith("_ladder") else []
    )
    assert "stream" in named and len(named) <= 15


def silu_mul_arguments():
    gate_up, y = torch.randn(3, 2 * 8), torch.full((3, 8), torch.nan)
    return (
        gate_up,
        y,
        dict(gate_up=gate_up.data_ptr(), y=y.data_ptr(), rows=3, cols=8, dtype=FLOAT32, stream=0),
    )


def test_the_order_of_the_names_is_free():
    gate_up, y, arguments = silu_mul_arguments()
    want = torch.nn.functional.silu(gate_up[:, :8]) * gate_up[:, 8:]
    for names in (list(arguments), list(arguments)[::-1]):
        y.fill_(torch.nan)
        made = {"".join(list(name)): arguments[name] for name in names}  # strings that are not interned
        _host.silu_mul(**made)
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rows": None}, "silu_mul.*rows.*NoneType"),
        ({"rows": 3.0}, "silu_mul.*rows.*float"),
        ({"rows": 1 << 31}, "silu_mul.*rows: 2147483648 does not fit 32 bits"),
        ({"gate_up": -1}, "silu_mul.*gate_up"),
        ({"gate_up": 1 << 64}, "silu_mul.*gate_up"),
        ({"columns": 8}, "silu_mul.*there is no argument 'columns'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(change, said):
    _, y, arguments = silu_mul_arguments()
    with pytest.raises(TypeError, match=said):
        _host.silu_mul(**{**arguments, **change})
    assert y.isnan().all()


@pytest.mark.parametrize("name", silu_mul_arguments()[2])
def test_a_missing_argument_is_refused_by_name(name):
    _, y, arguments = silu_mul_arguments()
    del arguments[name]
    with pytest.raises(TypeError, match=f"silu_mul.*missing argument '{name}'"):
        _host.silu_mul(**arguments)
    assert y.isnan().all()


def test_positions_are_refused():
    _, y, arguments = silu_mul_arguments()
    with pytest.raises(TypeError, match="pass the arguments by name: .*gate_up, y, rows, cols"):
        _host.silu_mul(*arguments.values())
    with pytest.raises(TypeError, match="by name: .*rung"):
        _host.linear_ladder(x=0)
    assert y.isnan().all()


def idle_attention(**change):
    """rope_append_attention's arguments for a batch of 0, of which the launcher returns at once."""
    return {
        **dict(
            q=(0, 8),
            k=(0, 8),
            v=(0, 8),
            norms=(0, 0, 1e-5),
            positions=0,
            cos_sin=0,
            cache=(0, 0, 0, 1, 16, 1, 0, 0, 0),
            out=0,
            splits=(0, 0, 1),
            batch=0,
            q_heads=1,
            head_dim=64,
            scale=0.125,
            dtype=FLOAT32,
            stream=0,
        ),
        **change,
    }


@pytest.mark.parametrize(
    "change, said",
    [
        ({"q": 0}, "q: a tuple of 2 values is needed, not 0"),
        ({"q": (0, 8, 8)}, "q: a tuple of 2 values is needed, not"),
        ({"cache": (0, 0, 0, 1, 16, 1 << 40, 0, 0, 0)}, "cache: 1099511627776 does not fit 32 bits"),
        ({"norms": (0, 0, "small")}, "norms: .*str"),
    ],
)
def test_a_group_that_does_not_fit_is_refused_by_name(change, said):
    _host.rope_append_attention(**idle_attention())
    with pytest.raises(TypeError, match=f"rope_append_attention.*{said}"):
        _host.rope_append_attention(**idle_attention(**change))


def test_what_a_launcher_throws_arrives():
    with pytest.raises(ValueError, match="unknown dtype code 9"):
        _host.silu_mul(**{**silu_mul_arguments()[2], "dtype": 9})
    with pytest.raises(ValueError, match="linear_ladder: no rung 77"):
        _host.linear_ladder(
            77,
            x=0,
            tiled=0,
            w=(0, 0, 0),
            bias=0,
            y=0,
            rows=1,
            n=1,
            k=1,
            dtype=FLOAT32,
            out_dtype=FLOAT32,
            stream=0,
        )


def least_us(call, rounds=100, repeats=200):
    """The least microseconds of a call: the least is what load from elsewhere spares."""
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(rounds):
            call()
        best = min(best, time.thread_time() - began)
    return best / rounds * 1e6


def paced_us():
    """The least microseconds of a fixed piece of Python: the pace of this core just now."""
    return (
        min(
            timeit.repeat(
                "[f(i) for i in range(10)]", "f = abs", number=100, repeat=200, timer=time.thread_time
            )
        )
        / 100
        * 1e6
    )


def test_a_call_with_names_costs_no_more_than_one_with_positions(record_property):
    """27 positional numbers of a pybind11 function took 0.99 us where paced_us() is 0.57 us; the median of
    five ratios."""

    def call():
        _host.rope_append_attention(
            q=(1 << 40, 8),
            k=(1 << 40, 8),
            v=(1 << 40, 8),
            norms=(1 << 40, 1 << 40, 1e-5),
            positions=1 << 40,
            cos_sin=1 << 40,
            cache=(1 << 40, 1 << 40, 1 << 40, 1, 16, 1, 0, 0, 0),
            out=1 << 40,
            splits=(1 << 40, 1 << 40, 1),
            batch=0,
            q_heads=1,
            head_dim=64,
            scale=0.125,
            dtype=FLOAT32,
            stream=0,
        )

    ratios = [least_us(call) / paced_us() for _ in range(5)]
    record_property("ratios", ratios)
    assert statistics.median(ratios) < 0.99 / 0.57, ratios


# ---- Triton ------------------------------------------------------------------------------------------------


def triton_calls():
    """(where, call) of each call of one of our own device functions, from within Triton's kernels."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "triton_kernels").rglob("*.py"))}
    own = {
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in own
    ]


def test_no_call_in_triton_passes_bare_constants_or_a_long_row_of_values():
    calls = triton_calls()
    assert len(calls) > 50
    wrong = [
        where
        for where, call in calls
        if len(call.args) > MOST or any(isinstance(a, ast.Constant) for a in call.args)
    ]
    assert wrong == []
