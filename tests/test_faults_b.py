"""Faults found by a second look at check, try, records, tables and the KV cache: each case failed once."""

import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import LLAMA

from lab import cli
from lab.arena import Arena
from lab.check import check_case
from lab.contract import BACKENDS, Rand
from lab.dispatch import select
from lab.errors import LabError, error_text
from lab.harness import bench, crossover
from lab.judge import kernel_file, results
from lab.learn import exercises
from lab.model.decoder import Decoder
from lab.model.kv_cache import PagedKVCache
from lab.model.sources.random import RandomSource
from lab.model.weights import load as load_weights
from lab.ops import decode_attention, decode_step, find, rope_append_attention
from lab.records import schema
from lab.text import columns
from lab.tune import tuned, tuner
from lab.worker import arena_file

EVERYWHERE = pytest.mark.parametrize("backend", BACKENDS)


# ---- a process for kernels ---------------------------------------------------------------------------------


def tried(path, *words):
    return cli.main(["try", str(path), "--op", "silu_mul", "--device", "cpu", "--dtype", "fp32", *words])


@pytest.mark.parametrize(
    "text, status, message",
    [
        ("raise KeyboardInterrupt", 2, "KeyboardInterrupt"),
        ("class B(BaseException): pass\nraise B('one\\ntwo\\x1b[31m')", 2, "B: one two\\x1b[31m"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError('no')\nraise E()",
            2,
            "E: (its text cannot be read)",
        ),
        (
            "import os\nos.closerange(3, 256)\ndef silu_mul(gate_up, y): pass",
            2,
            "ended with exit status 1 before it was",
        ),
        ("def silu_mul(gate_up, y): raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        (
            "def silu_mul(gate_up, y): raise ValueError('one\\ntwo\\x1b[31m' * 1000)",
            1,
            "ValueError: one two\\x1b[31mone",
        ),
        (
            "import os\nprint('right in every case')\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * "
            "100000 + b'\\n')\n"
            "    except OSError: pass\ndef silu_mul(gate_up, y): pass",
            2,
            "wrote into the pipe of the check",
        ),
    ],
    ids=["interrupt", "base", "no text", "closed", "interrupt in a call", "lines", "nested and printed"],
)
def test_whatever_a_file_does_is_said_in_one_line(text, status, message, tmp_path, capfd):
    path = tmp_path / "hostile.py"
    path.write_text(text)
    assert tried(path, "--timeout", "100") == status
    said = capfd.readouterr()
    assert (
        message in said.out + said.err and "Traceback" not in said.err and "\x1b" not in said.out + said.err
    )
    assert "right in every case" not in said.out  # what the file prints goes to standard error
    if status == 2:
        assert len([line for line in said.err.splitlines() if line != "right in every case"]) == 1
    else:
        assert all(len(line) < 700 for line in said.out.splitlines()) and len(said.out.splitlines()) == 5


def test_the_arena_of_a_worker_cannot_be_shortened():
    """A shorter file would end the judge by SIGBUS when it reads what it has mapped."""
    file, name = arena_file()
    arena = Arena({"x": torch.arange(5000.0)}, file=file)
    with open(name, "r+b") as again, pytest.raises(OSError):
        os.ftruncate(again.fileno(), 0)
    smaller = Arena({"x": torch.ones(3)}, file=file)  # the next case may be smaller all the same
    assert smaller.values()["x"].tolist() == [1, 1, 1] and arena.memory.numel() > smaller.memory.numel()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_what_a_file_starts_in_a_session_of_its_own_ends_with_it(tmp_path):
    path, pid = tmp_path / "starts.py", tmp_path / "pid"
    path.write_text(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\ndef silu_mul(gate_up, y): y.zero_()"
    )
    assert tried(path) == 1
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid.read_text()}/exe") and time.monotonic() < deadline:
        if re.search(r"State:\s+Z", open(f"/proc/{pid.read_text()}/status").read()):
            break
        time.sleep(0.1)
    else:
        assert not os.path.exists(f"/proc/{pid.read_text()}/exe")


@pytest.mark.parametrize(
    "body, said",
    [
        ("import os; os._exit(0)", "ended with exit status 0 before it was done"),
        ("while True: pass", "did not end within 2 s (--timeout)"),
        ("x[0, 0] = 5.0", "0 was changed, which the contract does not allow"),
    ],
)
def test_a_triton_exercise_runs_in_a_process_of_its_own(body, said, limited_calls, tmp_path):
    limited_calls(2)
    path = tmp_path / "tail_mask.py"
    path.write_text(f"def row_mean(x, y):\n    y.copy_(x.mean(1))\n    {body}")
    assert said in exercises.check("tail_mask", "triton", path)


