"""Records: one JSON object a line, the only thing a report or a comparison reads. Never imports torch.

Every line has `schema` (this file's SCHEMA), `kind` and `run` (the id that joins the lines of one bench run).
A field that is absent is null. Units: `us` microseconds, `ms` milliseconds, `bytes` bytes, `gbps` 1e9 bytes
per second, `mhz`, `w` watts, `c` degrees Celsius; `of_*` are fractions (0.93, not 93). `us` is a median,
`us_p10` and `us_p90` the spread of the `n` samples it is the median of.

`env`: the machine and the software, once before and once after what was measured.
  {"schema":1,"kind":"env","run":"20250101T120000-1a2b","when":"before","device":"cuda",
   "gpu":"NVIDIA H100 80GB HBM3",
   "driver":"580.1","torch":"2.11.0","triton":"3.6.0","commit":"1a2b3c4","sm_mhz":1980,"throttle":[],"settings":{}}
`ceiling`: bandwidth of a plain read, copy or write. `bytes` is what crosses DRAM (a copy counts its read and
its write).
  {"schema":1,"kind":"ceiling","run":"...","direction":"read","backend":"cuda","bytes":4294967296,"us":1404.1,
   "us_p10":1403.2,"us_p90":1405.9,"n":40,"gbps":3058.9,"config":{"blocks_per_sm":4,"threads":512},"best":true}
`op`: one op, backend, dtype and shape. cache: cold | warm | in_model. timer: graph (device time) | event
(eager calls between two events, the host's time included) | wall (host clock; emulated, says nothing about a
GPU).
  {"schema":1,"kind":"op","run":"...","op":"linear","backend":"cuda","role":"gate_up","models":["llama-3.1-8b"],
   "dtype":"bf16","batch":1,"shape":{"n":28672,"k":4096},"cache":"cold","timer":"graph","us":81.0,"us_p10":80.8,
   "us_p90":81.4,"n":60,"bytes":234946560,"flops":234881024,"gbps":2900.6,"of_ceiling":0.948,"of_stream":0.981,
   "verdict":{"triton":"faster","cublas":"same"}}
`model`: one decode step of a whole model. `us` is the time of one step (one token for each of `batch`
  sequences).
  {"schema":1,"kind":"model","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"basic","mode":"graph",
   "dtype":"bf16","batch":1,"context":1024,"timer":"graph","us":1100.0,"us_p10":1098.0,"us_p90":1105.0,"us_p99":1110.0,
   "n":64,"tokens_per_s":909.1,"ttft_ms":21.0,"bytes":2503000000,"gbps":2275.0,"of_ceiling":0.744,
   "weight_bytes":2471000000,"kv_bytes":33554432,"workspace_bytes":1000000,"steady_bytes":2600000000,
   "peak_bytes":2700000000,"page_utilisation":0.98,"linearity":1.0}
`serving`: many sequences that take turns in the rows of a batch (lab/harness/serving_bench.py). `us` is the
  time of a step in the queue, with all rows full and contexts near the median, `graph_us` that of its graph
  alone.
  {"schema":1,"kind":"serving","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"fused","dtype":"bf16",
   "batch":16,"lengths":"azure-chat-2023","scale":1.0,"timer":"event","us":1010.0,"us_p10":1000.0,"us_p90":1050.0,
   "n":2400,"graph_us":1000.0,"of_graph":1.01,"tokens_per_s":12000.0,"ideal_tokens_per_s":16000.0,"of_ideal":0.75,
   "rows_used":0.99,"prefill_share":0.23,"sequences":72,"tokens":38000,"seconds":3.2,"context":1240,"paused":0}
`ledger`: one line of the account of one decode step. row: kernel | chain (the time that a use adds to those
  before it, where kernels overlap: lab/harness/ledger.py) | gap | unexplained | total (the token replayed
  as one graph; the others add up to it) | swap (a whole token with `overrides`; `op` names what was swapped).
  {"schema":1,"kind":"ledger","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"basic","dtype":"bf16",
   "batch":1,"context":1024,"row":"kernel","order":3,"op":"linear","kernel":"linear_kernel","calls":65,"us":830.0,
   "bytes":2471000000,"gbps":2977.0,"of_ceiling":0.973,"of_token":0.755,"timer":"kineto"}
`inside`: where the time of one launch of the persistent step goes (lab/harness/inside.py). row: phase (the
  mean of all blocks, all layers together) | idle (blocks that have not begun or have ended) | launch |
  unexplained | total (the launch that was recorded; the others add up to it; normal_us: a launch that records
  nothing) | block (one block's timeline).
  {"schema":1,"kind":"inside","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"persistent",
   "dtype":"bf16","batch":1,"context":1024,"row":"phase","order":4,"phase":"gate_up","calls":16,"us":300.0,
   "others_us":30.0,"tiles_us":240.0,"work_us":30.0,"ahead":9.5,"bytes":1073741824,"gbps":3579.1,
   "of_ceiling":1.17,"of_token":0.36,"blocks":132,"cache":"in_model","timer":"graph"}
`accuracy`: what a weight format costs a model with real weights, over a fixed text (lab/harness/accuracy.py).
  {"schema":1,"kind":"accuracy","run":"...","model":"smollm2-135m","weight_format":"int4-g128, lm_head int8",
   "dtype":"fp32","text":"ferry","tokens":256,"kl":0.05,"top1":0.88,"bytes":102000000,
   "bytes_before":538000000,"products":{"qkv":0.09,"down":0.1},"stored":"Q4_1 and Q8_0"}
`fairness`: what was spent on one side of a comparison (`lab inspect --all`), one line for each kernel of the
  call.
  {"schema":1,"kind":"fairness","run":"...","op":"linear","backend":"cuda","dtype":"bf16","arch":"sm_90a",
   "shape":{"batch":1,"n":28672,"k":4096},"kernel":"linear_stream_kernel","configurations":12,"tried":40,
   "registers":96,"spill_bytes":0,"shared_bytes":0,"threads":128,"occupancy":0.3125,"instructions":700,
   "mix":{"global load, 128 bit":48,"fused multiply-add":256,"shuffle":20},"code_lines":210,
   "shared_lines":160,"compile_s":41.5}

`repeat`: two runs of one commit on one card, compared (`lab compare A B --record`): `share` of the `rows`
were called faster or slower, each of them a false alarm.
  {"schema":1,"kind":"repeat","run":"...","a":"...","b":"...","commit":"1a2b3c4","rows":480,"faster":2,"slower":3,
   "ambiguous":9,"share":0.0104,"min_effect":0.03}
`foreign`: a decode step of another program, measured apart from the lab, in foreign.jsonl beside the records.
  {"schema":1,"kind":"foreign","run":"...","program":"vLLM","version":"0.22.1","model":"llama-3.1-8b",
   "dtype":"bf16","batch":1,"context":1024,"what":"step","us":6555.0,"gpu":"NVIDIA H100 80GB HBM3",
   "settings":"full CUDA graphs, greedy","source":"engine steps by the wall clock","time":"2026-11-26"}

A measurement that failed is a line with `error` (one line of text) and no time. `emulated` lines have timer
wall and neither gbps nor of_ceiling. `flag` says why a line must not be read as a win ("above the ceiling",
"fits in L2").

Reading checks every value against the annotation of its field (see `from_dict`). A line with a value that
cannot be right is left out of what is read, with a notice that names the line and the field. A line that is
no record at all (not JSON, an unknown kind or field, a field missing) is an error.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import operator
import os
import stat
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

SCHEMA = 1
FILE = "records.jsonl"
FOREIGN_FILE = "foreign.jsonl"  # beside it: what other programs took, see Foreign
LONGEST = 10_000  # characters of a text, entries of a list or an object
LARGEST = 2**63  # every number is smaller
DEEPEST = 4  # objects and lists within one another
SHORTEST = 1e-6  # microseconds: less than a picosecond is no time that a clock measured
NAMED = 10  # lines left out that a notice each names; the others are counted


@dataclass
class Env:
    """The machine, the software and the state of the card. `settings` is what the bench was asked for."""

    run: str
    when: str  # before | after
    device: str  # cuda | cpu
    time: str | None = None  # ISO 8601, UTC
    gpu: str | None = None  # marketing name, as the driver gives it
    capability: str | None = None  # "9.0"
    sms: int | None = None
    l2_bytes: int | None = None
    memory_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None  # the CUDA version torch was built with
    torch: str | None = None
    triton: str | None = None
    nvcc: str | None = None
    python: str | None = None
    cpu: str | None = None
    commit: str | None = None  # git commit; "+" and a hash of the difference when the tree was edited
    tuned: dict[str, str | None] | None = (
        None  # of the tables of `lab tune` that launchers read: lab.tune.tuned.digests
    )
    sm_mhz: float | None = None
    mem_mhz: float | None = None
    sm_max_mhz: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttle: list[str] | None = None  # reasons active at the time; [] is none
    ecc: str | None = None
    peers: dict[str, str] = field(default_factory=dict)  # optional package -> version, or why it is absent
    settings: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind = "env"
    key_fields = ("when",)


@dataclass
class Ceiling:
    """The bandwidth of a plain read, copy or write of `bytes`. `best` marks the best launch shape of its
    direction and size."""

    run: str
    # read | copy | write; link read, link write: of another GPU's memory; link word: us is the time that 8
    # bytes take to another GPU
    direction: str
    backend: str  # cuda | triton | torch: what the kernel was written in
    bytes: int
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    gbps: float | None = None
    config: dict = field(default_factory=dict)
    best: bool = False
    timer: str = "graph"
    error: str | None = None
    kind = "ceiling"
    key_fields = ("direction", "backend", "bytes", "config")


@dataclass
class OpRow:
    """One op by one backend at one shape. See the module's text for the fields' units."""

    run: str
    op: str
    backend: str  # cuda | triton | torch | cublas | sdpa_flash | cudnn | flashinfer | liger ...
    dtype: str  # fp32 | fp16 | bf16
    batch: int
    shape: dict  # the op's own sizes, e.g. {"n": 4096, "k": 4096}
    context: int | None = None  # tokens in the KV cache, where the op has one
    cache: str = "cold"  # cold | warm | in_model
    timer: str = "graph"  # graph | event | wall
    role: str | None = None  # which use of the op: qkv, o, gate_up, down, lm_head, hidden, head ...
    models: list[str] = field(default_factory=list)  # presets with this shape
    plan: str | None = None  # basic | fused, where the op belongs to one plan only
    rung: int | None = None  # of the op's ladder (lab bench ops --ladder); config then has its name
    weight_format: str | None = None  # of the weights, as "int4-g128"; null: plain, in dtype
    rms_error: float | None = None  # of the result against that with the weights before they were rounded to
    # the format, in float64: root mean square of the difference over that of the result
    kv_dtype: str | None = None  # of the KV cache, fp8 or int8; null: dtype, or the op has none
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    bytes: int | None = None  # what must cross DRAM at least once
    flops: int | None = None
    gbps: float | None = None  # bytes / us
    of_ceiling: float | None = None  # gbps / the best read, copy or write bandwidth of this run
    of_stream: float | None = None  # gbps / what plain access to as many bytes reached in this run
    config: dict = field(default_factory=dict)  # launch configuration, splits ...
    verdict: dict[str, str] = field(
        default_factory=dict
    )  # other backend -> faster | slower | same | ambiguous
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "op"
    key_fields = (
        "op",
        "backend",
        "dtype",
        "batch",
        "context",
        "shape",
        "cache",
        "timer",
        "plan",
        "rung",
        "weight_format",
        "kv_dtype",
    )


@dataclass
class ModelRow:
    """One decode step of a model. `bytes`: weights read a step (no embedding table) plus KV read at this
    context."""

    run: str
    model: str
    backend: str
    plan: str  # basic | fused | persistent; "-" for a peer
    mode: str  # graph | eager | compile
    dtype: str
    batch: int
    context: int
    timer: str = "graph"
    overrides: dict[str, str] = field(default_factory=dict)  # op -> backend
    weights: str = "random"  # random | file
    weight_format: str | None = None  # of the matrices, as "int4-g128, lm_head int8"; null: plain, in dtype
    kv_dtype: str | None = None  # of the KV cache, fp8 or int8; null: dtype
    ranks: int = 1  # GPUs that divide the model; bytes and gbps are those of each
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    us_p99: float | None = None
    n: int | None = None
    tokens_per_s: float | None = None  # batch / us
    ttft_ms: float | None = None  # prefill of `context` tokens and the first token
    bytes: int | None = None
    gbps: float | None = None
    of_ceiling: float | None = None
    weight_bytes: int | None = None
    kv_bytes: int | None = None  # the cache as allocated
    workspace_bytes: int | None = None  # steady - weights - KV
    steady_bytes: int | None = None  # allocated between steps
    peak_bytes: int | None = None  # highest allocated, prefill and capture included
    page_utilisation: float | None = None  # tokens held / tokens the allocated pages could hold
    linearity: float | None = None  # tokens_per_s / (batch * tokens_per_s at the smallest batch / that batch)
    verdict: dict[str, str] = field(default_factory=dict)
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "model"
    key_fields = (
        "model",
        "backend",
        "plan",
        "mode",
        "dtype",
        "batch",
        "context",
        "overrides",
        "timer",
        "weight_format",
        "kv_dtype",
        "ranks",
    )


@dataclass
class ServingRow:
    """Many sequences in one queue: what they got, and what they would get if all rows were always full and a
    step took no longer than its graph."""

    run: str
    model: str
    backend: str
    plan: str
    dtype: str
    batch: int  # rows
    lengths: str  # the distribution of the lengths of prompts and answers
    scale: float  # what all lengths are multiplied by
    timer: str = "event"  # event (on a GPU, the host's time included) | wall
    weights: str = "random"  # random | file
    weight_format: str | None = None  # as in model records
    kv_dtype: str | None = None  # as in model records
    us: float | None = None  # of a step that follows a step, with all rows full and contexts near the median
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    after_prefill_us: float | None = None  # of one that follows a prefill
    graph_us: float | None = None  # of that step's graph, replayed alone
    of_graph: float | None = None  # us / graph_us
    tokens_per_s: float | None = None  # all rows together, prefills included
    ideal_tokens_per_s: float | None = None  # batch / graph_us
    of_ideal: float | None = None
    rows_used: float | None = None  # share of the rows that held a sequence, over all steps
    prefill_share: float | None = None  # of the time, what was no step
    sequences: int | None = None
    tokens: int | None = None  # that were decoded in `seconds`
    seconds: float | None = None
    context: int | None = None  # tokens that a row attended to, mean
    paused: int | None = None  # sequences that gave up their pages and were prefilled again
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "serving"
    key_fields = (
        "model",
        "backend",
        "plan",
        "dtype",
        "batch",
        "lengths",
        "scale",
        "timer",
        "weight_format",
        "kv_dtype",
    )


@dataclass
class LedgerRow:
    """One line of a token's account; `calls`, `us` and `bytes` are totals of one decode step."""

    run: str
    model: str
    backend: str
    plan: str
    dtype: str
    batch: int
    context: int
    row: str  # kernel | chain | gap | unexplained | total | swap
    order: int = 0  # the order of the lines
    op: str | None = None
    role: str | None = None  # which use of the op, as in op records
    kernel: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    weight_format: str | None = None  # as in model records
    kv_dtype: str | None = None  # as in model records
    ranks: int = 1  # GPUs that divide the model; calls, us and bytes are those of the first
    calls: int | None = None
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    bytes: int | None = None  # ideal: what must cross DRAM at least once
    gbps: float | None = None
    of_ceiling: float | None = None
    of_token: float | None = None
    timer: str = "kineto"  # kineto (device time stamps) | graph | wall
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "ledger"
    key_fields = (
        "model",
        "backend",
        "plan",
        "dtype",
        "batch",
        "context",
        "row",
        "op",
        "role",
        "kernel",
        "overrides",
        "weight_format",
        "kv_dtype",
        "ranks",
    )


