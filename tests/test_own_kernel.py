"""`lab try`: a copy of a built-in kernel passes in its place, a broken one does not, and nothing else
changes."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lab import cli
from lab.dispatch import select
from lab.judge import kernel_file
from lab.judge.race import RacedFile
from lab.learn import own_kernel
from lab.ops import find
from lab.records import schema
from lab.worker import Worker

SOURCES = {
    ".cu": kernel_file.ROOT / "cuda_src/silu_mul.cu",
    ".py": kernel_file.ROOT / "triton_kernels/silu_mul.py",
}


def own(folder, suffix, old="", new=""):
    """A copy of silu_mul with a change."""
    path = folder / f"mine{suffix}"
    text = SOURCES[suffix].read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.own_process
@pytest.mark.parametrize("suffix", SOURCES)
def test_a_copy_passes_every_case(suffix, tmp_path, capsys):
    assert cli.main(["try", str(own(tmp_path, suffix)), "--op", "silu_mul", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[:-1]] == [
        ["silu_mul", t, f"mine{suffix}"] for t in ("fp32", "fp16", "bf16")
    ]
    assert said[-1].startswith("right in every case; not raced")


@pytest.mark.parametrize(
    "suffix, old, new", [(".cu", "expf(-g)", "expf(g)"), (".py", "tl.exp(-g)", "tl.exp(g)")]
)
def test_a_wrong_kernel_fails_and_the_built_in_ones_stay(suffix, old, new, tmp_path, capsys):
    path = own(tmp_path, suffix, old, new)
    assert cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu", "--dtype", "fp32"]) == 1
    assert "elements are off" in capsys.readouterr().out
    gate_up = torch.randn(2, 64)
    want = find("silu_mul").reference(gate_up)[0].float()
    for backend in ("cuda", "triton"):
        torch.testing.assert_close(select(backend).silu_mul(gate_up), want)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.cu", "int x", "does not compile"),
        ("b.cu", "int x;", "lacks the launcher silu_mul of cuda_src/launchers/silu_mul.h"),
        (
            "row_of_numbers.cu",
            "void silu_mul(unsigned long gate_up, unsigned long y, int rows, int cols, int, unsigned long) "
            "{}",
            "lacks the launcher silu_mul of cuda_src/launchers/silu_mul.h, "
            "void silu_mul(const SiluMulArgs& a)",
        ),
        ("c.py", "x = 1", "has no function silu_mul"),
        ("d.py", "import nothing_like_it", "ModuleNotFoundError"),
        ("e.txt", "", "give a .cu file"),
        ("missing.cu", None, "no such file"),
    ],
)
def test_a_file_that_is_no_kernel(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["try", str(tmp_path / name), "--op", "silu_mul", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lab: error: ") and message in last


def test_compiling_has_the_memory_of_the_option(tmp_path, capsys):
    path = tmp_path / "endless.cu"
    path.write_text('#include "/dev/zero"\n')
    words = ["try", str(path), "--op", "silu_mul", "--device", "cpu", "--memory", "0.25"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"lab: error: {path}: compiling it took more than 0.25 GiB of memory (--memory)\n")
    assert "Traceback" not in said


def test_a_race_is_recorded_and_drawn(undrawn, tmp_path, monkeypatch, capsys):
    """On the CPU, where only the path is worth something: `lab try` itself does not race there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op, path, out = find("silu_mul"), own(tmp_path, ".py"), tmp_path / "out"
    before = sys.modules["triton_kernels.silu_mul"] if "triton_kernels.silu_mul" in sys.modules else None
    args = SimpleNamespace(file=path, out=str(out), model="smollm2-135m", batch="1", context="16")
    request = own_kernel.race_of(op, args, ["fp32"])
    spec = {"module": "lab.judge.child", "file": str(path), "op": op.name, "device": "cpu", "built": None}
    with Worker({**spec, "what": path.name}, 60) as worker:
        assert own_kernel.race(path.name, RacedFile(op, worker), request) == 0
    assert own_kernel.draw(path.name, request.out) == 0
    rows = [r for r in schema.read(out).rows if r.kind == "op"]
    assert {r.backend for r in rows} == {"mine.py", "cuda", "triton", "torch"} and all(r.us > 0 for r in rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("silu_mul"))
    assert " us; " in line and "cuda" in line and "triton" in line
    assert "mine.py" in (out / "index.html").read_text()
    assert before in (None, sys.modules["triton_kernels.silu_mul"])


