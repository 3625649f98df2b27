"""`lab bench model`: one decode step of a whole model: throughput, latency, memory, scaling with the batch.

Every configuration is measured for all backends and plans side by side, or for as many as the memory takes.
mode=graph replays the decoder's CUDA graph (device time); mode=eager launches op by op (host included);
mode=compile is the peer in lab/harness/compiled.py. The KV cache holds random data at the asked context, and
the context is set back before every step, so all samples do the same work.
"""

import gc
import random
import time

import torch

from lab.contract import DTYPES
from lab.errors import LabError, error_text
from lab.harness import timing
from lab.harness.ops_bench import alive
from lab.model.decoder import Decoder
from lab.model.families import PRESETS
from lab.model.kv_cache import token_bytes
from lab.model.sampling import GREEDY
from lab.model.sources import open_source
from lab.model.weight_formats import AS_STORED
from lab.model.weights import load, planned
from lab.records import compare
from lab.records.schema import ModelRow

KV_SHARE = 0.75  # of the free memory, what the KV caches of decoders side by side may take


def step_bytes(weights, batch, context, kv_dtype=None):
    """Bytes that one step reads at least: the weights, and the KV of every sequence."""
    return weights.step_nbytes + batch * context * token_bytes(weights.config, weights.dtype, kv_dtype)


def fill(decoder, batch, context):
    """Gives every row `context` tokens of random KV, so that the next step decodes token context + 1."""
    fill_rows(decoder, [context + 1] * batch)


def fill_rows(decoder, contexts):
    """Gives each row random KV, so that its token of the next step attends to so many tokens, itself
    included."""
    rand = random.Random(0)
    decoder.cache.fill_random()
    for row, context in enumerate(contexts):
        decoder.cache.extend(row, context)  # with the page that the new token's KV goes to
        decoder.cache.lengths[row] = context - 1
        decoder.place(row, rand.randrange(decoder.config.vocab))


def timed_step(decoder, mode):
    """The decode step as something to sample; `mode` is graph, eager or (on a CPU) eager by the wall
    clock."""
    state, ids = decoder.state.clone(), decoder.ids.clone()

    def restore():
        decoder.state.copy_(state)
        decoder.ids.copy_(ids)

    @torch.inference_mode()
    def step():
        decoder.run_plan(GREEDY)

    if decoder.device.type != "cuda":
        return timing.WallTimed(step, restore)
    if mode == "eager":
        return timing.EagerTimed([step], restore)
    decoder.prepare()
    return timing.GraphTimed([step], restore, graph=decoder.graphs[GREEDY, decoder.batch][0])


class Weights:
    """The weights of one model at a time, on the rig's device: `of` loads them, `drop` frees the memory."""

    def __init__(self, kind, dtype_name, device, storage=AS_STORED, shelf=None):
        self.kind, self.dtype, self.device, self.storage = kind, DTYPES[dtype_name], device, storage
        self.shelf = {} if shelf is None else shelf  # what is in memory, by model and storage
        self.formats = {}  # of the models asked for

    @classmethod
    def of_storages(cls, kind, dtype_name, device, storages):
        """One for each storage; together they hold one model at a time."""
        shelf = {}
        return [cls(kind, dtype_name, device, storage, shelf) for storage in storages]

    def of(self, name):
        """Raises LabError for a model that is too large for this card or has no real weights here."""
        key = name, self.storage
        if key not in self.shelf:
            self.drop()
            self.shelf[key] = load(open_source(name, self.kind), self.dtype, self.device, self.storage)
        return self.shelf[key]

    def config_of(self, name):
        """The configuration of a preset, a file or a folder."""
        return PRESETS[name] if name in PRESETS else open_source(name, self.kind).config

    def format_of(self, name):
        """The weight formats of a model as records name them, found without loading it; None where all its
        matrices are plain, or it has no real weights here."""
        if self.kind == "random" and self.storage.quantise is None:
            return None
        if name not in self.formats:
            try:
                config, formats = planned(open_source(name, self.kind), self.dtype, self.storage)
                self.formats[name] = formats.text(config, self.dtype) if formats.packed else None
            except LabError:  # of() will say it again
                self.formats[name] = None
        return self.formats[name]

    def drop(self):
        if self.shelf:  # a collection takes a tenth of a second
            self.shelf.clear()
            release(self.device)


