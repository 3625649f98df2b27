"""`lab ledger MODEL`: where the time of one decode step goes. A use is an op in its role, as `linear o`.

Four things are measured:
  1. The token: the decoder's CUDA graph, replayed between two events. No profiler.
  2. Chains: T(k) is the time of a graph of all calls of the step's first k uses, in order of their first
     appearance. The calls keep the step's order and run in place, on every layer's own weights and KV. The
     time of use k is T(k) - T(k-1): by how much the chain grows when the calls of use k join. These times add
     up to T(all) exactly. Where two kernels overlap, the time saved is taken from the later use.
     Before each sample a whole token runs, so that L2 holds what it holds when tokens follow each other. That
     token is a graph of its own, also before the sample of the token itself: replays of one graph in a row
     were faster than replays that alternate with another graph's (SmolLM2-135M, Triton, basic plan, on an
     H100: 722 us, and the same calls in a graph that alternates 774).
  3. Kernels: device time stamps (torch's profiler, CUPTI) of the token's kernels. Which op launched which
     comes from one eager step with a marker kernel around every op; the order of kernels in the graph is the
     same.
  4. A graph that does nothing: what launching a graph costs, which the token pays once.
Where kernels overlap (programmatic dependent launch), time stamps do not add up: then the rows are `chain`,
the time of a use by its chain, and `gap` is the graph's launch. Elsewhere the rows are `kernel`, and `gap` is
T(all) minus the time stamps: the device's idle time. In both, `unexplained` is the token minus T(all); above
3% of the token a flag says that the chains do not stand for the token. Gaps cannot be read off the time
stamps: the profiler widens them.
"""

import functools
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from lab.dispatch import select
from lab.errors import LabError, error_text
from lab.harness import model_bench, shapes, timing
from lab.harness.ops_bench import alive
from lab.harness.timing import device_events
from lab.model.decoder import Decoder
from lab.model.sampling import GREEDY
from lab.ops import find
from lab.records.schema import LedgerRow

MARKER = "spin_kernel"  # torch.cuda._sleep's kernel: nothing else in a decode step is called so
REPLAYS = 20  # replays under the profiler
AHEAD = 1_000_000  # cycles, 0.6 ms, in which the host launches two graphs: neither then waits for the host
NULLS = 32  # kernels that do nothing, to tell a graph's launch from a kernel's
SWAP_SECONDS = 1.0  # of sampling all tokens of a plan's swaps together
TOLERANCE = 0.03  # of the token, for what is unexplained
OVERLAP = 0.01  # of the token; time stamps that overlap by more do not add up
# (language, plan) whose kernels overlap: one allows the next to launch before it has ended, and the next is
# launched so. That takes two kernels, so it is a fact of a plan and not of an op. They are named so that the
# kind of their rows does not depend on how much they happened to overlap in a run; of other languages and
# plans the time stamps tell (OVERLAP).
DEPENDENT = {("cuda", "basic"), ("cuda", "fused"), ("triton", "fused")}
OTHER = ("other", None)  # stands for a use: the kernel that advances the positions, which no op launches


@dataclass
class Call:
    """One op call of a step: what it is, the bytes it must move, and how to make it again."""

    op: str
    role: str | None
    nbytes: int
    again: object
    kernels: list = field(default_factory=list)  # names, in order


class Recorder:
    """Takes the place of a decoder's ops and notes every call, and its kernels where the ops have a trace.
    mark: a marker kernel runs before and after each."""

    def __init__(self, ops, config, mark=False):
        self.ops, self.trace, self.mark, self.calls = ops, None, mark, []
        self.config = config

    def __getattr__(self, name):
        op, run = find(name), getattr(self.ops, name)

        def call(*args, **options):
            a = op.bound(*args, **{k: v for k, v in options.items() if k != "out"})
            # nbytes may read the device, and its kernels must not stand between the marks.
            nbytes = 0 if self.mark else int(op.nbytes(a))
            self.calls.append(
                Call(name, role_of(op, self.config, a), nbytes, functools.partial(run, *args, **options))
            )
            if self.mark:
                torch.cuda._sleep(1)
            trace = getattr(self.ops, "trace", None)
            counted = Counter(trace.counts) if trace is not None else None
            result = run(*args, **options)
            if self.mark:
                torch.cuda._sleep(1)
            if trace is not None:
                new = trace.counts - counted
                self.calls[-1].kernels = [kernel for *_, kernel in new.elements()]
            return result

        return call


