"""`lab bench model NAMES --tensor-parallel 1,2`: a decode step of a model that several GPUs divide.

Every rank builds the same decoders and takes the same steps in the same order; each step waits for the other
ranks, so the counts are fixed and none follows from a time. Rank 0 records its times.
"""

import sys
from dataclasses import replace

import torch

from lab.contract import DTYPES
from lab.errors import LabError, error_text
from lab.harness import library_sums, timing
from lab.harness.compiled import compiled_step
from lab.harness.model_bench import KV_SHARE, fill, release, step_bytes, timed_step
from lab.harness.request import settings_of
from lab.model import ranks
from lab.model.decoder import Decoder
from lab.model.kv_cache import token_bytes
from lab.model.memory import free_bytes
from lab.model.parallel import RankSource, check_ranks, possible
from lab.model.plans import refusal
from lab.model.sources import open_source
from lab.model.weights import load, require_parts
from lab.records.schema import ModelRow
from lab.records.session import Session

SAMPLES = {"cuda": 60, "cpu": 3}


def main(args, request, counts, measure=None, told=None) -> int:
    """counts: of GPUs, each above 1. The command itself starts the ranks of each, one after the other.

    measure: (group, settings, session) -> yields lists of rows on every rank. Rank 0, which alone has a
    session, records them and prints told(rows). Default: decode steps.
    """
    measure, told = measure or measure_steps, told or told_of_steps
    settings = settings_of(request)
    group = ranks.join(settings.device)
    if group is None:
        # Larger ones that do not fit are rows with an error.
        least = min(settings.model_batches) * (min(settings.model_contexts) + 1)
        for count in counts:
            ranks.check_devices(settings.device, count)
            for name in left_out_of(settings, request, count):
                print(f"{name} is left out: it cannot be divided among {count} ranks")
            for name in divided(settings, request, count).models:
                source = open_source(name, settings.weights)
                check_ranks(source.config, count)
                require_parts(
                    source,
                    count,
                    DTYPES[settings.dtypes[0]],
                    settings.device,
                    settings.storage,
                    least,
                    settings.kv_dtype,
                )
        for count in counts:
            command = [sys.executable, "-m", "lab", *args.argv, "--tensor-parallel", str(count)]
            ranks.start(command, count)  # the last --tensor-parallel counts
        return 0
    settings = divided(settings, request, group.ranks)
    group.agree("measurement", str(settings))
    group.connect()
    session = None
    if group.rank == 0:
        recorded = settings.recorded() | {"ranks": group.ranks}
        session = Session(request.out, settings.device, recorded, fresh=True)
    for rows in measure(group, settings, session):
        if session is not None:
            for row in rows:
                row.run = session.run
            session.add(*rows)
            print(told(rows), flush=True)
    if session is not None:
        session.finish(True)
        print(f"run {session.run}: {session.new} new lines in {session.path}")
    group.close()
    return 0


def left_out_of(settings, request, count: int) -> list[str]:
    """The models measured by default that cannot be divided among so many ranks; none that was asked for."""
    if request.models:
        return []
    configs = {name: open_source(name, settings.weights).config for name in settings.models}
    return [name for name, config in configs.items() if count not in possible(config)]


def divided(settings, request, count: int):
    """The settings without the models that are left out. Raises LabError if that leaves none."""
    left_out = left_out_of(settings, request, count)
    models = tuple(name for name in settings.models if name not in left_out)
    if not models:
        raise LabError(
            f"no model that is measured by default can be divided among {count} ranks: name another (--model)"
        )
    return replace(settings, models=models)


def told_of_steps(rows) -> str:
    (row,) = rows
    size = f"batch {row.batch}, context {row.context}"
    said = f"{row.us:9.1f} us a token" if row.us else row.error
    what = row.mode if row.mode == "compile" else row.plan
    return f"{row.model} on {row.ranks} GPUs, {row.backend} {what:6} {row.dtype} {size}: {said}"