@dataclass
class InsideRow:
    """One line about the inside of a launch of decode_step. Times are sums over a step's calls of a phase,
    and means of all blocks."""

    run: str
    model: str
    backend: str
    plan: str
    dtype: str
    batch: int
    context: int
    row: str  # phase | idle | launch | unexplained | total | block
    order: int = 0  # the order of the lines
    phase: str | None = None  # start | qkv | attention | o | gate_up | down | lm_head | end
    block: int | None = None  # of a timeline
    weight_format: str | None = None  # as in model records
    kv_dtype: str | None = None  # as in model records
    calls: int | None = None  # of the phase in a step
    us: float | None = None
    others_us: float | None = None  # of us, waiting for what other blocks compute
    tiles_us: float | None = None  # of us, waiting for weights or KV; null: not told apart from work
    work_us: float | None = None  # the rest of us
    ahead: float | None = None  # tiles that were issued and not yet multiplied when a block could begin
    normal_us: float | None = None  # of a total
    n: int | None = None  # launches, of which this is the one of median time
    blocks: int | None = None
    bytes: int | None = None  # ideal: what must cross DRAM at least once
    gbps: float | None = None  # bytes / us; what was loaded ahead counts in the phase that uses it
    of_ceiling: float | None = None
    of_token: float | None = None  # of the total
    stamps: list[int] = field(
        default_factory=list
    )  # of a block, for each phase in order: ns from the launch's
    # first stamp to the phase's end, ns that it waited for others, ns for tiles
    cache: str = "in_model"  # what L2 holds: what a token before this one left
    timer: str = "graph"  # graph | wall
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "inside"
    key_fields = (
        "model",
        "backend",
        "plan",
        "dtype",
        "batch",
        "context",
        "row",
        "phase",
        "block",
        "weight_format",
        "kv_dtype",
    )


