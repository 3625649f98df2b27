"""`lab bench model`: one decode step of a whole model: throughput, latency, memory, scaling with the batch.

Every configuration is measured for all backends side by side. mode=graph replays the decoder's CUDA graph (device
time); mode=eager launches op by op (host included); mode=compile is the peer in lab/harness/compiled.py. The KV cache
holds random data at the asked context, and the context is set back before every step, so all samples do the same work.
"""
import itertools
import random
import time
from dataclasses import replace

import torch

from lab.dispatch import DTYPES
from lab.errors import LabError
from lab.harness import compare, timing
from lab.harness.ceiling import one_line
from lab.harness.ops_bench import alive
from lab.harness.records import ModelRow
from lab.harness.shapes import preset
from lab.model.decoder import GREEDY, Decoder
from lab.model.weights import load, open_source

KV_SHARE = 0.75             # of the free memory, what the KV caches of all backends together may take


def tensors_of(weights):
    """Every distinct tensor of a model's weights."""
    found = {}
    for part in [weights, *weights.layers]:
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value
    return list(found.values())


def step_bytes(weights, batch, context):
    """Bytes that one step reads at least: all weights but an untied embedding table, and the KV of every sequence."""
    held = sum(t.nbytes for t in tensors_of(weights))
    if weights.lm_head.data_ptr() != weights.embed.data_ptr():
        held -= weights.embed.nbytes
    return held + batch * context * kv_bytes_per_token(weights)


def kv_bytes_per_token(weights):
    c = weights.config
    return 2 * c.layers * c.kv_width * weights.dtype.itemsize


def fill(decoder, batch, context):
    """Gives every row `context` tokens of random KV, so that the next step decodes token context + 1."""
    rand = random.Random(0)
    decoder.cache.k.normal_()
    decoder.cache.v.normal_()
    for row in range(batch):
        decoder.cache.extend(row, context + 1)      # the page that the new token's KV goes to
        decoder.cache.lengths[row] = context
        decoder.place(row, rand.randrange(decoder.config.vocab))


def timed_step(decoder, mode):
    """The decode step as something to sample; `mode` is graph, eager or (on a CPU) eager by the wall clock."""
    state, ids = decoder.state.clone(), decoder.ids.clone()

    def restore():
        decoder.state.copy_(state)
        decoder.ids.copy_(ids)

    @torch.inference_mode()
    def step():
        decoder.run_plan(decoder, GREEDY)

    if decoder.device.type != "cuda":
        return timing.WallTimed(step, restore)
    if mode == "eager":
        return timing.EagerTimed([step], restore)
    decoder.prepare()
    return timing.GraphTimed([step], restore, graph=decoder.graphs[GREEDY][0])


def measure_model(session, rig, name, dtype_name, batches, contexts, weights_kind="random", compiled=True,
                  progress=None):
    """All rows of one model. Loads its weights once; a configuration that fails becomes rows with `error`."""
    sizes = [(batch, context) for context in contexts for batch in sorted(batches)
             if context < preset(name).max_positions]
    todo = [s for s in sizes if not all(session.has(r) for r in _rows(session, rig, name, dtype_name, *s))]
    if not todo:
        return
    try:
        weights = load(open_source(name, weights_kind), DTYPES[dtype_name], rig.device)
    except LabError as e:                           # too large for this card, or no real weights of this preset
        for size in todo:
            session.add(*(replace(r, error=one_line(e)) for r in _rows(session, rig, name, dtype_name, *size)))
        return
    for batch, context in todo:
        if session.over():
            return
        if progress:
            progress(f"{name} b{batch} {context}")
        rows = _rows(session, rig, name, dtype_name, batch, context)
        for r in rows:
            r.weights = weights_kind
        peer = compiled and rig.device == "cuda" and batch == min(batches) and context == min(contexts)
        session.add(*_measure(session, rig, weights, rows, batch, context, peer))
        if rig.device == "cuda":
            torch.cuda.empty_cache()
            alive(f"{name} batch {batch} context {context}")


def _modes(rig):
    return ("graph", "eager") if rig.device == "cuda" else ("eager",)


def _rows(session, rig, name, dtype_name, batch, context):
    timer = {"graph": "graph", "eager": "event" if rig.device == "cuda" else "wall"}
    return [ModelRow(session.run, name, backend, plan, mode, dtype_name, batch, context, timer[mode],
                     emulated=rig.device != "cuda")
            for mode in _modes(rig) for plan in rig.plans for backend in rig.backends]