def release(device):
    """Gives back what nothing needs any more, so that the free memory that is asked next is all there is."""
    gc.collect()  # decoders and their graphs refer to each other
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_model(session, rig, weights, name, dtype_name, batch, context):
    """All rows of one model at one size; a configuration that fails becomes rows with `error`. weights:
    Weights."""
    rows = _rows(session, rig, weights, name, dtype_name, batch, context)
    if not all(map(session.has, rows)):
        session.add(*_filled(session, rig, weights, rows))


def measure_compiled(session, rig, weights, name, dtype_name, batch, context):
    """The row of the torch.compile peer, interleaved with the graphs of all decoders: a verdict on each is in
    it."""
    peer = ModelRow(
        session.run,
        name,
        "torch",
        "-",
        "compile",
        dtype_name,
        batch,
        context,
        "graph",
        weight_format=weights.format_of(name),
        note="torch.compile layer by layer, one CUDA graph; contiguous KV of this length, no mask",
    )
    if not session.has(peer):
        rows = _rows(session, rig, weights, name, dtype_name, batch, context)
        others = [r for r in rows if r.mode == "graph"]
        _filled(session, rig, weights, [*others, peer])
        session.add(peer)


def _filled(session, rig, weights, rows):
    """The rows, all of one model and size, with what was measured of them."""
    name, batch, context = rows[0].model, rows[0].batch, rows[0].context
    for r in rows:
        r.weights = weights.kind
    try:
        loaded = weights.of(name)
    except LabError as e:
        for r in rows:
            r.error = error_text(e)
        return rows
    sides = list(dict.fromkeys((r.backend, r.plan) for r in rows if r.mode != "compile"))
    groups = together(
        rig, sides, batch * (context + 1) * token_bytes(loaded.config, loaded.dtype, rig.kv_dtype)
    )
    if not groups:
        for r in rows:
            r.error = "does not fit: the KV cache is larger than the memory that is free"
    for i, sides in enumerate(groups):
        mine = [r for r in rows if (r.backend, r.plan) in sides or r.mode == "compile" and i == 0]
        _measure(session, rig, loaded, mine, sides, batch, context)
        release(rig.device)
    if rig.device == "cuda":
        alive(f"{name} batch {batch} context {context}")
    return rows