@dataclass
class Accuracy:
    """What a weight format costs a model with real weights: the distributions of its next token over a fixed
    text, next to those of the same weights expanded and not rounded."""

    run: str
    model: str
    weight_format: str  # as in model records
    dtype: str  # of activations, and of the weights that are not rounded
    text: str | None = None  # the name of the text
    tokens: int | None = None  # of it, each of which gives a distribution
    kl: float | None = (
        None  # mean Kullback-Leibler divergence from the unrounded weights' distribution, in nats
    )
    top1: float | None = None  # share of the tokens after which both have the same best next token
    bytes: int | None = None  # of the weights that a token reads
    bytes_before: int | None = None  # the same of the unrounded weights, in dtype
    products: dict[str, float] = field(
        default_factory=dict
    )  # role -> RMS of its weights' changes over that of
    # its weights, all layers: the relative RMS error of the product with x of independent numbers
    stored: str | None = None  # how the file stores the weights that count as unrounded, as "Q4_1"
    note: str | None = None
    error: str | None = None
    kind = "accuracy"
    key_fields = ("model", "weight_format", "dtype", "text")


@dataclass
class Fairness:
    """One kernel of one side of a comparison, as it was compiled for `arch`; see lab/inspect/fairness.py."""

    run: str
    op: str
    backend: str  # cuda | triton
    dtype: str
    arch: str  # sm_90a | sm_80
    shape: dict  # the sizes of the call that took this kernel
    kernel: str
    configurations: int | None = (
        None  # CUDA: instantiations compiled in for the dtype; Triton: entries of the table
    )
    tried: int | None = None  # settings that `lab tune` raced for the op on this architecture, all shapes
    registers: int | None = None  # per thread
    spill_bytes: int | None = None  # per thread
    shared_bytes: int | None = None  # per block, static and dynamic
    threads: int | None = None  # per block
    occupancy: float | None = None  # theoretical, of a multiprocessor's warps
    instructions: int | None = None  # of machine code
    mix: dict[str, int] = field(default_factory=dict)  # of them, by class (lab/inspect/kernel.py), no zeros;
    # {}: unknown
    code_lines: int | None = None  # of the twin's file, no blanks, comments, docstrings
    shared_lines: int | None = None  # of the files it shares with other ops; the base of all ops not counted
    compile_s: float | None = (
        None  # nvcc: the whole file, every instantiation and architecture; Triton: this kernel
    )
    kind = "fairness"
    key_fields = ("op", "backend", "dtype", "arch", "shape", "kernel")