def measure_steps(group, settings, session):
    """Yields a list of one row for each model, batch, context, backend and plan, peers with the library's
    sums among them."""
    device, dtype_name = settings.device, settings.dtypes[0]
    dtype = DTYPES[dtype_name]
    kind = settings.weights if settings.weights == "random" else "file"
    for name in settings.models:
        source = RankSource(open_source(name, settings.weights), group.rank, group.ranks)
        weights = load(source, dtype, device, settings.storage, group)
        for batch in settings.model_batches:
            for context in settings.model_contexts:
                for backend, plan in library_sums.sides(settings):
                    if refusal(plan, batch, dtype):
                        continue
                    row = ModelRow(
                        "",
                        name,
                        backend,
                        plan,
                        "graph" if device == "cuda" else "eager",
                        dtype_name,
                        batch,
                        context,
                        "graph" if device == "cuda" else "wall",
                        weights=kind,
                        weight_format=weights.formats if weights.packed else None,
                        kv_dtype=settings.kv_dtype,
                        ranks=group.ranks,
                        emulated=device == "cpu",
                        note=library_sums.note_of(backend),
                    )
                    yield [timed(row, weights, device)]
                    release(device)
                first = (batch, context) == (settings.model_batches[0], settings.model_contexts[0])
                if settings.compile and first and device == "cuda" and not weights.packed:
                    peer = ModelRow("", name, "torch", "-", "compile", dtype_name, batch, context, "graph")
                    peer.ranks, peer.weights = group.ranks, kind
                    peer.note = "torch.compile layer by layer with NCCL's sums, one CUDA graph; contiguous KV"
                    yield [timed_compiled(peer, weights)]
                    release(device)
        del weights
        release(device)


def timed_compiled(row: ModelRow, weights) -> ModelRow:
    """The row of the torch.compile peer, whose sums are NCCL's (lab/harness/compiled.py), with its times."""
    row.error = refused_cache(weights, row.batch, row.context + 1, None)
    if row.error is None:
        try:
            step = timing.GraphTimed([compiled_step(weights, row.batch, row.context)])
        except Exception as error:  # perhaps on this rank alone, so none may go on
            raise LabError(f"{row.model} under torch.compile: {error_text(error)}") from error
        sampled(row, step, weights)
    return row


def sampled(row: ModelRow, step, weights) -> None:
    """Fills in the times of a step, sampled on all ranks together."""
    torch.distributed.barrier()
    count = SAMPLES[weights.device.type]
    samples = [step.sample() for _ in range(count + 1)][1:]
    if weights.device.type == "cuda":
        torch.cuda.synchronize()
    stats = timing.summarize([step.read(sample) for sample in samples])
    step.close()
    for field, value in stats.fields(p99=True).items():
        setattr(row, field, value)
    row.tokens_per_s = row.batch / row.us * 1e6
    row.bytes = step_bytes(weights, row.batch, row.context, row.kv_dtype)
    row.gbps = row.bytes / row.us / 1e3  # of each GPU
    row.weight_bytes = weights.nbytes


def refused_cache(weights, batch: int, tokens: int, kv_dtype: str | None) -> str | None:
    """Why no KV cache of so many tokens for each row is made: the rank with the least memory has no room for
    it; None where all have. The answer is the same on all ranks: one that went on alone would wait for the
    others."""
    free = free_bytes(weights.device)
    least = torch.tensor(1 << 62 if free is None else free, device=weights.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    sharing = torch.distributed.get_world_size() if weights.device.type == "cpu" else 1  # one memory
    wanted = sharing * batch * tokens * token_bytes(weights.config, weights.dtype, kv_dtype)
    if wanted <= KV_SHARE * int(least):
        return None
    return "does not fit: the KV cache is larger than the memory that is free"


def timed(row: ModelRow, weights, device: str) -> ModelRow:
    """The row with its times; with `error` where this configuration cannot run on any rank."""
    row.error = refused_cache(weights, row.batch, row.context + 1, row.kv_dtype)
    if row.error:
        return row
    try:
        ops = library_sums.select_side(row.backend, device)
        decoder = Decoder(weights, ops, row.batch, row.context + 1, plan=row.plan, kv_dtype=row.kv_dtype)
    except ValueError as error:  # LabError: the same on all ranks
        row.error = error_text(error)
        return row
    fill(decoder, row.batch, row.context)
    step = timed_step(decoder, row.mode)
    sampled(row, step, weights)
    row.kv_bytes = sum(t.nbytes for t in decoder.cache.tensors())
    return row