def role_of(op, config, a):
    """The role of a call in a model's step: that of the use which has the sizes of its arguments, of the last
    one where several have."""
    if op.use_of is None:
        return None
    told = op.use_of(a)
    roles = [
        role for role, sizes in op.uses(config) if all(sizes.get(key) == value for key, value in told.items())
    ]
    return roles[-1] if roles else None


def record_step(decoder, mark=False):
    """The op calls of one eager step; the decoder's state is as before."""
    buffers, state, ids = decoder.buffers, decoder.state.clone(), decoder.ids.clone()
    real = buffers.ops
    recorder = buffers.ops = Recorder(real, decoder.config, mark)
    try:
        with torch.inference_mode():
            decoder.run_plan(GREEDY)
    finally:
        buffers.ops = real
        decoder.state.copy_(state)
        decoder.ids.copy_(ids)
    return recorder.calls


def split_by_marks(events, calls):
    """Assigns device events of a marked eager step to its calls (their .kernels); returns the names outside
    all calls.

    Every call has one marker before it and one after it. So the events are: marker, the first call's kernels,
    marker, kernels outside all calls, marker, the second call's kernels, marker, and so on.
    """
    inside, index, outside = False, -1, []
    for name, *_ in events:
        if MARKER in name:
            inside = not inside
            index += inside
        elif inside:
            calls[index].kernels.append(name)
        else:
            outside.append((index, name))
    if inside or index + 1 != len(calls):
        raise LabError(
            f"the profiler saw {index + 1} marked calls of {len(calls)}: no ledger can be made of that"
        )
    return outside


def sequence(calls, outside):
    """[(call index or None, kernel name)] of one step in launch order."""
    by_index = defaultdict(list)
    for index, name in outside:
        by_index[index].append(name)
    order = [(None, name) for name in by_index[-1]]
    for i, call in enumerate(calls):
        order += [(i, name) for name in call.kernels] + [(None, name) for name in by_index[i]]
    return order


def replays_of(events):
    """The events of every replay, each of which a marker precedes: [[(name, start ns, duration ns), ...],
    ...]."""
    replays = []
    for event in events:
        if MARKER in event[0]:
            replays.append([])
        elif replays:
            replays[-1].append(event)
    if not replays:
        raise LabError("the profiler saw no replay of the graph: no ledger can be made of that")
    return replays


def kernel_times(replays, order):
    """Microseconds of every place of `order`, summarized over replays.

    What follows a replay's kernels are the copies that set the state back for the next one. Raises LabError
    when the graph's kernels are not those of the eager step.
    """
    names = [name for _, name in order]
    for replay in replays:
        seen = [name for name, *_ in replay]
        if seen[: len(names)] != names or any("Memcpy" not in name for name in seen[len(names) :]):
            wrong = next(
                (f"{i} is {a}, not {b}" for i, (a, b) in enumerate(zip(seen, names)) if a != b), None
            )
            raise LabError(
                f"the graph ran {len(seen)} kernels and the eager step {len(names)}"
                + (f": number {wrong}" if wrong else "")
            )
    return [timing.summarize([replay[place][2] / 1e3 for replay in replays]) for place in range(len(names))]


def overlap_us(replays, count):
    """Microseconds of a replay, on average, in which one of its `count` kernels had begun and the one before
    not ended."""
    total = sum(
        max(0, start + duration - after)
        for replay in replays
        for (_, start, duration), (_, after, _) in itertools.pairwise(replay[:count])
    )
    return total / len(replays) / 1e3


def uses_of(calls):
    """The step's uses in order of first appearance, last the decoder's own kernels."""
    return [*dict.fromkeys((c.op, c.role) for c in calls), OTHER]