def _measure(session, rig, weights, rows, batch, context, peer):
    """Fills in `rows` (backend x plan x mode) and returns them, with the compiled peer's row where asked for."""
    decoders = len(rig.backends) * len(rig.plans)
    needed = batch * (context + 1) * kv_bytes_per_token(weights) * decoders
    if rig.device == "cuda" and needed > KV_SHARE * torch.cuda.mem_get_info()[0]:
        for r in rows:
            r.error = f"does not fit: the KV caches of {decoders} decoders side by side need {needed / 2**30:.1f} GiB"
        return rows
    entries = []                                    # (row, what to sample)
    for backend, plan in itertools.product(rig.backends, rig.plans):
        mine = [r for r in rows if (r.backend, r.plan) == (backend, plan)]
        try:
            decoder, memory = _build(weights, rig.backends[backend], plan, batch, context)
            for r in mine:
                for field, value in memory.items():
                    setattr(r, field, value)
                entries.append((r, timed_step(decoder, r.mode)))
        except Exception as e:                      # one backend that cannot run must not cost the others
            for r in mine:
                r.error = one_line(e)
    if peer:
        note = "torch.compile layer by layer, one CUDA graph; contiguous KV of this length, no mask"
        one = rows[0]
        rows.append(ModelRow(one.run, one.model, "torch", "-", "compile", one.dtype, batch, context, "graph",
                             weights=one.weights, note=note))
        try:
            from lab.harness.compiled import compiled_step
            entries.append((rows[-1], timing.GraphTimed([compiled_step(weights, batch, context)])))
        except Exception as e:
            rows[-1].error = one_line(e)
    nbytes = step_bytes(weights, batch, context + 1)
    for timer in ("graph", "event", "wall"):
        group = [(r, t) for r, t in entries if t.timer == timer and not r.error]
        try:
            limits = (2, 5) if timer == "wall" else (20, 300)
            stats = timing.measure({i: t for i, (_, t) in enumerate(group)}, rig.seconds * 4, *limits) if group else {}
        except Exception as e:
            stats = {}
            for r, _ in group:
                r.error = one_line(e)
        for i, s in stats.items():
            r = group[i][0]
            for field, value in {**s.fields(p99=True), **rig.ceilings.fields("read", nbytes, s.us)}.items():
                if hasattr(r, field):
                    setattr(r, field, value)
            r.bytes, r.tokens_per_s = nbytes, batch / s.us * 1e6
            r.verdict = {_name(group[j][0], rig): compare.verdict(other, s) for j, other in stats.items() if j != i}
            r.linearity = _linearity(r, [*session.of_kind("model"), *rows])
    return rows


def _name(row, rig):
    """How a verdict names the other side: the backend, with what else tells it apart."""
    words = [row.backend, row.plan if len(rig.plans) > 1 else "", "compile" if row.mode == "compile" else ""]
    return " ".join(w for w in words if w)


def _linearity(row, others):
    """Throughput over the ideal line through the smallest batch measured; 1 at that batch."""
    same = [o for o in others if o.tokens_per_s and all(
        getattr(o, f) == getattr(row, f) for f in ("model", "backend", "plan", "mode", "dtype", "context", "timer"))]
    base = min(same, key=lambda o: o.batch)
    return row.tokens_per_s / (base.tokens_per_s * row.batch / base.batch)


def _build(weights, ops, plan, batch, context):
    """(decoder, fields): a decoder ready to step, its time to first token and the memory that it takes."""
    cuda = weights.device.type == "cuda"
    base = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    decoder = Decoder(weights, ops, batch, context + 1, plan=plan)
    decoder.prepare()
    fields = {"ttft_ms": time_to_first_token(decoder, context, 2 if cuda else 1)}
    fill(decoder, batch, context)
    fields["weight_bytes"] = sum(t.nbytes for t in tensors_of(weights))
    fields["kv_bytes"] = decoder.cache.k.nbytes + decoder.cache.v.nbytes
    fields["page_utilisation"] = decoder.cache.utilisation()["fill"]
    if cuda:
        torch.cuda.synchronize()
        fields["steady_bytes"] = torch.cuda.memory_allocated() - base + fields["weight_bytes"]
        fields["peak_bytes"] = torch.cuda.max_memory_allocated() - base + fields["weight_bytes"]
        fields["workspace_bytes"] = fields["steady_bytes"] - fields["weight_bytes"] - fields["kv_bytes"]
    return decoder, fields


def time_to_first_token(decoder, context, tries):
    """Milliseconds from a prompt of `context` tokens to its first new token, one sequence; the last of `tries`."""
    rand = random.Random(1)
    ids = [rand.randrange(decoder.config.vocab) for _ in range(context)]
    sync = torch.cuda.synchronize if decoder.device.type == "cuda" else lambda: None
    for _ in range(tries):
        sync()
        start = time.perf_counter()
        decoder.admit(0, ids)
        decoder.step()
        sync()
        elapsed = (time.perf_counter() - start) * 1e3
        decoder.finish(0)
    return elapsed