@dataclass
class Repeat:
    """What comparing two runs that measured the same thing said: the false-alarm rate of `lab compare`."""

    run: str  # the run beside which it is recorded
    a: str  # the runs compared
    b: str
    commit: str
    rows: int  # rows of both runs, without those that failed
    faster: int
    slower: int
    ambiguous: int
    share: float  # (faster + slower) / rows
    min_effect: float  # the smallest change called faster or slower
    host_rows: int = 0  # of `rows`, those whose times include the host's
    host_called: int = 0  # of those, called faster or slower
    kind = "repeat"
    key_fields = ("a", "b")


@dataclass
class Foreign:
    """A decode step of another program, measured apart from the lab: its lines stand in foreign.jsonl beside
    the records that they are compared with."""

    run: str  # of the foreign measurement, in any words
    program: str  # vLLM
    version: str
    model: str
    dtype: str
    batch: int
    context: int
    what: str  # step: one step of its engine by the wall clock | device: its decode kernels alone
    us: float
    gpu: str  # as in env records; shown beside runs of the same GPU only
    settings: str  # of the program, and what else makes a difference
    source: str  # how it was measured
    time: str | None = None  # ISO 8601
    kind = "foreign"
    key_fields = ("program", "version", "model", "dtype", "batch", "context", "what")


