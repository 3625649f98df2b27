"""`lab ledger MODEL --tensor-parallel N`: where the time of one decode step goes when several GPUs divide the
model. The exchanges between them are uses like the others, all_reduce_add and all_argmax.

The chains of lab/harness/ledger.py, measured on all ranks at once: every rank replays the same graphs in the
same order, a fixed number of times, since each graph waits for those of the other ranks. Rank 0 records its
own times. The rows are chains alone: a kernel's time stamps would hold its wait for the other ranks. On a CPU
the chains are timed by the host's clock, which says nothing about a GPU.
"""

import functools

import torch

from lab.contract import DTYPES
from lab.dispatch import Trace
from lab.errors import error_text
from lab.harness import ceiling, ledger, library_sums, model_bench, timing
from lab.harness.parallel_bench import refused_cache
from lab.model.decoder import Decoder
from lab.model.parallel import RankSource
from lab.model.plans import refusal
from lab.model.sampling import GREEDY
from lab.model.sources import open_source
from lab.model.weights import load
from lab.records.schema import LedgerRow

SAMPLES = {"cuda": 100, "cpu": 2}


def measure(group, settings, session):
    """Yields the rows of each backend and plan, at the first batch and context."""
    device, dtype_name = settings.device, settings.dtypes[0]
    dtype, batch, context = DTYPES[dtype_name], settings.model_batches[0], settings.model_contexts[0]
    ceilings = ceiling.Ceilings()
    if device == "cuda":
        ceilings = ceilings_of(session)
        torch.distributed.barrier()  # the others have waited
    for name in settings.models:
        source = RankSource(open_source(name, settings.weights), group.rank, group.ranks)
        weights = load(source, dtype, device, settings.storage, group)
        for backend, plan in library_sums.sides(settings):
            if refusal(plan, batch, dtype):
                continue
            base = dict(
                run="",
                model=name,
                backend=backend,
                plan=plan,
                dtype=dtype_name,
                batch=batch,
                context=context,
                weight_format=weights.formats if weights.packed else None,
                kv_dtype=settings.kv_dtype,
                ranks=group.ranks,
                emulated=device == "cpu",
            )
            yield account(base, weights, device, ceilings)
            model_bench.release(device)
        del weights
        model_bench.release(device)


def ceilings_of(session) -> ceiling.Ceilings:
    """Those of rank 0's GPU, which it records."""
    if session is None:
        return ceiling.Ceilings()
    for rows in ceiling.measure(session.run, quick=True):
        session.add(*rows)
    torch.cuda.empty_cache()
    return ceiling.Ceilings.of(session.rows)


def account(base, weights, device, ceilings) -> list[LedgerRow]:
    """The rows of one backend and plan; one row with `error` where it cannot run on any rank."""
    size = base["batch"], base["context"] + 1
    if error := refused_cache(weights, *size, base["kv_dtype"]):
        return [LedgerRow(**base, row="total", error=error)]
    try:
        ops = library_sums.select_side(base["backend"], device, Trace())
        decoder = Decoder(weights, ops, *size, plan=base["plan"], kv_dtype=base["kv_dtype"])
    except ValueError as error:  # LabError: the same on all ranks
        return [LedgerRow(**base, row="total", error=error_text(error))]
    model_bench.fill(decoder, base["batch"], base["context"])
    calls = ledger.record_step(decoder)
    order = [(index, name) for index, call in enumerate(calls) for name in call.kernels] + [(None, "add")]
    stats, launch_us = chain_times(decoder, calls)
    token = stats.pop("token")
    rows = ledger.account(base, calls, order, [], token, stats, launch_us, ceilings, overlap=True)
    for number, row in enumerate(rows):
        row.order = number
        row.timer = "graph" if device == "cuda" else "wall"
    return rows


def chain_times(decoder, calls):
    """({use: Stats of its chain, "token": Stats of the step}, what launching a graph costs in us)."""
    device, step = decoder.device.type, model_bench.timed_step(decoder, "graph")
    last = functools.partial(decoder.state.clone().add_, decoder.live)
    chains = {use: ledger.all_of(mine) for use, mine in ledger.chains(calls, last).items()}
    if device == "cpu":
        timed = {use: timing.WallTimed(chain, step.before) for use, chain in chains.items()}
        return sampled(timed | {"token": step}, device), 0.0
    whole = timing.GraphTimed([ledger.all_of([step.before, functools.partial(decoder.run_plan, GREEDY)])])
    step.before()

    def before():  # as in ledger.measure_backend; the last kernel of a whole token waits for all ranks
        torch.cuda._sleep(ledger.AHEAD)
        whole.graph.replay()
        step.before()

    timed = {use: timing.GraphTimed([chain], before) for use, chain in chains.items()}
    timed["token"] = timing.GraphTimed([step], before, graph=step.graph)
    nulls = ledger.null_graphs(decoder.device, before)
    stats = sampled(timed | nulls, device)
    launch_us = ledger.launch_cost(stats)
    for one in (whole, *timed.values(), *nulls.values()):
        one.close()
    return stats, launch_us


def sampled(timed: dict, device: str) -> dict:
    """Stats of each, sampled in turn so many times on all ranks; the first sample is dropped."""
    samples = {name: [] for name in timed}
    torch.distributed.barrier()
    for _ in range(SAMPLES[device] + 1):
        for name, one in timed.items():
            samples[name].append(one.sample())
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        name: timing.summarize([timed[name].read(sample) for sample in found[1:]])
        for name, found in samples.items()
    }