TUTORIAL = """
import triton
import triton.language as tl

@triton.jit
def kernel(gate_up, y, n, cols, BLOCK: tl.constexpr = 128):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = gate_up + i // cols * 2 * cols + i % cols
    g = tl.load(gate, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(gate + cols, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=i < n)

def silu_mul(gate_up, y):
    n, cols = y.numel(), y.shape[1]
    LAUNCH
"""


@pytest.mark.parametrize(
    "launch, said",
    [
        ("kernel[(triton.cdiv(n, 128),)](gate_up, y, n, cols)", None),
        (
            "kernel[lambda meta: (triton.cdiv(n, meta['BLOCK']),)](gate_up, y, n=n, cols=cols, num_warps=2, "
            "num_stages=3)",
            None,
        ),
        ("kernel.run(gate_up, y, n, cols, BLOCK=64, grid=(triton.cdiv(n, 64),), warmup=False)", None),
        (
            "kernel[(1,)](gate_up, y, n, cols, 1024, 7)",
            "kernel: 6 arguments, and the kernel has 5 parameters",
        ),
        ("kernel[(1,)](gate_up, y, n, cols, cols=cols)", "kernel: argument 'cols' is given twice"),
        (
            "kernel[(1,)](gate_up, y, n, cols, BLOCKS=64)",
            "'BLOCKS' is neither a parameter of the kernel nor an option",
        ),
        ("kernel[(1,)](gate_up, y, n)", "kernel: argument 'cols' is missing"),
        (
            "triton.runtime.driver.active.get_current_device()",
            "take the device from the tensors that your function is given",
        ),
    ],
    ids=["default", "lambda", "run", "too many", "twice", "unknown", "missing", "driver"],
)
def test_launches_are_taken_or_refused_as_on_a_gpu(launch, said, tmp_path):
    path = tmp_path / "tutorial.py"
    path.write_text(TUTORIAL.replace("LAUNCH", launch))
    function = kernel_file.function_of(path, find("silu_mul"), "cpu")
    outcome = check_case(find("silu_mul"), function, Rand("cpu", torch.float32), dict(rows=2, cols=96))
    assert outcome.error is None if said is None else said in outcome.error


# ---- CUDA files --------------------------------------------------------------------------------------------

COPY = (kernel_file.ROOT / "cuda_src/silu_mul.cu").read_text()


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            "  // 2. Load",
            "  __shared__ float tile[4]; tile[0] = 1;\n  // 2. Load",
            rf"line {COPY[: COPY.index('  // 2. Load')].count(chr(10)) + 1}: use lab::smem<Struct>\(\) "
            r"instead of",
        ),
        (
            "  if (a.rows == 0) return;",
            "  silu_mul_kernel<float, 1><<<1, 32>>>(nullptr, nullptr, 1, 1);",
            r"line \d+: kernel<<<grid, block, bytes, stream>>>\(...\) does not compile for the CPU: write "
            r"launch\(",
        ),
    ],
)
def test_what_only_nvcc_takes_is_one_line_that_says_what_to_write(old, new, said, tmp_path, capfd):
    path = tmp_path / "mine.cu"
    assert old in COPY
    path.write_text(COPY.replace(old, new, 1))
    assert tried(path) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith(f"lab: error: {path}: ") and re.search(said, err)


def test_files_that_are_tried_at_the_same_time_do_not_share_an_object(tmp_path):
    """Both were build/host/try_silu_mul.cu.o: one was linked, and judged, in the other's place."""
    shared = kernel_file.ROOT / "build/host/try_silu_mul.cu.o"
    before = shared.stat().st_mtime_ns if shared.exists() else None
    path = tmp_path / "mine.cu"
    path.write_text(COPY)
    kernel_file.build(path, find("silu_mul"), "cpu", tmp_path / "built", 300)
    assert len(list((tmp_path / "built").rglob("*try_silu_mul.cu.o"))) == 1
    assert before == (shared.stat().st_mtime_ns if shared.exists() else None)


def test_a_name_that_is_defined_nowhere_is_named(tmp_path, capfd):
    path = tmp_path / "mine.cu"
    path.write_text(
        COPY.replace("void silu_mul(", "void not_there();\nvoid silu_mul(").replace(
            "  if (a.rows == 0) return;", "  not_there();"
        )
    )
    assert tried(path) == 2
    err = capfd.readouterr().err
    assert "not_there" in err and "which is defined nowhere" in err and "lacks the launcher" not in err