KINDS = {
    c.kind: c
    for c in (
        *(Env, Ceiling, OpRow, ModelRow, ServingRow, LedgerRow, InsideRow, Accuracy, Fairness, Repeat),
        Foreign,
    )
}


def to_line(record):
    """The record as one line of JSON, newline included. Null fields are left out; six digits are kept."""
    body = {
        k: float(f"{v:.6g}") if isinstance(v, float) else v
        for k, v in dataclasses.asdict(record).items()
        if v is not None
    }
    # Not a number is no JSON, and a record that holds one is a bug in whoever measured.
    return (
        json.dumps({"schema": SCHEMA, "kind": record.kind, **body}, allow_nan=False, separators=(",", ":"))
        + "\n"
    )


# What a value may be. A check is called with a value and gives None, or what is wrong with it in words.


class BadValue(LabError):
    """A record whose fields are all known, one of which holds what it cannot hold."""


def _text(value):
    if type(value) is str and value.isascii() and len(value) < LONGEST and "\0" not in value:
        return None  # nearly every text
    if type(value) is not str:
        return f"is {shown(value)}, not text"
    if len(value) > LONGEST:
        return f"is a text of {len(value)} characters, more than {LONGEST}"
    if "\0" in value:
        return f"is {shown(value)}: it holds a NUL"
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no file and no terminal takes
        return f"is {shown(value)}, which is no valid Unicode"


def _flag(value):
    if type(value) is not bool:
        return f"is {shown(value)}, neither true nor false"


def _number(whole, least):
    """The check of a number from `least` up; whole: without a fraction."""
    what = "a whole number" if whole else "a number"

    def check(value):
        kind = type(value)
        if kind is (int if whole else float) and least <= value < LARGEST:
            return None  # nearly every number
        if kind is not int and (kind is not float or whole and not value.is_integer()):
            return f"is {shown(value)}, not {what}"
        if not -LARGEST < value < LARGEST:  # also false for NaN
            return f"is {shown(value)}, not a finite number below 2^63"
        if value < least:
            return f"is {shown(value)}, less than {least:g}"

    return check


def _json(value, depth=0):
    """The check of a JSON value of any kind."""
    kind = type(value)
    if kind is str:
        return _text(value)
    if kind is int or kind is float:
        return SIGNED(value)
    if value is None or kind is bool:
        return None
    if depth == DEEPEST:
        return f"is nested more than {DEEPEST} deep"
    if len(value) > LONGEST:
        return f"has {len(value)} entries, more than {LONGEST}"
    for item in (*value, *value.values()) if kind is dict else value:
        problem = _json(item, depth + 1)
        if problem:
            return problem


SIGNED = _number(False, -LARGEST)


def _object(of=_json):
    """The check of an object (dict) whose values pass `of`."""

    def problem_of(items):
        for name, inner in items:
            problem = _text(name) or (of(inner, 1) if of is _json else of(inner))
            if problem:
                return f"has an entry {shown(name)} that {problem}"

    # The same few shapes and settings stand in thousands of lines. 1, 1.0 and true are equal and so share an
    # answer: right where any JSON value may stand; where only numbers may, no answer is kept.
    known = functools.lru_cache(maxsize=4096)(problem_of) if of in (_json, _text) else problem_of

    def check(value):
        if type(value) is not dict:
            return f"is {shown(value)}, not an object"
        if not value:
            return None
        if len(value) > LONGEST:
            return f"has {len(value)} entries, more than {LONGEST}"
        try:
            return known(tuple(value.items()))
        except TypeError:  # it holds a list or an object, which cannot be looked up
            return problem_of(value.items())

    return check


def _list(of):
    def check(value):
        if type(value) is not list:
            return f"is {shown(value)}, not a list"
        if len(value) > LONGEST:
            return f"has {len(value)} entries, more than {LONGEST}"
        for inner in value:
            problem = of(inner)
            if problem:
                return f"has an entry that {problem}"

    return check