def chains(calls, last):
    """{use: calls of a graph}: each the step's calls of all uses up to this one. last: the decoder's own
    kernels."""
    uses = uses_of(calls)
    made = {use: [c.again for c in calls if (c.op, c.role) in uses[:k]] for k, use in enumerate(uses, 1)}
    made[OTHER].append(last)
    return made


def account(base, calls, order, times, token, chained, launch_us, ceilings, overlap):
    """The ledger's rows. base: LedgerRow fields common to all. times: Stats per place of `order`. token:
    Stats.

    chained: {use: Stats of its chain} in the chains' order. launch_us: what a graph's own launch adds.
    overlap: whether kernels overlap, so that the rows are chains and not kernels.
    """
    together = list(chained.values())[-1].us
    if overlap:
        rows = chain_rows(base, calls, order, token, chained, launch_us, ceilings)
        gap, note = (
            launch_us,
            "the graph's launch; kernels overlap, so the gaps between them are in the chains",
        )
    else:
        rows = kernel_rows(base, calls, order, times, token, ceilings)
        gap, note = together - sum(r.us for r in rows), "the longest chain minus its kernels' time stamps"
    unexplained = token.us - together
    rows.append(
        LedgerRow(
            **base, row="gap", us=gap, of_token=gap / token.us, timer="graph", calls=len(order), note=note
        )
    )
    rows.append(
        LedgerRow(
            **base,
            row="unexplained",
            us=unexplained,
            of_token=unexplained / token.us,
            timer="graph",
            flag="above 3% of the token" if abs(unexplained) > TOLERANCE * token.us else None,
        )
    )
    return rows + [total_row(base, token, calls, ceilings)]


def chain_rows(base, calls, order, token, chained, launch_us, ceilings):
    """A row per use: its chain's time minus that of the chain before."""
    names = defaultdict(dict)  # use -> its kernels, each once
    for index, name in order:
        names[OTHER if index is None else (calls[index].op, calls[index].role)][short(name)] = None
    rows, before = [], timing.Stats(launch_us, launch_us, launch_us, launch_us, token.n)
    for k, (use, stats) in enumerate(chained.items(), 1):
        op, role = use
        us, mine = stats.us - before.us, [c for c in calls if (c.op, c.role) == use]
        low = math.hypot(stats.us - stats.us_p10, before.us_p90 - before.us)
        high = math.hypot(stats.us_p90 - stats.us, before.us - before.us_p10)
        rows.append(
            LedgerRow(
                **base,
                row="chain",
                op=op,
                role=role,
                kernel=" + ".join(names[use]),
                calls=len(mine) or 1,
                us=us,
                us_p10=us - low,
                us_p90=us + high,
                n=min(stats.n, before.n),
                of_token=us / token.us,
                timer="graph",
                note=f"chain difference: the first {k} uses minus the first {k - 1}, not an isolated kernel",
            )
        )
        _bandwidth(rows[-1], sum(c.nbytes for c in mine), ceilings)
        before = stats
    return rows


def kernel_rows(base, calls, order, times, token, ceilings):
    """A row per use and kernel: the sum of its time stamps."""
    groups = defaultdict(list)  # (op, role, kernel) -> places; ordered by first appearance
    for place, (index, name) in enumerate(order):
        op, role = OTHER if index is None else (calls[index].op, calls[index].role)
        groups[op, role, short(name)].append(place)
    heaviest = {}  # (op, role) -> its longest kernel, which gets the op's bytes
    for (op, role, name), places in groups.items():
        us = sum(times[p].us for p in places)
        if us > heaviest.get((op, role), ("", -1.0))[1]:
            heaviest[op, role] = name, us
    nbytes = Counter()
    for call in calls:
        nbytes[call.op, call.role] += call.nbytes
    rows = []
    for (op, role, name), places in groups.items():
        us = sum(times[p].us for p in places)
        rows.append(
            LedgerRow(
                **base,
                row="kernel",
                op=op,
                role=role,
                kernel=name,
                calls=len(places),
                us=us,
                us_p10=sum(times[p].us_p10 for p in places),
                us_p90=sum(times[p].us_p90 for p in places),
                n=min(times[p].n for p in places),
                of_token=us / token.us,
                timer="kineto",
            )
        )
        if heaviest[op, role][0] == name:
            _bandwidth(rows[-1], nbytes[op, role], ceilings)
    return rows


