"""What a verb asks another one to do is a typed request, and a module's private names are its own."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from lab import cli
from lab.errors import LabError
from lab.harness import bench
from lab.harness.request import Request, settings_of
from lab.learn import own_kernel
from lab.machine import demo
from lab.ops import find

LAB = Path(__file__).resolve().parent.parent / "lab"


def modules():
    for path in sorted(LAB.rglob("*.py")):
        yield path.relative_to(LAB.parent), ast.parse(path.read_text())


def test_nobody_reaches_into_another_modules_private_names():
    """An attribute _x is one that the same file defines; nor is a _x imported, but for the compiled
    extensions."""
    found = []
    for path, tree in modules():
        nodes = list(ast.walk(tree))
        own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lab"):
                names = [alias.name for alias in node.names if alias.name not in ("_cuda", "_host")]
            elif isinstance(node, ast.Attribute) and node.attr not in own and not nameless(node):
                names = [node.attr]
            else:
                continue
            private = [n for n in names if n.startswith("_") and not n.endswith("__")]
            found += [f"{path}:{node.lineno} {n}" for n in private]
    assert not found


def nameless(node):
    """Has no public name: torch.cuda._sleep, torch._dynamo.reset; os._exit and matplotlib's _ncols."""
    while isinstance(node, ast.Attribute):
        if node.attr in ("_exit", "_ncols"):
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


def test_no_verb_writes_a_command_line_for_another():
    """A list of words for lab.cli is what a user types, not what modules say to each other."""
    callers = [
        path
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr == "main" and getattr(node.func.value, "id", "") in ("cli", "bench", "build"))
    ]
    assert not callers


def test_the_command_line_fills_the_request(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda request: asked.append(request) or 0)
    monkeypatch.setattr(bench, "show", lambda out, what: None)
    words = (
        "bench ops linear rope --model smollm2-135m --dtype fp32,bf16 --batch 1,8 --context 16 --seconds 0.5"
    )
    assert cli.main([*words.split(), "--device", "cpu", "--out", "there", "--no-vendor", "--fresh"]) == 0
    assert (
        cli.main("bench model llama-3.2-1b --plan basic,fused --weights auto --no-compile --quick".split())
        == 0
    )
    assert asked == [
        Request(
            "ops",
            "there",
            ops=("linear", "rope"),
            models=("smollm2-135m",),
            device="cpu",
            dtypes=("fp32", "bf16"),
            batches=(1, 8),
            contexts=(16,),
            seconds=0.5,
            vendor=False,
            fresh=True,
        ),
        Request(
            "model",
            models=("llama-3.2-1b",),
            plans=("basic", "fused"),
            weights="auto",
            compile=False,
            quick=True,
        ),
    ]


def test_settings_are_recorded_as_json_and_read_back_equal():
    """A stopped run goes on where the settings that its file holds are those that are asked for now."""
    settings = settings_of(Request("ops", device="cpu", ops=("linear",), batches=(1, 2)))
    recorded = settings.recorded()
    assert json.loads(json.dumps(recorded)) == recorded
    assert recorded["ops"] == ["linear"] and recorded["batches"] == [1, 2] and recorded["quick"] is False
    assert list(recorded) == [f.name for f in dataclasses.fields(settings)]


def test_a_list_of_nothing_is_one_line(capsys):
    for option in ("--model", "--backend", "--dtype", "--plan", "--batch"):
        assert cli.main(["bench", "ops", "--device", "cpu", option, ","]) == 2
        assert "write" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--batch", "--context"])
def test_a_race_that_cannot_be_asked_for_is_said_before_the_file_is_tried(option, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("1 / 0")
    assert cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu", option, ","]) == 2
    assert "write" in capsys.readouterr().err


def test_own_kernel_and_demo_ask_for_what_they_did_by_words(tmp_path, monkeypatch):
    """The words are those that both wrote for `lab bench` before."""
    asked = []
    monkeypatch.setattr(bench, "measure", lambda request, own=None: asked.append(request) or 3)
    assert demo.report("there") == 3
    args = cli.parse(["try", str(tmp_path / "mine.cu"), "--op", "linear"], "try")
    assert own_kernel.race("mine.cu", None, own_kernel.race_of(find("linear"), args, ["bf16", "fp16"])) == 3
    words = (
        f"all --quick --model {demo.MODEL} --weights auto --fresh --out there",
        "ops linear --out out/try/mine --model llama-3.2-1b --batch 1,16 --context 1024,8192 "
        "--dtype bf16,fp16 --fresh",
    )
    assert asked == [bench.request_of(cli.parse(["bench", *line.split()], "bench")) for line in words]


def test_a_request_is_checked_like_the_words(monkeypatch):
    with pytest.raises(LabError, match="unknown dtype"):
        settings_of(Request("ops", device="cpu", dtypes=("fp8",)))
    with pytest.raises(LabError, match="whole step"):
        settings_of(Request("ops", device="cpu", ops=("decode_step",)))
