"""Two GPUs: `lab bench exchange` compares every result of 10,000 replays of a graph, in both languages, for
8 KB to 1 MB; and a model on two GPUs says what it says on one."""

import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT

from lab.errors import LabError
from lab.model import ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory"),
]


def lab(*words):
    """In a process of its own, which may not be a fork of one that has used CUDA."""
    command = [sys.executable, "-m", "lab", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_sum_of_ten_thousand_replays_is_right(tmp_path):
    done = lab("bench", "exchange", "--tensor-parallel", 2, "--out", tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    for backend in ("cuda", "triton"):
        for size in (8 << 10, 1 << 20):
            assert f"{size:>8} bytes  {backend}: right in 10000 calls" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    timed = {row["backend"] for row in rows if row["kind"] == "op" and row.get("us")}
    assert {"cuda", "triton", "nccl"} <= timed
    assert {row["direction"] for row in rows if row["kind"] == "ceiling"} == {
        "link word",
        "link write",
        "link read",
    }


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("plan", ["basic", "fused"])
def test_tokens_in_fp32_are_those_of_one_gpu(backend, plan, tmp_path):
    words = ["run", "llama-3.2-1b", "--weights", "random", "--dtype", "fp32", "--backend", backend]
    words += ["--plan", plan, "--ids", "1,2,3,4,5", "--max-new-tokens", 32]
    found = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        done = lab(*words, "--tensor-parallel", count, "--json", file)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(file.read_text())["output_ids"])
    assert found[0] == found[1]


def test_the_same_plan_over_nccl_has_rows_of_its_own(tmp_path):
    words = ["bench", "model", "--model", "llama-3.2-1b", "--plan", "fused", "--dtype", "bf16", "--batch", 1]
    done = lab(*words, "--context", 1024, "--tensor-parallel", 2, "--out", tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    took = {row["backend"]: row.get("us") for row in rows if row["kind"] == "model"}
    assert set(took) == {"cuda", "cuda+nccl", "triton", "triton+nccl", "torch"} and all(took.values())
    assert took["cuda"] < took["cuda+nccl"] and took["triton"] < took["triton+nccl"]


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(LabError, match="needs as many GPUs"):
        ranks.check_devices("cuda", torch.cuda.device_count() + 1)