def _bandwidth(row, nbytes, ceilings):
    """Gives a row its op's bytes and what follows from them."""
    if not nbytes:
        return
    row.bytes = nbytes
    given = ceilings.fields(find(row.op).direction, nbytes, row.us) if row.us > 0 else {}
    row.gbps = given.get("gbps")
    if find(row.op).cold:  # activations come from L2: no share of DRAM's bandwidth
        row.of_ceiling, row.flag = given.get("of_ceiling"), given.get("flag")


def total_row(base, token, calls, ceilings):
    moved = sum(c.nbytes for c in calls if find(c.op).cold)
    given = ceilings.fields("read", moved, token.us)
    return LedgerRow(
        **base,
        row="total",
        **token.fields(),
        bytes=moved,
        gbps=given.get("gbps"),
        of_ceiling=given.get("of_ceiling"),
        of_token=1.0,
        timer="graph",
        calls=len(calls),
    )


def short(name):
    """A kernel's name without template arguments, return type and parameters."""
    depth, kept = 0, []
    for c in name.replace("(anonymous namespace)::", ""):
        if c in "<(":
            depth += 1
        elif c in ">)":
            depth -= 1
        elif depth == 0:
            kept.append(c)
    words = "".join(kept).split()
    return words[-1].split("::")[-1] if words else name


def measure(session, rig, weights, name, dtype_name, batch, context, backend, plan):
    """Records the ledger of a model under a backend and plan, once. weights: model_bench.Weights."""
    base = dict(
        run=session.run,
        model=name,
        backend=backend,
        plan=plan,
        dtype=dtype_name,
        batch=batch,
        context=context,
        weight_format=weights.format_of(name),
        kv_dtype=rig.kv_dtype,
    )

    def made():
        rows = measure_backend(base, rig, weights.of(name), rig.backends[backend], batch, context)
        for order, row in enumerate(rows):
            row.order = order
        return rows

    _record(session, rig, base, LedgerRow(**base, row="total"), made)


def measure_swap(session, rig, weights, name, dtype_name, batch, context, plan):
    """Records a token per op swapped of a model and plan, once; see measure_swaps."""
    base = dict(
        run=session.run,
        model=name,
        plan=plan,
        dtype=dtype_name,
        batch=batch,
        context=context,
        weight_format=weights.format_of(name),
        kv_dtype=rig.kv_dtype,
    )

    def made():
        given = name, plan, dtype_name, batch, context, base["weight_format"]
        return measure_swaps(session.run, rig, weights.of(name), *given)

    _record(session, rig, base, LedgerRow(**base, backend="triton", row="swap"), made)


def _record(session, rig, base, failed, made):
    """Records the rows that made() returns, unless the session has rows of these fields; where it cannot make
    them, the row `failed` with the error: one ledger must not cost what comes after it. Swaps and accounts
    are told apart."""
    swap = failed.row == "swap"
    if any(
        (r.row == "swap") == swap and all(getattr(r, f) == v for f, v in base.items())
        for r in session.of_kind("ledger")
    ):
        return
    try:
        rows = made()
    except Exception as e:
        failed.error = error_text(e)
        rows = [failed]
    session.add(*rows)
    model_bench.release(rig.device)
    alive(f"the swaps of {failed.model}" if swap else f"the ledger of {failed.model} under {failed.backend}")


