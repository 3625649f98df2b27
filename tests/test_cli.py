"""The command line as a user meets it: every mistake is one line on standard error, exit status 2, no
traceback."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
from tiny_models import CONFIGS, write_gguf

from lab import cli, contract
from lab.errors import LabError

ROOT = Path(__file__).resolve().parent.parent


def lab(*words, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "lab", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        **options,
    )


def refused(capfd, *words):
    """The one line that `lab words...` prints when it exits with 2."""
    assert cli.main(list(words)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("lab: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", CONFIGS["llama"])


@pytest.fixture(scope="module")
def broken_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    return path


TINY = ("run", "TINY", "--backend", "torch", "--device", "cpu")  # TINY: a small model with a tokenizer
RUN = ("run", "--prompt", "hi", "--weights", "random", "smollm2-135m", "--backend")

MISTAKES = {
    "unknown verb": (("ruin",), "did you mean run"),
    "unknown option": (("run", "--promt", "hi"), "--help"),
    "no prompt": (("run", "--backend", "torch"), "--prompt"),
    "prompt twice": (("run", "--prompt", "a", "--ids", "1"), "not allowed with"),
    "no number": ((*RUN, "torch", "--max-new-tokens", "ten"), "invalid int value: 'ten'"),
    "no tokens": ((*RUN, "torch", "--max-new-tokens", "0"), "at least 1"),
    "no backend": (("run", "--prompt", "hi"), "cuda, triton, torch"),
    "unknown backend": ((*RUN, "cudaa"), "did you mean cuda? choose from cuda, triton, torch"),
    "unknown dtype": ((*RUN, "torch", "--dtype", "fp8"), "fp32, fp16, bf16"),
    "unknown device": ((*RUN, "torch", "--device", "tpu"), "choose from cuda, cpu"),
    "unknown plan": ((*RUN, "torch", "--plan", "quick"), "basic"),
    "unknown op": ((*RUN, "torch", "--override", "rmsnrm=cuda"), "did you mean rmsnorm? choose from"),
    "unknown override": ((*RUN, "torch", "--override", "rope=opencl"), "cuda, triton, torch"),
    "override without =": ((*RUN, "torch", "--override", "rope"), "OP=BACKEND"),
    "temperature": ((*RUN, "torch", "--temperature", "-1"), "0 (greedy)"),
    "top-p": ((*RUN, "torch", "--top-p", "0"), "above 0"),
    "json folder": ((*RUN, "torch", "--json", "/nowhere/x.json"), "/nowhere/x.json"),
    "unknown model": (
        ("run", "smolm2-135m", "--prompt", "hi", "--backend", "torch"),
        "did you mean smollm2-135m",
    ),
    "model without weights": (
        ("run", "llama-3.2-1b", "--prompt", "hi", "--backend", "torch"),
        "--weights random",
    ),
    "text without tokenizer": ((*RUN, "torch"), "--ids"),
    "ids": ((*TINY, "--ids", "1,two"), "1,2,3"),
    "ids outside": ((*TINY, "--ids", "1,999999"), "outside the vocabulary"),
    "prompt too long": ((*TINY, "--ids", "1,2,3", "--max-context", "2"), "cache holds 2"),
    "page size": ((*TINY, "--ids", "1", "--page-size", "17"), "choose from 16"),
    "check: op": (("check", "--op", "rmsnrm"), "did you mean rmsnorm? choose from"),
    "check: backend": (("check", "--backend", "opencl"), "choose from cuda, triton, torch"),
    "check: dtype": (("check", "--dtype", "fp8"), "choose from fp32, fp16, bf16"),
    "check: no backend": (("check", "--backend", ""), "choose from cuda, triton, torch"),
    "check: seed": (("check", "--op", "rmsnorm", "--backend", "torch", "--seed", "9" * 30), "64 bits"),
    "check: ladder of torch": (("check", "--ladder", "--backend", "torch"), "cuda and triton"),
    "check: device": (("check", "--device", "tpu"), "choose cuda or cpu"),
    "bench: op": (("bench", "ops", "rmsnrm"), "did you mean rmsnorm"),
    "bench: model": (("bench", "model", "llama-9"), "llama"),
    "bench: what": (("bench", "everything"), "choose from"),
    "bench: nearly ops": (("bench", "opps"), "did you mean ops?"),
    "check: nearly --op": (("check", "--oop", "rope"), "did you mean --op?"),
    "option before a verb": (("--verison",), "did you mean --version?"),
    "nothing is near": (("check", "--xyzzy"), "unrecognized arguments: --xyzzy (see"),
    "ledger: dtype": (("ledger", "llama-3.2-1b", "--dtype", "bf61"), "did you mean bf16?"),
    "bench: sizes": (("bench", "ops", "--batch", "0"), "positive integers"),
    "bench: seconds": (("bench", "ops", "--seconds", "nan"), "invalid duration value: 'nan'"),
    "bench: budget": (("bench", "ops", "--budget-minutes", "-1"), "invalid duration value: '-1'"),
    "bench: context": (
        ("bench", "model", "smollm2-135m", "--device", "cpu", "--context", "8192", "--out", "/nowhere"),
        "contexts below 8192",
    ),
    "bench: op's context": (
        ("bench", "ops", "decode_attention", "--device", "cpu", "--context", "999999", "--out", "/nowhere"),
        "nothing to measure",
    ),
    "bench: ladder of torch": (
        ("bench", "ops", "--ladder", "--device", "cpu", "--backend", "torch", "--out", "/nowhere"),
        "cuda and triton",
    ),
    "bench: op without a ladder": (
        ("bench", "ops", "rope", "--ladder", "--device", "cpu", "--out", "/nowhere"),
        "rope has no ladder",
    ),
    "bench: ledger without a GPU": (
        ("bench", "ledger", "--device", "cpu", "--out", "/nowhere"),
        "needs a GPU",
    ),
    "explain: op": (("explain", "rmsnrm"), "did you mean rmsnorm"),
    "report: folder": (("report", "/nowhere"), "/nowhere"),
    "ledger: model": (("ledger", "llama-9"), "llama"),
    "no records": (("compare", "/nowhere/a", "/nowhere/b"), "does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, tiny_gguf, capfd, monkeypatch):
    monkeypatch.delenv("LAB_BACKEND", raising=False)
    monkeypatch.delenv("LAB_OVERRIDE", raising=False)
    words, said = MISTAKES[mistake]
    assert said in refused(capfd, *(str(tiny_gguf) if word == "TINY" else word for word in words))


def test_a_mangled_model_file(capfd, broken_gguf):
    assert str(broken_gguf) in refused(capfd, "run", str(broken_gguf), "--prompt", "hi", "--backend", "torch")


def test_an_override_that_is_not_built(capfd, monkeypatch):
    from lab import backends

    monkeypatch.setitem(sys.modules, "lab._host", None)  # as if it had never been built
    backends.load.cache_clear()
    said = refused(
        capfd,
        "run",
        "--ids",
        "1",
        "--weights",
        "random",
        "--backend",
        "torch",
        "--override",
        "rope=cuda",
        "--device",
        "cpu",
    )
    backends.load.cache_clear()
    assert "lab._host is not built" in said and "make setup" in said


def test_no_gpu(capfd, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable NVIDIA GPU" in refused(
        capfd, "run", "--prompt", "hi", "--backend", "torch", "--device", "cuda"
    )


def test_the_mistake_in_a_real_process():
    done = lab("run", "--prompt", "hi", "--backend", "cudaa")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in done.stderr


def test_traceback_shows_where_an_error_came_from():
    for words in (("--traceback", "compare", "a", "b"), ("compare", "a", "b", "--traceback")):
        done = lab(*words)
        assert done.returncode == 2
        assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("lab: error: ")


def test_a_fault_of_the_lab_is_not_dressed_up_as_a_mistake(monkeypatch):
    def broken(argv):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    "error, status, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (LabError("two\nlines"), 2, "lab: error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "a.json: No such file or directory"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 2, "make setup"),
    ],
)
def test_what_escapes_from_a_verb(monkeypatch, capfd, error, status, said):
    def verb(argv):
        raise error

    monkeypatch.setattr(cli, "run", verb)
    assert cli.main([]) == status
    assert said in capfd.readouterr().err


def test_a_reader_that_goes_away():
    script = f"{sys.executable} -m lab run --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0: everything fitted into the pipe before


def test_a_reader_that_goes_away_from_what_rich_prints():
    with subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        done = commands.lab("explain", "decode_attention", given={1: reader.stdin})
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_full_disk_is_one_line():
    for buffered in ("", "1"):
        with open("/dev/full", "w") as full:
            done = commands.lab("explain", "rmsnorm", given={1: full}, env={"PYTHONUNBUFFERED": buffered})
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no space left" in done.stderr


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_is_instant_for_it_imports_no_torch(verb):
    """CPU time, for other processes may share the cores. 0.2 s on an idle core, where torch alone takes 2."""
    probe = (
        "import sys; from lab import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", probe, *([verb] if verb else []), "--help"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith(f"usage: lab {verb or '[-h]'}"), done.stderr
    assert not {"torch", "triton", "numpy", "pandas", "matplotlib"} & set(done.stderr.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert verb or all(name in done.stdout for name in cli.VERBS)


def test_the_options_name_the_dtypes_of_the_dispatcher():
    from lab import options

    assert options.DTYPES == tuple(contract.DTYPES)


def test_the_version_says_which_copy_of_the_lab_this_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(
        rf"lab (\d[\w.]*|\(not installed\)), {re.escape(str(ROOT / 'lab'))}\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "typed, words",
    [
        ("exercise check --json barrier", ["check", "barrier"]),
        ("learn check --json 4", ["check", "4"]),
        ("learn --json check 4", ["check", "4"]),
        ("new kernel --language cuda rmsnorm", ["kernel", "rmsnorm"]),
    ],
)
def test_options_may_stand_between_words(typed, words):
    assert cli.parse(typed.split(), typed.split()[0]).words == words


def test_bench_alone_means_all():
    args = cli.parse(["bench"], "bench")
    assert (args.what, args.names) == ("all", [])
    assert cli.parse(["bench", "--quick"], "bench").what == "all"
    args = cli.parse(["bench", "--quick", "ops", "linear", "rope"], "bench")
    assert (args.what, args.names) == ("ops", ["linear", "rope"])


COMPLETED = {
    "ru": "run",
    "bench cro": "crossover",
    "check --lad": "--ladder",
    "--vers": "--version",
    "ledger x --dtype bf": "bf16",
    "explain --run": "--rungs",
}


@pytest.mark.parametrize("typed", COMPLETED)
def test_a_shell_completes(typed, tmp_path):
    script = lab("--completion", "bash").stdout
    words = ["lab", *typed.split()]
    ask = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _lab; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (COMPLETED[typed], "")


def test_completion_offers_files(tmp_path):
    (tmp_path / "mine.cu").touch()
    script = lab("--completion", "bash").stdout
    done = subprocess.run(
        ["bash", "-c", f"{script}\nCOMP_WORDS=(lab try mi); COMP_CWORD=2; _lab; echo ${{COMPREPLY[@]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "mine.cu\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: lab {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_readme_lists_every_verb(verb):
    assert f"`lab {verb}" in (ROOT / "README.md").read_text()


def test_without_a_gpu_an_old_gpu_build_is_not_missing(monkeypatch):
    from lab.machine import doctor

    info = {
        "compiler": "nvcc",
        "archs": ["90a"],
        "sanitizer": "none",
        "sources": {"cuda_src/gone.cu": "0"},
        "patterns": [],
    }
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: SimpleNamespace(build_info=lambda: info)
    )
    for module, gpu, state in (
        ("_cuda", None, "optional"),
        ("_cuda", (9, 0), "missing"),
        ("_host", None, "missing"),
    ):
        found = []
        doctor.find_extension(found, module, gpu)
        assert [(f.state, f.text) for f in found] == [
            (state, "cuda_src/gone.cu is gone since; nvcc, for 90a")
        ]


def test_doctor_proves_what_it_calls_ok():
    done = commands.lab("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["usable"] else 1)
    by_name = {f["name"]: f for f in found["findings"]}
    for backend in ("cuda", "triton"):
        assert by_name[f"{backend} on cpu"]["state"] == "ok", by_name[f"{backend} on cpu"]
    assert "cpu" in found["usable"]
    assert all(f["todo"] for f in found["findings"] if f["state"] == "missing")