def together(rig, sides, kv_bytes):
    """The (backend, plan) pairs `sides`, grouped by what is measured side by side: all, or a plan, or what
    fits of it.

    kv_bytes: of one decoder's cache; [] when not even one fits beside the weights that are loaded.
    """
    if rig.device != "cuda":
        return [sides]
    fit = int(KV_SHARE * torch.cuda.mem_get_info()[0] // kv_bytes)
    if not fit or fit >= len(sides):
        return [sides] if fit else []
    by_plan = [[side for side in sides if side[1] == plan] for plan in rig.plans]
    return [one[i : i + fit] for one in by_plan for i in range(0, len(one), fit)]


def _modes(rig):
    return ("graph", "eager") if rig.device == "cuda" else ("eager",)


def _rows(session, rig, weights, name, dtype_name, batch, context):
    timer = {"graph": "graph", "eager": "event" if rig.device == "cuda" else "wall"}
    packed = weights.format_of(name)
    return [
        ModelRow(
            session.run,
            name,
            backend,
            plan,
            mode,
            dtype_name,
            batch,
            context,
            timer[mode],
            weight_format=packed,
            kv_dtype=rig.kv_dtype,
            emulated=rig.device != "cuda",
        )
        for mode in _modes(rig)
        for backend, plan in rig.sides(batch, dtype_name)
    ]


def _measure(session, rig, weights, rows, sides, batch, context):
    """Fills in `rows`, those of the (backend, plan) pairs `sides` and perhaps the compiled peer's, side by
    side."""
    entries = []  # (row, what to sample)
    for backend, plan in sides:
        mine = [r for r in rows if (r.backend, r.plan) == (backend, plan)]
        try:
            decoder, memory = _build(weights, rig.backends[backend], plan, batch, context, rig.kv_dtype)
            for r in mine:
                for field, value in memory.items():
                    setattr(r, field, value)
                entries.append((r, timed_step(decoder, r.mode)))
        except Exception as e:  # one backend that cannot run must not cost the others
            for r in mine:
                r.error = error_text(e)
    for r in (r for r in rows if r.mode == "compile"):
        try:
            from lab.harness.compiled import compiled_step

            entries.append((r, timing.GraphTimed([compiled_step(weights, batch, context)])))
        except Exception as e:
            r.error = error_text(e)
    nbytes = step_bytes(weights, batch, context + 1, rig.kv_dtype)
    for timer in ("graph", "event", "wall"):
        group = [(r, t) for r, t in entries if t.timer == timer and not r.error]
        try:
            limits = (2, 5) if timer == "wall" else (20, 300)
            stats = (
                timing.measure({i: t for i, (_, t) in enumerate(group)}, rig.seconds * 4, *limits)
                if group
                else {}
            )
        except Exception as e:
            stats = {}
            for r, _ in group:
                r.error = error_text(e)
        for i, s in stats.items():
            r = group[i][0]
            for field, value in {**s.fields(p99=True), **rig.ceilings.fields("read", nbytes, s.us)}.items():
                if hasattr(r, field):
                    setattr(r, field, value)
            r.bytes, r.tokens_per_s = nbytes, batch / s.us * 1e6
            r.verdict = {
                _name(group[j][0], rig): compare.verdict(other, s) for j, other in stats.items() if j != i
            }
            r.linearity = _linearity(r, [*session.of_kind("model"), *rows])


def _name(row, rig):
    """How a verdict names the other side: the backend, with what else tells it apart."""
    words = [row.backend, row.plan if len(rig.plans) > 1 else "", "compile" if row.mode == "compile" else ""]
    return " ".join(w for w in words if w)


def _linearity(row, others):
    """Throughput over the ideal line through the smallest batch measured; 1 at that batch."""
    same = [
        o
        for o in others
        if o.tokens_per_s
        and all(
            getattr(o, f) == getattr(row, f)
            for f in (
                "model",
                "backend",
                "plan",
                "mode",
                "dtype",
                "context",
                "timer",
                "weight_format",
                "kv_dtype",
            )
        )
    ]
    base = min(same, key=lambda o: o.batch)
    return row.tokens_per_s / (base.tokens_per_s * row.batch / base.batch)


def _build(weights, ops, plan, batch, context, kv_dtype=None):
    """(decoder, fields): a decoder ready to step, its time to first token and the memory that it takes."""
    cuda = weights.device.type == "cuda"
    base = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    decoder = Decoder(weights, ops, batch, context + 1, plan=plan, kv_dtype=kv_dtype)
    decoder.prepare()
    fields = {"ttft_ms": time_to_first_token(decoder, context, 2 if cuda else 1)}
    fill(decoder, batch, context)
    fields["weight_bytes"] = weights.nbytes
    fields["kv_bytes"] = sum(t.nbytes for t in decoder.cache.tensors())
    fields["page_utilisation"] = decoder.cache.utilisation()["fill"]
    if cuda:
        torch.cuda.synchronize()
        fields["steady_bytes"] = torch.cuda.memory_allocated() - base + fields["weight_bytes"]
        fields["peak_bytes"] = torch.cuda.max_memory_allocated() - base + fields["weight_bytes"]
        fields["workspace_bytes"] = fields["steady_bytes"] - fields["weight_bytes"] - fields["kv_bytes"]
    return decoder, fields


def time_to_first_token(decoder, context, tries):
    """Milliseconds from a prompt of `context` tokens to its first new token, one sequence; the last of
    `tries`."""
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