def _check_of(annotation, name=""):
    """The check that the annotation of a field asks for. Numbers are 0 or more, `batch` is 1 or more."""
    if typing.get_origin(annotation) is types.UnionType:
        (inner,) = (_check_of(a, name) for a in typing.get_args(annotation) if a is not type(None))
        return lambda value: None if value is None else inner(value)
    if typing.get_origin(annotation) in (dict, list):
        *_, item = map(_check_of, typing.get_args(annotation))
        return _object(item) if typing.get_origin(annotation) is dict else _list(item)
    return {
        str: _text,
        bool: _flag,
        dict: _object(),
        int: _number(True, 1 if name == "batch" else 0),
        float: SIGNED if name in MAY_BE_NEGATIVE else _number(False, 0),
    }[annotation]


TIMES = ("us", "us_p10", "us_p90", "us_p99")
DIFFERENCES = (
    "chain",
    "gap",
    "unexplained",
)  # rows of a ledger that subtract times: by their noise they go below 0
MAY_BE_NEGATIVE = (*TIMES, "gbps", "of_ceiling", "of_token", "temperature_c")  # in a difference: see _signs


def _signs(record):
    """What is wrong with the sign or the order of a measurement's times, beginning with the field's name, or
    None."""
    kind = record.kind
    if (
        kind not in ("op", "model", "serving", "ceiling", "ledger")
        or kind == "ledger"
        and record.row in DIFFERENCES
    ):
        return None
    values = record.__dict__
    for name in TIMES:
        value = values.get(name)
        if value is not None and value < SHORTEST:
            return f"{name} is {shown(value)}, not a time"
    low, high = values.get("us_p10"), values.get("us_p90")
    if low is not None and high is not None and low > high:
        return f"us_p10 is {shown(low)}, more than us_p90"
    for name in ("gbps", "of_ceiling", "of_token"):
        value = values.get(name)
        if value is not None and value < 0:
            return f"{name} is {shown(value)}, less than 0"
    return None


@dataclass
class _Schema:
    """What from_dict and key need to know of a kind of record."""

    cls: type
    checks: dict  # field -> check of a value that is not null
    optional: set  # fields that may be null
    makers: dict  # field -> what makes its value where it is absent and an object or a list of its own
    required: set
    identity: object  # record -> the values of key_fields
    unhashable: list  # which of these are lists or objects