def tried(path, *words):
    """Exit status of `lab try` on one dtype."""
    return cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu", "--dtype", "fp32", *words])


TUTORIAL = """
import triton
import triton.language as tl

DECORATORS
@triton.jit
def kernel(gate_up, y, n, cols, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    gate = gate_up + i // cols * 2 * cols + i % cols
    g = tl.load(gate, mask=live, other=0.0).to(tl.float32)
    u = tl.load(gate + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(y + i, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=live)

def silu_mul(gate_up, y):
    n = y.numel()
    grid = lambda meta: (triton.cdiv(n, meta["BLOCK"]),)
    kernel[grid](gate_up, y, n, y.shape[1]MORE)
"""
AUTOTUNE = """@triton.autotune(
    [triton.Config({"BLOCK": 256}, num_warps=4), triton.Config({"BLOCK": 64})], key=["n"]
)"""
HEURISTICS = """@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["cols"])})"""


@pytest.mark.parametrize(
    "decorators, more",
    [("", ", BLOCK=128"), (AUTOTUNE, ""), (HEURISTICS, "")],
    ids=["plain", "autotune", "heuristics"],
)
def test_a_file_that_launches_as_the_tutorials_do(decorators, more, tmp_path, capsys):
    path = tmp_path / "tutorial.py"
    path.write_text(TUTORIAL.replace("DECORATORS", decorators).replace("MORE", more))
    assert tried(path) == 0, capsys.readouterr()


def test_a_wrong_file_of_that_kind_fails(tmp_path):
    path = tmp_path / "tutorial.py"
    wrong = TUTORIAL.replace("DECORATORS", AUTOTUNE).replace("MORE", "").replace("1 + tl.exp", "2 + tl.exp")
    path.write_text(wrong)
    assert wrong.count("2 + tl.exp") == 1 and tried(path) == 1


@pytest.mark.parametrize(
    "text, status, message",
    [
        ("import sys; sys.exit(0)", 2, "SystemExit: 0"),
        ("import os; os._exit(0)", 2, "ended with exit status 0 before it was done"),
        (
            "import os\ndef silu_mul(gate_up, y): os._exit(0)",
            1,
            "ended with exit status 0 before it was done",
        ),
        (
            "import os, signal\ndef silu_mul(gate_up, y): os.kill(os.getpid(), signal.SIGSEGV)",
            1,
            "was ended by SIGSEGV",
        ),
        (
            "import lab.check, lab.arena\nlab.check.compare = lab.check.check_case = lambda *a: "
            "lab.check.Outcome(None, 0.0)\n"
            "lab.arena.Arena.damage = lambda *a: None\ndef silu_mul(gate_up, y): y.zero_()",
            1,
            "the file replaced lab.arena.Arena.damage",
        ),
        (  # which makes the contents of a race
            "import lab.ops\nobject.__setattr__(lab.ops.find('silu_mul'), 'inputs', lambda *a: None)\n"
            "def silu_mul(gate_up, y): y.zero_()",
            1,
            "the file replaced silu_mul.inputs",
        ),
        (  # what decides runs in another process
            "from lab.judge import verdict\nverdict.compare = verdict.check_call = lambda *a: None\n"
            "def silu_mul(gate_up, y): y.zero_()",
            1,
            "elements are off",
        ),
        (
            "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{}\\n')\n    except OSError: pass\n"
            "def silu_mul(gate_up, y): y.zero_()",
            2,
            "wrote into the pipe of the check",
        ),
        ("def silu_mul(gate_up, y): raise ValueError('planted')", 1, "ValueError: planted"),
        ("def silu_mul(gate_up): pass", 1, "TypeError"),
        (
            "import triton\n@triton.jit\ndef silu_mul(gate_up, y): pass",
            2,
            "write a function silu_mul(gate_up, y)",
        ),
        (
            "import triton\nD = triton.runtime.driver.active.get_active_torch_device()",
            2,
            "take the device from the tensors",
        ),
    ],
    ids=[
        "sys.exit",
        "_exit",
        "_exit in a call",
        "crash",
        "patched",
        "patched op",
        "patched elsewhere",
        "forged",
        "raises",
        "arguments",
        "jit",
        "driver",
    ],
)
def test_a_file_cannot_pass_by_ending_or_patching(text, status, message, tmp_path, capsys):
    path = tmp_path / "hostile.py"
    path.write_text(text)
    assert tried(path) == status
    said = capsys.readouterr()
    assert message in said.out + said.err and "right in every case" not in said.out
    assert "Traceback" not in said.err


