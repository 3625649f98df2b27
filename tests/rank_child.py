"""One rank of test_ranks.py: decodes tiny models and writes what it found to a file."""

import json
import os
import signal
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import CONFIGS

from lab.dispatch import select
from lab.harness.ceiling import Ceilings
from lab.harness.compiled import compiled_step
from lab.harness.parallel_bench import timed
from lab.harness.parallel_ledger import account
from lab.model import ranks
from lab.model.decoder import Decoder
from lab.model.generate import generate
from lab.model.parallel import RankSource
from lab.model.sources.gguf_file import GGUFSource
from lab.model.sources.random import RandomSource
from lab.model.weight_formats import AS_STORED, Storage
from lab.model.weights import load
from lab.records.schema import ModelRow

PROMPT, TOKENS = [5, 6, 7, 8, 9], 4
RUNS = [
    ("torch", "basic", {}),
    ("torch", "fused", {}),
    ("cuda", "basic", {}),
    ("cuda", "fused", {}),
    ("triton", "fused", {}),
    ("torch", "basic", {"all_reduce_add_rmsnorm": "triton", "all_argmax": "triton"}),
    ("cuda", "fused", {"all_reduce_add": "torch"}),  # the peer of lab/harness/library_sums.py
    ("torch", "persistent", {}),
    ("cuda", "persistent", {}),
    ("torch", "persistent", {"decode_step": "triton"}),
]


FORMATS = (  # of packed weights: how random ones are rounded
    ("llama", Storage(quantise="int8", head="fp8")),
    ("qwen2", Storage(quantise="int4-g32-min", head="int4-g32")),
)


def decode(source, backend: str, plan: str, overrides, group=None, storage=AS_STORED):
    """(tokens, a number that depends on every bit of the residual stream). The persistent plan is in bf16."""
    dtype = torch.bfloat16 if plan == "persistent" else torch.float32
    weights = load(source, dtype, group=group, storage=storage)
    decoder = Decoder(weights, select(backend, "cpu", overrides), max_context=32, plan=plan)
    tokens = generate(decoder, PROMPT, TOKENS).output_ids
    residual = decoder.buffers.h
    if plan == "persistent":
        made = decoder.buffers.step_workspace
        residual = made.h
        if decoder.ops.chosen["decode_step"] == "cuda":  # words of two elements and a tag
            residual = made.words[: residual.numel() // 2].to(torch.int32)
        residual = residual.view(torch.int16)
    return tokens, zlib.crc32(residual.numpy().tobytes())


FAULTS = {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "sleeps": lambda: time.sleep(600)}


def fail_at_third_step(fault) -> None:
    """Of this process's decoders."""
    step, steps = Decoder.step, []

    def failing(*given, **options):
        steps.append(None)
        if len(steps) == 3:
            fault()
        return step(*given, **options)

    Decoder.step = failing


def compiled_tokens(name: str, group=None) -> list[list[int]]:
    """Of the peer that torch.compile makes, without code generation: three tokens of two sequences, each at
    position 0, where the random KV cache has no part."""
    source = RandomSource(CONFIGS[name])
    weights = load(RankSource(source, group.rank, group.ranks) if group else source, group=group)
    ids = torch.tensor([3, 5], dtype=torch.int32)
    step = compiled_step(weights, 2, 0, ids, backend="eager")
    return [step() or ids.tolist() for _ in range(3)]


def decode_packed(folder: str, group=None):
    """[[a file's name or a format, tokens, a number]]: the models of the GGUF files in a folder, and random
    ones with packed weights."""
    models = [(path.name, GGUFSource(path), AS_STORED) for path in sorted(Path(folder).glob("*.gguf"))]
    for name, storage in FORMATS:
        models.append((storage.quantise, RandomSource(replace(CONFIGS[name], intermediate=128)), storage))
    found = []
    for name, source, storage in models:
        if group is not None:
            source = RankSource(source, group.rank, group.ranks)
        for backend in ("torch", "cuda") if group else ("torch",):
            found.append([name, *decode(source, backend, "fused", {}, group, storage)])
    return found


def main(what: str, names: str, file: str) -> None:
    group = ranks.join("cpu")
    if what in FAULTS and group.rank == 1:
        fail_at_third_step(FAULTS[what])
    group.agree("model", "same")
    group.connect()
    if what == "packed":
        Path(f"{file}-{group.rank}").write_text(json.dumps(decode_packed(names, group)))
        return group.close()
    if what in FAULTS:
        decode(RankSource(RandomSource(CONFIGS[names]), group.rank, group.ranks), "cuda", "fused", {}, group)
        return group.close()
    found = []
    for name in names.split(","):
        source = RankSource(RandomSource(CONFIGS[name]), group.rank, group.ranks)
        for backend, plan, overrides in RUNS:
            if group.rank == 1 and "triton" in overrides.values():  # the ranks' kernels are of two languages
                overrides = dict.fromkeys(overrides, "cuda")
            found.append([name, backend, plan, *decode(source, backend, plan, overrides, group)])
    Path(f"{file}-{group.rank}").write_text(json.dumps(found))
    peer = {name: compiled_tokens(name, group) for name in names.split(",")}
    Path(f"{file}-compiled-{group.rank}").write_text(json.dumps(peer))
    size = dict(dtype="fp32", batch=2, context=8, ranks=group.ranks)
    row = ModelRow("", names, "cuda", "fused", "eager", timer="wall", **size)
    assert timed(row, load(source, group=group), "cpu").tokens_per_s > 0, row
    base = dict(run="", model=names, plan="fused", dtype="fp32", batch=1, context=8, kv_dtype=None)
    ledgers = {
        backend: account(
            base | dict(backend=backend, ranks=group.ranks), load(source, group=group), "cpu", Ceilings()
        )
        for backend in ("cuda", "cuda+gloo")
    }
    said = {backend: [vars(row) for row in rows] for backend, rows in ledgers.items()}
    Path(f"{file}-ledger-{group.rank}").write_text(json.dumps(said))
    group.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