def measure_backend(base, rig, weights, ops, batch, context):
    device_events(
        lambda: torch.zeros(1, device=rig.device)
    )  # the profiler attaches before any graph is captured
    decoder = Decoder(weights, ops, batch, context + 1, plan=base["plan"], kv_dtype=rig.kv_dtype)
    model_bench.fill(decoder, batch, context)
    decoder.prepare()
    step = model_bench.timed_step(decoder, "graph")
    graph = step.graph
    calls = record_step(decoder)  # with bytes; the marked step below has the kernels

    last = functools.partial(decoder.state.clone().add_, decoder.live)
    whole = timing.GraphTimed([all_of([step.before, functools.partial(decoder.run_plan, GREEDY)])])
    step.before()  # the next to be captured runs once before that, too

    def before():  # a whole token, by a graph that is no entry: see Chains in the module's text
        torch.cuda._sleep(AHEAD)
        whole.graph.replay()
        step.before()

    entries = {use: timing.GraphTimed([all_of(mine)], before) for use, mine in chains(calls, last).items()}
    entries["token"] = timing.GraphTimed([step], before, graph=graph)
    entries |= null_graphs(rig.device, before)
    stats = timing.measure(entries, rig.seconds * len(entries), 20, 200)
    token, launch_us = stats.pop("token"), launch_cost(stats)
    step.before()
    marked = []
    split = device_events(lambda: marked.extend(record_step(decoder, mark=True)))
    outside = split_by_marks(split, marked)
    for call, seen in zip(calls, marked, strict=True):
        call.kernels = seen.kernels
    # Restoring the state copies two small tensors after the step; they are not part of it.
    order = sequence(calls, [(i, n) for i, n in outside if "Memcpy" not in n])

    def replay_all():
        for _ in range(REPLAYS):
            step.before()
            torch.cuda._sleep(1)
            graph.replay()

    replays = replays_of(device_events(replay_all))
    times = kernel_times(replays, order)
    overlap = (base["backend"], base["plan"]) in DEPENDENT or overlap_us(
        replays, len(order)
    ) > OVERLAP * token.us
    rows = account(base, calls, order, times, token, stats, launch_us, rig.ceilings, overlap)
    for entry in (whole, *entries.values()):
        entry.close()
    return rows


def null_graphs(device, before):
    """Graphs of one kernel that does nothing, and of several: {name: Timed}."""
    one = torch.zeros(1, device=device)
    return {
        f"{count} nulls": timing.GraphTimed([all_of([functools.partial(one.add_, 1)] * count)], before)
        for count in (1, 1 + NULLS)
    }


def launch_cost(stats):
    """What launching a graph costs, in us, from the times of null_graphs(), which leave `stats`."""
    single, many = (stats.pop(f"{count} nulls") for count in (1, 1 + NULLS))
    return max(0.0, single.us - (many.us - single.us) / NULLS)


def all_of(calls):
    """One call that makes all of them, in order."""

    @torch.inference_mode()
    def run():
        for call in calls:
            call()

    return run


def measure_swaps(run, rig, weights, name, plan, dtype_name, batch, context, weight_format=None):
    """Tokens of all-Triton, all-CUDA, and Triton with each op in turn swapped to CUDA, interleaved."""
    rows, timed = [], {}
    sides = [("triton", None), ("cuda", None), *(("triton", op) for op in ops_of_step(weights.config, plan))]
    for order, (backend, op) in enumerate(sides, 100):
        overrides = {op: "cuda"} if op else {}
        row = LedgerRow(
            run,
            name,
            backend,
            plan,
            dtype_name,
            batch,
            context,
            "swap",
            order=order,
            op=op,
            overrides=overrides,
            weight_format=weight_format,
            timer="graph",
        )
        rows.append(row)
        try:
            ops = select(backend, rig.device, overrides)
            decoder = Decoder(weights, ops, batch, context + 1, plan=plan, kv_dtype=rig.kv_dtype)
            model_bench.fill(decoder, batch, context)
            timed[len(rows) - 1] = model_bench.timed_step(decoder, "graph")
        except Exception as e:
            row.error = error_text(e)
    nbytes = model_bench.step_bytes(weights, batch, context + 1, rig.kv_dtype)
    for i, stats in (timing.measure(timed, SWAP_SECONDS, 15, 100) if timed else {}).items():
        for field_name, value in stats.fields().items():
            setattr(rows[i], field_name, value)
        given = rig.ceilings.fields("read", nbytes, stats.us)
        rows[i].bytes, rows[i].gbps, rows[i].of_ceiling = nbytes, given.get("gbps"), given.get("of_ceiling")
    return rows


def ops_of_step(config, plan):
    """Names of the ops that the model's step uses, each once, in its order."""
    return list(dict.fromkeys(op for op, _, _ in shapes.uses(config, plan)))