# ---- ops ---------------------------------------------------------------------------------------------------


def attention(name, splits=2):
    sizes = {"decode_attention": dict(lengths=(21, 4)), "rope_append_attention": dict(positions=(20, 3))}[
        name
    ]
    module = {"decode_attention": decode_attention, "rope_append_attention": rope_append_attention}[name]
    args = module.inputs(
        Rand("cpu", torch.float32), **sizes, q_heads=4, kv_heads=2, head_dim=64, splits=splits
    )
    return args, decode_attention.Workspace.empty(2, 4, 2, 64, splits, "cpu")


@EVERYWHERE
@pytest.mark.parametrize("name", ["decode_attention", "rope_append_attention"])
@pytest.mark.parametrize(
    "part, dtype",
    [
        ("tickets", torch.int64),
        ("tickets", torch.float32),
        ("partial", torch.float16),
        ("partial", torch.float64),
    ],
)
def test_a_workspace_of_another_dtype_is_refused(backend, name, part, dtype):
    """A kernel wrote float32 past the end of float16 scratch."""
    args, workspace = attention(name)
    tensors = dict(partial=workspace.partial, tickets=workspace.tickets)
    tensors[part] = tensors[part].to(dtype)
    with pytest.raises(LabError, match="float32 partial results and int32 tickets"):
        getattr(select(backend, "cpu"), name)(*args, workspace=decode_attention.Workspace(**tensors))


@EVERYWHERE
@pytest.mark.parametrize("name", ["decode_attention", "rope_append_attention"])
def test_a_ticket_that_is_left_over_is_seen_where_contents_are_checked(backend, name):
    args, workspace = attention(name)
    workspace.tickets[1, 0] = 1
    with pytest.raises(LabError, match=f"^{name}: the workspace's tickets must be 0 between launches"):
        getattr(select(backend, "cpu", check_contents=True), name)(*args, workspace=workspace)


@EVERYWHERE
@pytest.mark.parametrize("part", ["qkv", "attention", "words", "counters"])
@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-1].clone(), lambda t: t.double()], ids=["shorter", "float64"]
)
def test_every_part_of_a_step_s_workspace_is_checked(backend, part, spoil):
    op = find("decode_step")
    args = op.inputs(
        Rand("cpu", torch.bfloat16),
        layers=1,
        hidden=72,
        intermediate=64,
        vocab=83,
        q_heads=2,
        kv_heads=1,
        head_dim=64,
        position=20,
    )
    args = list((op.with_workspace or (lambda *a: a))(*args))
    at = next(i for i, a in enumerate(args) if isinstance(a, decode_step.StepWorkspace))
    parts = {**vars(args[at])}
    parts[part] = spoil(parts[part])
    args[at] = decode_step.StepWorkspace(**parts)
    with pytest.raises(LabError, match="the workspace is of another size or dtype"):
        select(backend, "cpu", {"decode_step": backend}).decode_step(*args)


def test_a_cache_without_heads_is_refused():
    empty = torch.zeros(1, 0, 16, 64)
    with pytest.raises(LabError, match="0 KV heads"):
        one = torch.zeros(1, dtype=torch.int32)
        select("torch", "cpu").decode_attention(torch.zeros(1, 2, 64), empty, empty, one[None], one, 1.0)


# ---- tables, records, text ---------------------------------------------------------------------------------

ENTRY = {
    "op": "linear",
    "itemsize": 2,
    "rows": 1,
    "shape": {"n": 64, "k": 64},
    "settings": {"BLOCK_N": 2},
    "tried": 3,
    "gpu": "a GPU",
    "compiler": "3.6",
}


@pytest.mark.parametrize(
    "change",
    [
        {"op": 5},
        {"rows": "1"},
        {"rows": 0},
        {"rows": True},
        {"rows": 1.5},
        {"rows": None},
        {"itemsize": []},
        {"shape": []},
        {"shape": {"n": "64"}},
        {"shape": {"n": 1e9}},
        {"settings": {"BLOCK_N": "2"}},
        {"settings": {"BLOCK_N": -1}},
        {"settings": {"path": "../x"}},
        {"settings": {"BLOCK_N": 2**40}},
        {"settings": None},
        {"tried": "3"},
        {"by": 1},
        {"gpu": None},
    ],
    ids=json.dumps,
)
def test_a_table_whose_entry_has_a_wrong_type_is_named(change, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"entries": [ENTRY, {**ENTRY, **change}]}))
    with pytest.raises(LabError, match=f"entry 1: {next(iter(change))} (is|has)"):
        tuned.read(path)
    path.write_text(json.dumps({"entries": [ENTRY]}))
    assert tuned.read(path) == [ENTRY]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"entries": 5}',
        '{"entries": [NaN]}',
        "\xff",
        '{"entries": [[1]]}',
        "null",
        '{"entries": [], "entries": []}',
    ],
    ids=["deep", "number", "nan", "bytes", "list", "null", "twice"],
)
def test_a_file_that_is_no_table_is_one_line(text, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LabError, match="is no table of `lab tune`"):
        tuned.read(path)


