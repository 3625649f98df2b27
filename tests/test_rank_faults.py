"""What goes wrong between the processes that run a model together: one line that says which of them it was,
exit status 2, and nothing that waits for ever or goes on alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, lab

from lab.contract import Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.model import ranks
from lab.ops import find
from lab.ops.exchange import patience

CHILD = Path(__file__).with_name("rank_child.py")


@pytest.fixture
def soon(monkeypatch):
    """Ranks wait for each other for two seconds only."""
    monkeypatch.setenv("LAB_PEER_SECONDS", "2")


@pytest.mark.parametrize(
    "what, said",
    [
        ("dies", "^rank 1 was ended by SIGKILL; the other ranks were stopped$"),
        ("sleeps", "^rank 0: RuntimeError: kernel all_reduce_add_kernel: rank 1 has sent nothing for 2 s"),
    ],
)
def test_a_rank_that_fails_between_two_steps_ends_all(what, said, soon):
    with pytest.raises(LabError, match=said):
        ranks.start([sys.executable, str(CHILD), what, "qwen2", "-"], 2)


def test_an_interpreted_kernel_says_who_is_silent(monkeypatch):
    monkeypatch.setenv("LAB_PEER_SECONDS", "0.2")
    given = find("all_reduce_add").inputs(Rand("cpu", torch.float32), 1, 8, ranks=3, rank=1, arrived=True)
    given[-1].own[:, 2] = 0  # rank 0's words have arrived
    with pytest.raises(RuntimeError, match="rank 2 sent nothing for 0.2 s"):
        select("triton", "cpu").all_reduce_add(*given)


def test_what_a_rank_says_last_is_its_error():
    """Once ranks are connected, torch writes their number before each line."""
    text = 'Traceback:\n  File "x"\nRuntimeError: kernel k: no\n  in block (0,0,0)\n'
    marked = "".join(f"[rank1]: {line}\n" for line in text.splitlines())
    for one in (text, marked):
        assert ranks._why(1, 1, one) == "rank 1: RuntimeError: kernel k: no"


def by_rank(*scripts):
    """A command that does something else on each rank."""
    chosen = f"exec({list(scripts)!r}[int(os.environ['LAB_RANK'])])"
    return [sys.executable, "-c", f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); {chosen}"]


RUN = "from lab.cli import main; sys.exit(main(['run', {!r}, '--weights', 'random', '--device', 'cpu', "
RUN += "'--backend', 'torch', '--ids', '1', '--tensor-parallel', '2']))"


def test_a_rank_that_never_starts_is_named(soon):
    begun = time.monotonic()
    with pytest.raises(LabError, match=r"^rank 1 did not come within 2 s \(model\); is it still running\?$"):
        ranks.start(by_rank(RUN.format("llama-3.2-1b"), "time.sleep(600)"), 2)
    assert time.monotonic() - begun < 60


def test_ranks_with_different_models_are_told_so():
    models = map(RUN.format, ("llama-3.2-1b", "llama-3.1-8b"))
    with pytest.raises(LabError, match="^(rank 1: )?rank 1 has another model than rank 0: model "):
        ranks.start(by_rank(*models), 2)


def test_a_rank_that_ends_too_early_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "END_SECONDS", 0.5)
    with pytest.raises(LabError, match="^rank 1 has ended, and rank 0 and 2 still ran after 0.5 s$"):
        ranks.start(by_rank("time.sleep(600)", "", "time.sleep(600)"), 3)


ORPHAN = """
import os, sys
from lab.model import ranks
command = "import os, time; from lab.model import ranks; ranks.join('cpu'); print(os.getpid(), flush=True); "
ranks.start([sys.executable, "-c", command + "time.sleep(600)"], 1)
"""


def test_no_rank_outlives_the_command():
    command = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    rank = int(command.stdout.readline())
    command.kill()
    command.wait()
    end = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            if Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return  # ended; nobody has asked for its status
            os.kill(rank, 0)
            time.sleep(0.05)
        os.kill(rank, signal.SIGKILL)
        pytest.fail("the rank goes on")


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "smollm2-135m", "--ids", 1, "--tensor-parallel", 2], "9 query heads do not divide"),
        (["run", "smollm2-135m", "--ids", 1, "--tensor-parallel", 0], "--tensor-parallel 0: it must be"),
        (["run", "smollm2-135m", "--ids", 1, "--tensor-parallel", -2], "--tensor-parallel -2: it must be"),
        (["bench", "model", "smollm2-135m", "--tensor-parallel", 2], "9 query heads do not divide"),
        (["bench", "model", "smollm2-135m", "--tensor-parallel", 0], "positive integers"),
        (["bench", "exchange", "--tensor-parallel", 1], "needs several ranks"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_one_line(words, message, tmp_path):
    where = ["--weights", "random"] if words[0] == "run" else ["--out", tmp_path]
    done = lab(*words, *where, "--device", "cpu", "--backend", "torch")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rank, count, message",
    [("0", "3", "--tensor-parallel 2, and 3 ranks were started"), ("2", "2", "there are 2 ranks, from 0 on")]
    + [(rank, count, "is no place of a rank") for rank, count in (("x", "2"), ("-1", "2"), ("0", ""))],
)
def test_the_place_of_a_rank_is_checked(rank, count, message, tmp_path, monkeypatch):
    for name, value in ((ranks.RANK, rank), (ranks.RANKS, count), (ranks.FOLDER, tmp_path)):
        monkeypatch.setenv(name, str(value))
    words = "run llama-3.2-1b --weights random --device cpu --backend torch --ids 1 --tensor-parallel 2"
    done = lab(*words.split())
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf"])
def test_how_long_to_wait_must_be_a_time(given, monkeypatch):
    monkeypatch.setenv("LAB_PEER_SECONDS", given)
    with pytest.raises(LabError, match="must be a number of seconds above 0"):
        patience(60.0)