def _without_none(annotation):
    (inner,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    return inner


def _schema(cls):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    optional = {name for name, f in fields.items() if types.NoneType in typing.get_args(f.type)}
    return _Schema(
        cls,
        {
            name: _check_of(_without_none(f.type) if name in optional else f.type, name)
            for name, f in fields.items()
        },
        optional,
        {n: f.default_factory for n, f in fields.items() if f.default_factory is not dataclasses.MISSING},
        {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING},
        operator.attrgetter(*cls.key_fields, "run"),  # with "run" always a tuple
        [
            i
            for i, n in enumerate(cls.key_fields)
            if (typing.get_origin(fields[n].type) or fields[n].type) in (dict, list)
        ],
    )


SCHEMAS = {kind: _schema(cls) for kind, cls in KINDS.items()}


# The lines of a bench name the same fields in the same order. So what depends on the names alone is worked
# out once for all of them (_Layout), and all texts, all whole numbers and all other numbers of a line are
# checked together. Where that finds something, or cannot tell, the check of each field says what it is.

TEXT_TYPES = {str, str | None}
WHOLE_TYPES = {int, int | None}
NUMBER_TYPES = {float, float | None}
A_NUMBER = frozenset((int, float))
A_WHOLE_NUMBER = frozenset((int,))


@dataclass
class _Layout:
    """What is known of a line from its kind and the names of its fields."""

    schema: _Schema
    texts: object  # decoded line -> the values of the fields that hold a text
    wholes: object  # ... a whole number; None where the line has none
    numbers: object  # ... a number; None where the line has none
    times: object  # ... a time that must be above zero; None where the line has none
    others: list  # [(field, check)] of the remaining fields
    spread: bool  # whether both us_p10 and us_p90 are there
    makers: (
        list  # [(field, what makes its value)] of the fields that are absent and do not have a plain default
    )


def _getter(names):
    """decoded line -> a tuple of these fields' values; None for no names."""
    names = list(names)
    return operator.itemgetter(*names, *names[:1]) if names else None  # of two names or more: always a tuple


@functools.lru_cache(maxsize=1024)
def _layout(kind, keys):
    """The _Layout of lines of a kind with these members. Raises LabError for an unknown field, or a missing
    one."""
    schema = SCHEMAS[kind]
    names = tuple(name for name in keys if name not in ("schema", "kind"))
    unknown, missing = sorted(set(names) - schema.checks.keys()), sorted(schema.required - set(names))
    if unknown or missing:
        raise LabError(
            f"a {kind} record with "
            + " and ".join(
                f"{what} {shown(', '.join(found), quotes=False)}"
                for what, found in (("unknown", unknown), ("no", missing))
                if found
            )
        )
    annotations = {f.name: f.type for f in dataclasses.fields(schema.cls)}

    def of(annotated):
        return [name for name in names if annotations[name] in annotated and name != "batch"]

    texts, wholes, numbers = of(TEXT_TYPES), of(WHOLE_TYPES), of(NUMBER_TYPES)
    return _Layout(
        schema,
        _getter(texts),
        _getter(wholes),
        _getter(numbers),
        _getter(name for name in names if name in TIMES),
        [(name, schema.checks[name]) for name in names if name not in {*texts, *wholes, *numbers}],
        {"us_p10", "us_p90"} <= set(names),
        [(name, make) for name, make in schema.makers.items() if name not in names],
    )


def _surely_right(layout, body):
    """A fast test. True: every value of the line passes its check, and _signs() finds nothing wrong with the
    record. False: not known, the caller must check each value."""
    try:
        text = "".join(layout.texts(body))
        if not (text.isascii() and len(text) < LONGEST and "\0" not in text):
            return False
        # The sum of numbers that are not below zero is no smaller than any of them, and NaN with a NaN.
        if layout.wholes:
            values = layout.wholes(body)
            if not (A_WHOLE_NUMBER.issuperset(map(type, values)) and min(values) >= 0):
                return False
            if not sum(values) < LARGEST:
                return False
        if layout.numbers:
            values = layout.numbers(body)
            if not (A_NUMBER.issuperset(map(type, values)) and min(values) >= 0 and sum(values) < LARGEST):
                return False
        if layout.times and min(layout.times(body)) < SHORTEST:
            return False
        if layout.spread and body["us_p10"] > body["us_p90"]:
            return False
        for name, check in layout.others:
            if check(body[name]):
                return False
    except (TypeError, OverflowError):  # a null, a text in the place of a number, an integer of 400 digits
        return False
    return True


def from_dict(body):
    """A record from a decoded line.

    Raises BadValue for a value that its field cannot hold: of another type than its annotation (true and
    false are no numbers), not finite or 2^63 and above, negative (but for differences of times), no valid
    Unicode, with a NUL, or longer or nested deeper than LONGEST and DEEPEST. Raises another LabError for what
    is no record: an unknown kind, schema or field, or a missing field.
    """
    if type(body) is not dict:
        raise LabError("not a record: expected a JSON object")
    schema, kind = body.get("schema"), body.get("kind")
    if type(schema) is not int or schema < 1:
        raise LabError(f"not a record: no schema version (got {shown(schema)})")
    if schema > SCHEMA:
        raise LabError(
            f"schema version {shown(schema)} is newer than this lab's {SCHEMA}: update the lab to read it"
        )
    if type(kind) is not str or kind not in KINDS:
        raise LabError(f"unknown kind {shown(kind)}: expected one of {', '.join(KINDS)}")
    layout = _layout(kind, tuple(body))
    record = object.__new__(layout.schema.cls)  # __init__ would cost as much as all else here
    # What has a plain default and is absent is found in the class, where @dataclass leaves the defaults.
    values = record.__dict__ = body.copy()
    del values["schema"], values["kind"]
    if not _surely_right(layout, body):
        checks, optional = layout.schema.checks, layout.schema.optional
        for name, value in values.items():
            problem = checks[name](value) if value is not None or name not in optional else None
            if problem:
                raise BadValue(f"{name} {problem}")
        problem = _signs(record)
        if problem:
            raise BadValue(problem)
    for name, make in layout.makers:
        values[name] = make()
    return record


def key(record):
    """What makes two measurements the same one in two runs: kind and the fields of key_fields, hashable."""
    schema = SCHEMAS[record.kind]
    found = list(schema.identity(record))
    found[-1] = record.kind
    for i in schema.unhashable:
        found[i] = freeze(found[i])
    return tuple(found)


def freeze(value):
    """A hashable form of a JSON value, independent of the order of an object's members."""
    if isinstance(value, dict):
        items = (
            sorted(value.items()) if len(value) > 1 else value.items()
        )  # names differ: no values are compared
        for _, inner in items:
            if isinstance(inner, (dict, list, tuple)):
                return tuple((name, freeze(v)) for name, v in items)
        return tuple(items)
    if isinstance(value, (list, tuple)):
        return tuple(map(freeze, value))
    return value


def path_of(where):
    """The records file of a path: itself, or records.jsonl inside a folder."""
    where = Path(where)
    return where / FILE if where.is_dir() or where.suffix != ".jsonl" else where


@dataclass(frozen=True)
class LeftOut:
    """A line that was not read, for a value in it. run: None where not even that could be read."""

    line: int
    run: str | None
    problem: str  # names the field


@dataclass
class Records:
    """What a file holds. `notices` are lines for the user: a torn last line, lines left out or skipped as too
    new."""

    path: Path
    rows: list
    notices: list = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def runs(self):
        """Run ids, oldest first."""
        return list(dict.fromkeys(r.run for r in self.rows))

    def of_run(self, run):
        return [r for r in self.rows if r.run == run]

    def of_kind(self, kind, run=None):
        return [r for r in self.rows if r.kind == kind and run in (None, r.run)]


def read(where, newer="error"):
    """Reads a records file (or a folder that holds records.jsonl) into Records.

    newer: "error" raises LabError at a line with a schema newer than SCHEMA, "skip" leaves such lines out
    with a notice. A torn last line (a run killed by a full disk) is a notice, and so is a line that holds a
    value that cannot be right (BadValue); any other bad line is a LabError.
    """
    path = path_of(where)
    *lines, tail = _content(path).split(b"\n")
    found = Records(path, [])
    with no_collection():
        skipped = _add_rows(found, lines, newer)
    found.notices += [f"{path}:{bad.line}: left out: {bad.problem}" for bad in found.left_out[:NAMED]]
    if len(found.left_out) > NAMED:
        found.notices.append(
            f"{path}: left out {len(found.left_out) - NAMED} more lines with such values, up to line "
            f"{found.left_out[-1].line}"
        )
    if skipped:
        found.notices.append(
            f"{path}: skipped {skipped} lines of a newer schema than {SCHEMA}; update the lab"
        )
    if tail.strip():
        found.notices.append(f"{path}: the last line is torn ({len(tail)} bytes) and was left out")
    return found


@contextlib.contextmanager
def no_collection():
    """The garbage collector does not run meanwhile. Rows are not garbage, and to search them again and
    again while more are read takes as long as reading them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _add_rows(found, lines, newer):
    """Adds what the lines of a file hold to its Records; returns how many were skipped as too new."""
    path, skipped = found.path, 0
    scan = json.JSONDecoder().scan_once  # of a text that begins with a value: twice as fast as json.loads
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        try:
            text = line.decode()  # json.loads would guess the encoding of bytes
            body, end = scan(text, 0) if text[0] == "{" else (None, 0)
            if end != len(text):
                body = json.loads(text)
        except (ValueError, RecursionError, StopIteration):
            raise LabError(f"{path}:{number}: not JSON; remove the line to read the rest") from None
        schema = body.get("schema") if type(body) is dict else None
        if newer == "skip" and type(schema) is int and schema > SCHEMA:
            skipped += 1
            continue
        try:
            found.rows.append(from_dict(body))
        except BadValue as e:
            run = body.get("run")
            found.left_out.append(LeftOut(number, None if _text(run) else run, str(e)))
        except LabError as e:
            raise LabError(f"{path}:{number}: {e}") from None
    return skipped


def _content(path):
    """The bytes of a records file, read while nobody writes."""
    try:
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or a device may never end
                raise LabError(f"cannot read {path}: it is no ordinary file")
            with locked(file.fileno(), shared=True):
                return file.read()
    except FileNotFoundError:
        raise LabError(
            f"no records: {path} does not exist; `lab bench all --out {path.parent}` writes it"
        ) from None
    except OSError as e:
        raise LabError(f"cannot read {path}: {e.strerror}") from None


@contextlib.contextmanager
def locked(fd, shared=False):
    """Holds the lock of an open records file: one writer at a time, and no reader while one writes.

    The kernel lets go of it when its process ends, however that happens. Yields None, or why there is no lock
    (a file system without locks).
    """
    problem = None
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        elif not shared:
            os.lseek(fd, 0, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_LOCK, 1)
    except OSError as e:
        problem = e.strerror
    try:
        yield problem
    finally:
        if problem is None:
            if fcntl:
                fcntl.flock(fd, fcntl.LOCK_UN)
            elif not shared:
                os.lseek(fd, 0, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)


class Writer:
    """Appends records, one lot of whole lines at a time, which are on disk when `append` returns.

    Several writers may have one file open: each holds the file's lock while it writes. A writer that was
    killed, or that found the disk full, may leave a torn last line; the next one cuts it off (see `notices`).
    """

    def __init__(self, where):
        self.path = path_of(where)
        self.notices = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644
            )
        except OSError as e:
            raise LabError(f"cannot write {self.path}: {e.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise LabError(f"cannot write {self.path}: it is no ordinary file")
        with locked(self._fd) as problem:
            if problem:
                self.notices.append(
                    f"{self.path}: cannot be locked ({problem}): let no other process write to it"
                )
            self._cut_torn_tail()

    def _cut_torn_tail(self):
        """Call it with the lock held: without it the tail may be another writer's line that is being
        written."""
        size = end = os.fstat(self._fd).st_size
        block = 1 << 16
        while end:
            start = max(0, end - block)
            at = self._read(start, end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)
            self.notices.append(f"{self.path}: cut off a torn last line of {size - end} bytes")

    def _read(self, start, count):
        os.lseek(self._fd, start, os.SEEK_SET)
        return os.read(self._fd, count)

    def append(self, *records):
        """Writes the records' lines, all or none of them; raises LabError where the disk takes no more."""
        data = memoryview("".join(map(to_line, records)).encode())
        with locked(self._fd):
            self._cut_torn_tail()  # of a writer that was killed since
            before, written = os.fstat(self._fd).st_size, 0
            try:
                while written < len(data):
                    written += os.write(self._fd, data[written:])
                os.fsync(self._fd)
            except OSError as e:
                os.ftruncate(self._fd, before)
                raise LabError(
                    f"{self.path}: only {written} of {len(data)} bytes could be written ({e.strerror}); "
                    "they were taken back"
                ) from None

    def close(self):
        os.close(self._fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