def test_the_race_of_the_tuner_sees_what_lies_beside_the_output():
    op = find("silu_mul")

    def overruns(gate_up, out):
        out.copy_(op.reference(gate_up)[0])
        ctypes.memset(out.data_ptr() + out.nbytes, 0, out.itemsize)

    def changes(gate_up, out):
        out.copy_(op.reference(gate_up)[0])
        gate_up[0, 0] = 7.0

    race = object.__new__(tuner.Race)
    race.op, race.device, race.fresh = op, "cpu", op.inputs(Rand("cpu", torch.float32), rows=2, cols=64)
    race.backend = SimpleNamespace(forced=lambda name, settings: contextlib.nullcontext())
    race.run = SimpleNamespace(silu_mul=select("torch", "cpu").silu_mul)
    assert race.error(None) is None
    race.run = SimpleNamespace(silu_mul=lambda gate_up, out: (changes(gate_up, out), out)[1])
    assert race.error(None) == "gate_up was changed, which the contract does not allow"
    race.run = SimpleNamespace(silu_mul=lambda gate_up, out: (overruns(gate_up, out), out)[1])
    assert race.error(None).startswith("wrote 1 element past the end of out")


OP = {
    "schema": 1,
    "kind": "op",
    "run": "r",
    "op": "linear",
    "backend": "cuda",
    "dtype": "bf16",
    "batch": 1,
    "shape": {"n": 1},
    "us": 5.0,
    "us_p10": 4.0,
    "us_p90": 6.0,
    "n": 10,
}


def test_a_spread_the_wrong_way_round_is_no_value():
    with pytest.raises(schema.BadValue, match="us_p10 is 6.0, more than us_p90"):
        schema.from_dict({**OP, "us_p10": 6.0, "us_p90": 4.0})
    assert schema.from_dict({**OP, "us_p10": 5.0, "us_p90": 5.0}).us_p10 == 5.0


def test_winners_of_times_without_a_spread_are_ambiguous(tmp_path, capsys):
    """It ended in a TypeError."""
    env = {"schema": 1, "kind": "env", "run": "r", "when": "before", "device": "cuda"}
    bare = {k: v for k, v in OP.items() if k not in ("us_p10", "us_p90", "n")} | {"models": ["llama-3.2-1b"]}
    rows = [env, bare, {**bare, "backend": "triton", "us": 9.0}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["bench", "crossover", "llama-3.2-1b", "--out", str(tmp_path)]) == 0
    assert "cuda" in capsys.readouterr().out
    assert crossover.cells(schema.read(tmp_path).rows, "llama-3.2-1b")[0].verdict == "ambiguous"


def test_nothing_that_is_recorded_steers_a_terminal(capsys, tmp_path):
    row = schema.from_dict(
        {
            **{k: v for k, v in OP.items() if not k.startswith("us")},
            "op": "li\x1b[2Jnear",
            "error": "a\nb\x1b[31m",
        }
    )
    session = SimpleNamespace(rows=[row], run="r", new=1, path=tmp_path)
    bench.say(session, True)
    assert "\n  failed: op li\\x1b[2Jnear cuda: a b\\x1b[31m\n" in capsys.readouterr().out
    row.cache, row.backend = "cold", "mine.cu"
    (line,) = results.verdicts([row], "mine.cu")
    assert line.isprintable() and "failed: a b" in line
    good = schema.from_dict({**OP, "backend": "mine.cu", "verdict": {"x\x1b[31m": "faster"}})
    (line,) = results.verdicts([good], "mine.cu")
    assert line.isprintable() and "faster than x\\x1b[31m" in line
    assert columns([("a\x1b[31m\n", 1)]) == ["a\\x1b[31m\\n  1"]
    assert error_text(ValueError("a\x1b[31m\nb")) == "ValueError: a\\x1b[31m b"