def test_a_cuda_file_that_exits_at_loading(tmp_path, capsys):
    path = own(
        tmp_path,
        ".cu",
        "using namespace lab;",
        "#include <cstdlib>\nstatic struct Quit { Quit() { exit(0); } } quit;\nusing namespace lab;",
    )
    assert tried(path) == 2
    assert "ended with exit status 0 before it was done" in capsys.readouterr().err


def test_cuda_faults_are_failed_cases(tmp_path, capsys):
    """One case crashes, one writes an element past the output; the case before and the judge live on."""
    path = own(
        tmp_path,
        ".cu",
        "  store(y + r * cols + c, out);",
        "  store(y + r * cols + c, out);\n  if (rows == 64 && index == 0) y[int64_t(rows) * cols] = "
        "out.v[0];",
    )
    path.write_text(
        path.read_text().replace("  if (a.rows == 0) return;", "  if (a.rows == 3) __builtin_trap();")
    )
    assert tried(path) == 1
    said = capsys.readouterr().out
    assert re.search(r"1/3 cases +FAILED", said) and "was ended by SIG" in said
    assert "wrote 1 element past the end of out: element 16896 of its memory, which has 0 to 16895" in said


ENDLESS = "import signal, time\ndef silu_mul(gate_up, y):\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"


def test_an_endless_kernel_ends_at_the_time_limit(limited_calls, tmp_path, capsys):
    limited_calls(2)
    path = tmp_path / "endless.py"
    path.write_text(ENDLESS + "    while gate_up.shape[0] == 3: pass\n    y.zero_()")
    assert tried(path) == 1
    said = capsys.readouterr().out
    assert "did not end within 2 s" in said and "not run: a case before took too long" in said


def test_an_interrupt_ends_the_kernel(tmp_path):
    path, started = tmp_path / "endless.py", tmp_path / "pid"
    path.write_text(
        ENDLESS + f"    import os; open({str(started)!r}, 'w').write(str(os.getpid()))\n    while True: pass"
    )
    command = [sys.executable, "-m", "lab", "try", str(path), "--op", "silu_mul", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=kernel_file.ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "lab: interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_help_says_what_a_file_contains(capsys):
    with pytest.raises(SystemExit):
        cli.main(["try", "--help"])
    said = capsys.readouterr().out
    assert "def silu_mul(gate_up, y)" in said and "void silu_mul(const SiluMulArgs& a)" in said
    assert kernel_file.declaration("silu_mul") == "void silu_mul(const SiluMulArgs& a)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU (make gpu-check runs these)")
@pytest.mark.parametrize("suffix", SOURCES)
def test_a_race_on_a_gpu(suffix, tmp_path, capsys):
    path = own(tmp_path, suffix)
    command = [
        "try",
        str(path),
        "--op",
        "silu_mul",
        "--dtype",
        "bf16",
        "--batch",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " of the ceiling; " in line)
    assert "cuda" in line and "triton" in line
