"""`lab bench ops`: every op, backend, dtype and size: cold, in-model, warm and host-inclusive times, A B B A.

cache=cold: all arguments rotate over distinct buffers. in_model: weights and KV rotate, activations stay.
warm: one buffer set. These are device times (timer=graph). timer=event: eager calls, the host's time
included. On a CPU one wall time is recorded instead, marked emulated.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from lab.contract import BACKENDS, DTYPES, Peer, Rand, dtype_name
from lab.dispatch import select
from lab.errors import LabError, Unavailable, error_text
from lab.harness import timing, untuned
from lab.harness.shapes import arguments, key_shape
from lab.model.plans import refusal
from lab.ops import find
from lab.records import compare
from lab.records.schema import OpRow
from lab.tune import tuned

MODES = (("cold", "graph"), ("in_model", "graph"), ("warm", "graph"), ("cold", "event"))
QUICK_MODES = (("cold", "graph"), ("cold", "event"))
RACE_MODES = (("cold", "graph"),)  # beside a file of `lab try`, whose own process measures no other
EMULATED = (("warm", "wall"),)
QUICK_SECONDS = 0.06
EAGER_US = 1500.0  # one eager sample lasts about this long
FREE_SHARE = 0.6  # of the free memory, what the buffer sets may take


@dataclass
class Rig:
    """What measuring on one device needs: its backends, the ceilings, its properties, how long to sample."""

    device: str
    backends: dict  # name -> lab.dispatch.Ops
    ceilings: object
    multiprocessors: int = 1
    l2_bytes: int = 0
    flush: object = None
    seconds: float = 0.12
    vendor: bool = True
    modes: tuple = MODES
    plans: tuple = ("basic",)  # of the decoder, for models and ledgers
    lean: bool = False  # the torch reference under the first plan only
    kv_dtype: str | None = None  # of the models' KV cache; None: the model's dtype

    @property
    def file(self):
        """The file of `lab try` among the backends, whose own process measures it, or None."""
        return next((ops for ops in self.backends.values() if hasattr(ops, "timed")), None)

    def having(self, op, packed=False):
        """Names of the backends that have the op: a language, or the file of `lab try`, may have some alone.
        torch has no kernels for packed weights: it expands them at every call, and is measured only where
        nothing else is."""
        found = [name for name, ops in self.backends.items() if hasattr(ops, op.name)]
        return [name for name in found if name != "torch"] or found if packed else found

    def sides(self, batch, dtype_name):
        """(backend, plan) of every decoder to measure at a batch and dtype, which rule some plans out.

        torch has no kernel of a whole step: under persistent it does what it does under fused. Beside other
        backends it is measured once.
        """
        again = ()  # plans under which torch is left out
        if self.lean:
            again = self.plans[1:]
        elif "fused" in self.plans and list(self.backends) != ["torch"]:
            again = ("persistent",)
        whole = [name for name, ops in self.backends.items() if getattr(ops, "whole", True)]
        return [
            (backend, plan)
            for plan in self.plans
            for backend in whole
            if not refusal(plan, batch, DTYPES[dtype_name]) and not (backend == "torch" and plan in again)
        ]


def load_backends(names, device, asked):
    """({name: Ops}, notes). A backend that this machine lacks is an error when asked for by name, else a
    note."""
    found, notes = {}, []
    for name in names or BACKENDS:
        try:
            found[name] = select(name, device, partial=True)
        except Unavailable as e:
            if asked:
                raise
            notes.append(f"{name} left out: {e}")
    if not found:
        raise LabError("no backend can run on this machine: " + "; ".join(notes))
    return found, notes


def make_rig(backends, device, ceilings, quick=False, seconds=None):
    """seconds: of sampling; None: what the device and `quick` ask for."""
    if device != "cuda":
        return Rig(
            device,
            backends,
            ceilings,
            modes=EMULATED,
            vendor=False,
            seconds=0.3 if seconds is None else seconds,
        )
    if seconds is None:
        seconds = QUICK_SECONDS if quick else Rig.seconds
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Rig(
        device,
        backends,
        ceilings,
        p.multi_processor_count,
        p.L2_cache_size,
        timing.Flush(p.L2_cache_size, device),
        seconds,
        modes=QUICK_MODES if quick else MODES,
    )


def measure_point(session, rig, point, dtype_name, modes=None):
    """Measures one point in every mode of the rig (or in `modes`) and records the rows that the session
    lacks.

    What fails is recorded as rows with `error`. Raises LabError when the CUDA context is lost.
    """
    op = find(point.op)
    dtype = DTYPES[dtype_name]
    if dtype not in op.dtypes:  # sample takes float32 logits whatever the model's dtype
        dtype = op.dtypes[0]
        dtype_name = next(name for name, d in DTYPES.items() if d == dtype)

    def row(backend, cache, timer):
        return OpRow(
            session.run,
            op.name,
            backend,
            dtype_name,
            point.batch,
            point.shape,
            point.context,
            cache,
            timer,
            role=point.role,
            kv_dtype=point.shape.get("kv_dtype"),
            models=list(point.models),
            weight_format=point.format,
            emulated=timer == "wall",
        )

    modes = [(c, t) for c, t in modes or rig.modes if c != "in_model" or op.cold]
    backends = rig.having(op, point.format is not None)
    todo = [m for m in modes if not all(session.has(row(b, *m)) for b in backends)]
    if not todo:
        return
    try:
        bound = BoundPoint(op, point, dtype, rig)
    except (RuntimeError, LabError) as e:  # out of memory, a size that the op does not take
        session.add(*(dataclasses.replace(row(b, *m), error=error_text(e)) for m in todo for b in backends))
        return
    cold_us = {}
    for cache, timer in todo:
        rows, timed = {}, {}
        for name in bound.names(cache, timer):
            rows[name] = row(name, cache, timer)
            rows[name].bytes, rows[name].flops = bound.nbytes, bound.flops
            rows[name].config = {**bound.config, **_tuned(name, point, dtype, rig)}
            try:
                rows[name].rms_error = bound.checked(name)
                timed[name] = bound.timed(name, cache, timer, cold_us.get(name))
            except Exception as e:  # one backend that cannot run must not cost the others
                rows[name].error = error_text(e)
            if refusal := getattr(timed.get(name), "refused", None):  # the file of `lab try`
                rows[name].error = str(refusal)
                del timed[name]
        stats = _measured(timed, rig, timer, rows)
        for name in list(stats):
            if (finish := getattr(timed[name], "finish", None)) and (refusal := finish()):
                rows[name].error = str(refusal)
                del stats[name]
        for name, s in stats.items():
            for field, value in {
                **s.fields(),
                **rig.ceilings.fields(op.direction, bound.nbytes, s.us, cache, rig.l2_bytes),
            }.items():
                setattr(rows[name], field, value)
            if timer == "event":  # the host's time says nothing about a share of the ceiling
                rows[name].of_ceiling = rows[name].of_stream = rows[name].flag = None
            if (cache, timer) == ("cold", "graph"):
                cold_us[name] = s.us
        for name, s in stats.items():
            rows[name].verdict = {
                other: compare.without_win(compare.verdict(stats[other], s), rows[other], rows[name])
                for other in stats
                if other != name
            }
        for t in timed.values():
            t.close()
        session.add(*rows.values())
        if rig.device == "cuda":
            alive(op.name)


def _tuned(backend, point, dtype, rig):
    """{"tuned": was a setting raced for this launch on this architecture}; {} where there is nothing to
    choose."""
    if rig.device != "cuda" or backend not in find(point.op).spaces or "kv_dtype" in point.shape:
        return {}
    major, minor = torch.cuda.get_device_capability()
    found = untuned.raced(
        backend,
        point.op,
        point.batch,
        dtype.itemsize,
        key_shape(point),
        tuned.read(tuned.path_of(backend, f"sm_{major}{minor}")),
        point.format,
    )
    return {} if found is None else {"tuned": found}


def _measured(timed, rig, timer, rows):
    """The statistics of all entries; on a failure, which no entry can be blamed for, every row gets the
    error."""
    if not timed:
        return {}
    try:
        least, most = (2, 10) if timer == "wall" else (15, 200)
        seconds = rig.seconds * (0.5 if timer == "event" else 1.0)
        return timing.measure(timed, seconds, least, most)
    except Exception as e:
        for name in timed:
            rows[name].error = error_text(e)
        return {}


def alive(what):
    """Raises LabError when the CUDA context is lost (an illegal access, say): nothing after it can be
    measured."""
    try:
        torch.cuda.synchronize()
    except Exception as e:
        raise LabError(
            f"the CUDA context is lost after {what} ({error_text(e)}); what was measured is recorded: run "
            "the same command again to go on behind it"
        ) from None


def _result(op, found):
    """The product among what an op, or its reference, gives: numbers, not the token that they choose."""
    return next(t for t in found if t.is_floating_point())


def rms_error(got, want):
    """The root mean square of the difference over that of `want`."""
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


class BoundPoint:
    """One op at one size: its buffers, and calls on them by each backend and peer."""

    def __init__(self, op, point, dtype, rig):
        self.op, self.point, self.dtype_name, self.rig, self.made = op, point, dtype_name(dtype), rig, {}
        self.errors, self.packed = {}, point.format is not None
        args, self.config = arguments(op, point, Rand(rig.device, dtype), rig.multiprocessors)
        a = op.bound(*args)
        if self.packed:  # the reference's results, with these weights and with those that they were made of
            self.exact = _result(op, op.reference(*args))
            plain = dataclasses.replace(point, format=None)
            plain, _ = arguments(op, plain, Rand(rig.device, dtype), rig.multiprocessors)
            self.unquantised = _result(op, op.reference(*plain))
            del plain
        self.nbytes, self.flops = int(op.nbytes(a)), int(op.flops(a))
        self.peers = {p.name: p for p in op.peers if rig.vendor and p.takes(a) and p.installed}
        file = rig.file  # if there is one, all others are measured on buffers as it has them
        count, self.calls, self.flushed = 1, 1, False
        if rig.device == "cuda":
            torch.cuda.empty_cache()  # what is free is about to be asked
            set_bytes = timing.bytes_of_args(args) * (1 + sum(p.copies for p in self.peers.values()))
            free = FREE_SHARE * torch.cuda.mem_get_info()[0] / (2 if file else 1)
            count, self.calls, self.flushed = timing.plan_sets(
                self.nbytes, rig.l2_bytes, set_bytes, free, once=file is not None
            )
        if file:
            self.sets, self.outs = file.laid_out(op, args, rig.device, count)
        else:
            self.sets = [args] + [timing.clone_args(args) for _ in range(count - 1)]
            self.outs = [op.outputs(*a) for a in self.sets]

    def names(self, cache, timer):
        """Backends and peers that have such a time (see Peer.copies)."""
        return [
            *self.rig.having(self.op, self.packed),
            *(
                name
                for name, p in self.peers.items()
                if not p.copies or (timer == "graph" and cache != "in_model")
            ),
        ]

    def checked(self, name):
        """With packed weights, the error of what a backend or a peer computes against the product of the
        weights that were rounded: relative RMS (see rms_error). Else None: `lab check` is for that.

        Raises LabError for one that does not multiply the packed weights, which must not be timed.
        """
        if not self.packed:
            return None
        if name not in self.errors:
            sound = timing.clone_args(self.sets[0])  # an op may change its arguments
            got = self.result_of(name, sound)
            away = rms_error(got, self.exact)
            most = self.peers[name].error if name in self.peers else Peer.error
            self.errors[name] = rms_error(got, self.unquantised), away if not away <= most else None
        error, away = self.errors[name]
        if away is not None:
            raise LabError(f"not timed: its result is {away:.2g} away from the reference (relative RMS)")
        return error

    def result_of(self, name, args):
        """What a backend or a peer computes from these arguments, which it may change."""
        if name in self.peers:
            return self.peers[name].make([args])[0]()
        out = self.op.outputs(*args)
        getattr(self.rig.backends[name], self.op.name)(*args, out=out)
        changed = self.op.bound(*args)
        found = ([] if out is None else [out]) + [getattr(changed, each) for each in self.op.mutates]
        return _result(self.op, found)

    def bind(self, name, in_model=False):
        """One call per buffer set. in_model: activations and output of the first set, weights and KV of
        each."""
        if (name, in_model) in self.made:
            return self.made[name, in_model]
        sets, outs = self.sets, self.outs
        if in_model:
            sets = [
                tuple(
                    own if name in self.op.cold else first
                    for name, own, first in zip(self.op.names, args, sets[0])
                )
                for args in sets
            ]
            outs = outs[:1] * len(sets)
        if name in self.peers:
            calls = self.peers[name].make(sets)
        else:
            run = getattr(self.rig.backends[name], self.op.name)
            calls = [functools.partial(run, *args, out=out) for args, out in zip(sets, outs)]
        self.made[name, in_model] = calls
        return calls

    def timed(self, name, cache, timer, cold_us):
        file = self.rig.file
        if file and self.rig.backends.get(name) is file:
            return file.timed(self.point, self.dtype_name, self.rig, len(self.sets))
        distinct = self.bind(name, cache == "in_model")
        if timer == "wall":
            return timing.WallTimed(distinct[0])
        if timer == "event":
            n = int(min(64, max(2, EAGER_US / (cold_us or 20.0))))
            return timing.EagerTimed([distinct[i % len(distinct)] for i in range(n)])
        if cache == "warm":
            n = int(min(256, max(4, timing.GRAPH_US / (cold_us or timing.LAUNCH_US))))
            return timing.GraphTimed([distinct[0]] * n)
        return timing.GraphTimed(
            [distinct[i % len(distinct)] for i in range(self.calls)], self.rig.flush if self.flushed else None
        )