@pytest.mark.parametrize(
    "words", [("compare", "a\0b", "c"), ("bench", "ops", "silu_mul", "--out", "x\0y"), ("report", "a\0b")]
)
def test_a_path_with_a_nul_is_one_line(words, capsys):
    assert cli.main(list(words)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("lab: error: ")


# ---- the KV cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_does_what_a_plain_model_of_it_does(seed):
    """500 random extensions, shortenings and releases: lengths, pages and the table after each."""
    rng, page, rows, most, pool = random.Random(seed), 16, 5, 70, rng_pool(seed)
    cache = PagedKVCache(LLAMA, rows, most, torch.float32, "cpu", page, pages=pool)
    lengths, held = [0] * rows, [0] * rows  # the model: tokens and pages of each row
    refused = 0
    for _ in range(500):
        row, tokens = rng.randrange(rows), rng.choice([1, 1, 1, 2, 15, 16, 17, 40])
        some = rng.sample(range(rows), rng.randint(1, rows))
        before = [list(pages) for pages in cache.held]
        match rng.choice(["extend", "extend", "step", "step", "step", "release", "shorten"]):
            case "release":
                cache.release(row)
                lengths[row] = held[row] = 0
                before[row] = []
            case "shorten":
                some = [r for r in some if lengths[r]]
                cache.shorten(some, 1)
                for r in some:
                    lengths[r] -= 1
            case what:
                some, tokens = ([row], tokens) if what == "extend" else (some, 1)
                need = {r: max(0, -(-(lengths[r] + tokens) // page) - held[r]) for r in some}
                fits = all(lengths[r] + tokens <= most for r in some) and sum(need.values()) <= pool - sum(
                    held
                )
                if fits:
                    cache.extend_all(some, tokens)
                    for r in some:
                        lengths[r] += tokens
                        held[r] += need[r]
                else:
                    refused += 1
                    with pytest.raises(LabError, match="the KV cache is full"):
                        cache.extend_all(some, tokens)
        assert cache.lengths == lengths and [len(pages) for pages in cache.held] == held
        assert sorted([*cache.free, *(p for pages in cache.held for p in pages)]) == list(range(pool))
        for r in range(rows):
            assert cache.block_table[r, : held[r]].tolist() == cache.held[r]
            assert cache.held[r][: len(before[r])] == before[r]  # a page stays where it is while it is held
    assert 0 < refused < 400


@pytest.mark.parametrize("backend, plan", [("torch", "basic"), ("cuda", "fused")])
def test_rows_that_come_and_go_say_what_each_says_alone(backend, plan):
    """A random schedule of admissions, steps and ends on a pool that is too small, with contents checked."""
    weights, rng = load_weights(RandomSource(LLAMA, seed=1), torch.float32, "cpu"), random.Random(1)
    d = Decoder(weights, select(backend, "cpu", check_contents=True), 4, max_context=64, pages=9, plan=plan)
    running, ended, full = {}, [], 0  # row: (prompt, what it has said)
    for _ in range(60):
        idle, what = [row for row in range(4) if row not in running], rng.random()
        if what < 0.25 and idle:
            row, ids = (
                rng.choice(idle),
                [rng.randrange(LLAMA.vocab) for _ in range(rng.choice([1, 2, 15, 16, 17, 30]))],
            )
            try:
                d.admit(row, ids)
                running[row] = ids, []
            except LabError:
                full += 1
                assert d.cache.lengths[row] == 0 and not d.cache.held[row]
        elif running and what < 0.33:
            row = rng.choice(sorted(running))
            d.finish(row)
            ended.append(running.pop(row))
        elif running:
            try:
                said = d.step()
                for row, (_, words) in running.items():
                    words.append(int(said[row]))
            except LabError:
                full += 1
                row = max(running, key=lambda row: len(running[row][1]))
                d.finish(row)
                ended.append(running.pop(row))
        assert d.positions.tolist() == [d.cache.lengths[row] if row in running else -1 for row in range(4)]
    assert full and len(ended) > 4
    for ids, words in ended:
        alone = Decoder(weights, select(backend, "cpu"), 1, max_context=64)
        alone.admit(0, ids)
        assert [int(alone.step()[0]) for _ in words] == words


# ---- the shell ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_a_file_whose_name_holds_a_space(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--completion", "bash"])
    (tmp_path / "my kernel.py").touch()
    script = (
        capsys.readouterr().out
        + """
COMP_WORDS=(lab try my); COMP_CWORD=2; _lab; printf '%s|' "${COMPREPLY[@]}"
COMP_WORDS=(lab che); COMP_CWORD=1; _lab; printf '%s|' "${COMPREPLY[@]}"
"""
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "my kernel.py|check|"


def rng_pool(seed):
    return (7, 12, 20, 25)[seed]
