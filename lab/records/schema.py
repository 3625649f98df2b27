"""Records: one JSON object a line, the only thing a report or a comparison reads. Never imports torch.

Every line has `schema` (this file's SCHEMA), `kind` and `run` (the id that joins the lines of one bench run).
A field that is absent is null. Units: `us` microseconds, `ms` milliseconds, `bytes` bytes, `gbps` 1e9 bytes per
second, `mhz`, `w` watts, `c` degrees Celsius; `of_*` are fractions (0.93, not 93). `us` is a median, `us_p10` and
`us_p90` the spread of the `n` samples it is the median of.

`env`: the machine and the software, once before and once after what was measured.
  {"schema":1,"kind":"env","run":"20250101T120000-1a2b","when":"before","device":"cuda","gpu":"NVIDIA H100 80GB HBM3",
   "driver":"580.1","torch":"2.11.0","triton":"3.6.0","commit":"1a2b3c4","sm_mhz":1980,"throttle":[],"settings":{}}
`ceiling`: bandwidth of a plain stream. `bytes` is what crosses DRAM (a copy counts its read and its write).
  {"schema":1,"kind":"ceiling","run":"...","direction":"read","backend":"cuda","bytes":4294967296,"us":1404.1,
   "us_p10":1403.2,"us_p90":1405.9,"n":40,"gbps":3058.9,"config":{"blocks_per_sm":4,"threads":512},"best":true}
`op`: one op, backend, dtype and shape. cache: cold | warm | in_model. timer: graph (device time) | event (eager calls
between two events, the host's time included) | wall (host clock; emulated, says nothing about a GPU).
  {"schema":1,"kind":"op","run":"...","op":"linear","backend":"cuda","role":"gate_up","models":["llama-3.1-8b"],
   "dtype":"bf16","batch":1,"shape":{"n":28672,"k":4096},"cache":"cold","timer":"graph","us":81.0,"us_p10":80.8,
   "us_p90":81.4,"n":60,"bytes":234946560,"flops":234881024,"gbps":2900.6,"of_ceiling":0.948,"of_stream":0.981,
   "verdict":{"triton":"faster","cublas":"same"}}
`model`: one decode step of a whole model. `us` is the time of one step (one token for each of `batch` sequences).
  {"schema":1,"kind":"model","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"basic","mode":"graph",
   "dtype":"bf16","batch":1,"context":1024,"timer":"graph","us":1100.0,"us_p10":1098.0,"us_p90":1105.0,"us_p99":1110.0,
   "n":64,"tokens_per_s":909.1,"ttft_ms":21.0,"bytes":2503000000,"gbps":2275.0,"of_ceiling":0.744,
   "weight_bytes":2471000000,"kv_bytes":33554432,"workspace_bytes":1000000,"steady_bytes":2600000000,
   "peak_bytes":2700000000,"page_utilisation":0.98,"linearity":1.0}
`ledger`: one line of the account of one decode step. row: kernel | chain (the time that a use adds to those before it,
where kernels overlap: lab/harness/ledger.py) | gap | unexplained | total (the graph-replayed token; the others add up
to it) | swap (a whole token with `overrides`; `op` names what was swapped).
  {"schema":1,"kind":"ledger","run":"...","model":"llama-3.2-1b","backend":"cuda","plan":"basic","dtype":"bf16",
   "batch":1,"context":1024,"row":"kernel","order":3,"op":"linear","kernel":"linear_kernel","calls":65,"us":830.0,
   "bytes":2471000000,"gbps":2977.0,"of_ceiling":0.973,"of_token":0.755,"timer":"kineto"}
`fairness`: what was spent on one side of a comparison (`lab inspect --all`), one line for each kernel of the call.
  {"schema":1,"kind":"fairness","run":"...","op":"linear","backend":"cuda","dtype":"bf16","arch":"sm_90a",
   "shape":{"batch":1,"n":28672,"k":4096},"kernel":"linear_stream_kernel","configurations":12,"tried":40,"registers":96,
   "spill_bytes":0,"shared_bytes":0,"threads":128,"occupancy":0.3125,"instructions":700,
   "mix":{"global load, 128 bit":48,"fused multiply-add":256,"shuffle":20},"code_lines":210,"shared_lines":160,
   "compile_s":41.5}

`repeat`: two runs of one commit on one card, compared (`lab compare A B --record`): `share` of the `rows` were called
faster or slower, each of them a false alarm.
  {"schema":1,"kind":"repeat","run":"...","a":"...","b":"...","commit":"1a2b3c4","rows":480,"faster":2,"slower":3,
   "ambiguous":9,"share":0.0104,"min_effect":0.03}

A measurement that failed is a line with `error` (one line of text) and no time. `emulated` lines have timer wall and
neither gbps nor of_ceiling. `flag` says why a line must not be read as a win ("above the ceiling", "fits in L2").
"""
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError

SCHEMA = 1
FILE = "records.jsonl"


@dataclass
class Env:
    """The machine, the software and the state of the card. `settings` is what the bench was asked for."""
    run: str
    when: str                             # before | after
    device: str                           # cuda | cpu
    time: str | None = None               # ISO 8601, UTC
    gpu: str | None = None                # marketing name, as the driver gives it
    capability: str | None = None         # "9.0"
    sms: int | None = None
    l2_bytes: int | None = None
    memory_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None               # the CUDA version torch was built with
    torch: str | None = None
    triton: str | None = None
    nvcc: str | None = None
    python: str | None = None
    cpu: str | None = None
    commit: str | None = None             # git commit; "+" and a hash of the difference when the tree was edited
    tuned: dict | None = None             # of the tables of `lab tune` that launchers read: lab.tune.tuned.digests
    sm_mhz: float | None = None
    mem_mhz: float | None = None
    sm_max_mhz: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttle: list | None = None          # reasons active at the time; [] is none
    ecc: str | None = None
    peers: dict = field(default_factory=dict)       # optional package -> version, or why it is absent
    settings: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    kind = "env"
    key_fields = ("when",)


@dataclass
class Ceiling:
    """The bandwidth of a plain stream of `bytes`. `best` marks the best launch shape of its direction and size."""
    run: str
    direction: str                        # read | copy | write
    backend: str                          # cuda | triton | torch: what the kernel was written in
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
    backend: str                          # cuda | triton | torch | cublas | sdpa_flash | cudnn | flashinfer | liger ...
    dtype: str                            # fp32 | fp16 | bf16
    batch: int
    shape: dict                           # the op's own sizes, e.g. {"n": 4096, "k": 4096}
    context: int | None = None            # tokens in the KV cache, where the op has one
    cache: str = "cold"                   # cold | warm | in_model
    timer: str = "graph"                  # graph | event | wall
    role: str | None = None               # which use of the op: qkv, o, gate_up, down, lm_head, hidden, head ...
    models: list = field(default_factory=list)      # presets with this shape
    plan: str | None = None               # basic | fused, where the op belongs to one plan only
    rung: int | None = None               # of the op's ladder (lab bench ops --ladder); config then has its name
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    bytes: int | None = None              # what must cross DRAM at least once
    flops: int | None = None
    gbps: float | None = None             # bytes / us
    of_ceiling: float | None = None       # gbps / the best read, copy or write bandwidth of this run
    of_stream: float | None = None        # gbps / what a plain stream of these bytes reached in this run
    config: dict = field(default_factory=dict)      # launch configuration, splits ...
    verdict: dict = field(default_factory=dict)     # other backend -> faster | slower | same | ambiguous
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "op"
    key_fields = ("op", "backend", "dtype", "batch", "context", "shape", "cache", "timer", "plan", "rung")


@dataclass
class ModelRow:
    """One decode step of a model. `bytes`: weights read a step (no embedding table) plus KV read at this context."""
    run: str
    model: str
    backend: str
    plan: str                             # basic | fused | persistent; "-" for a peer
    mode: str                             # graph | eager | compile
    dtype: str
    batch: int
    context: int
    timer: str = "graph"
    overrides: dict = field(default_factory=dict)   # op -> backend
    weights: str = "random"               # random | file
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    us_p99: float | None = None
    n: int | None = None
    tokens_per_s: float | None = None     # batch / us
    ttft_ms: float | None = None          # prefill of `context` tokens and the first token
    bytes: int | None = None
    gbps: float | None = None
    of_ceiling: float | None = None
    weight_bytes: int | None = None
    kv_bytes: int | None = None           # the cache as allocated
    workspace_bytes: int | None = None    # steady - weights - KV
    steady_bytes: int | None = None       # allocated between steps
    peak_bytes: int | None = None         # highest allocated, prefill and capture included
    page_utilisation: float | None = None  # tokens held / tokens the allocated pages could hold
    linearity: float | None = None        # tokens_per_s / (batch * tokens_per_s at the smallest batch / that batch)
    verdict: dict = field(default_factory=dict)
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "model"
    key_fields = ("model", "backend", "plan", "mode", "dtype", "batch", "context", "overrides", "timer")


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
    row: str                              # kernel | chain | gap | unexplained | total | swap
    order: int = 0                        # the order of the lines
    op: str | None = None
    role: str | None = None               # which use of the op, as in op records
    kernel: str | None = None
    overrides: dict = field(default_factory=dict)
    calls: int | None = None
    us: float | None = None
    us_p10: float | None = None
    us_p90: float | None = None
    n: int | None = None
    bytes: int | None = None              # ideal: what must cross DRAM at least once
    gbps: float | None = None
    of_ceiling: float | None = None
    of_token: float | None = None
    timer: str = "kineto"                 # kineto (device time stamps) | graph | wall
    flag: str | None = None
    emulated: bool = False
    note: str | None = None
    error: str | None = None
    kind = "ledger"
    key_fields = ("model", "backend", "plan", "dtype", "batch", "context", "row", "op", "role", "kernel", "overrides")


@dataclass
class Fairness:
    """One kernel of one side of a comparison, as it was compiled for `arch`; see lab/inspect/fairness.py."""
    run: str
    op: str
    backend: str                          # cuda | triton
    dtype: str
    arch: str                             # sm_90a | sm_80
    shape: dict                           # the sizes of the call that took this kernel
    kernel: str
    configurations: int | None = None     # CUDA: instantiations compiled in for the dtype; Triton: entries of the table
    tried: int | None = None              # settings that `lab tune` raced for the op on this architecture, all shapes
    registers: int | None = None          # per thread
    spill_bytes: int | None = None        # per thread
    shared_bytes: int | None = None       # per block, static and dynamic
    threads: int | None = None            # per block
    occupancy: float | None = None        # theoretical, of a multiprocessor's warps
    instructions: int | None = None       # of machine code
    mix: dict = field(default_factory=dict)         # of them, by class (lab/inspect/kernel.py), no zeros; {}: unknown
    code_lines: int | None = None         # of the twin's file, no blanks, comments, docstrings
    shared_lines: int | None = None       # of the files it shares with other ops; the base of all ops not counted
    compile_s: float | None = None        # nvcc: the whole file, every instantiation and architecture; Triton: this kernel
    kind = "fairness"
    key_fields = ("op", "backend", "dtype", "arch", "shape", "kernel")


@dataclass
class Repeat:
    """What comparing two runs that measured the same thing said: the false-alarm rate of `lab compare`."""
    run: str                              # the run beside which it is recorded
    a: str                                # the runs compared
    b: str
    commit: str
    rows: int                             # rows of both runs, without those that failed
    faster: int
    slower: int
    ambiguous: int
    share: float                          # (faster + slower) / rows
    min_effect: float                     # the smallest change called faster or slower
    host_rows: int = 0                    # of `rows`, those whose times include the host's
    host_called: int = 0                  # of those, called faster or slower
    kind = "repeat"
    key_fields = ("a", "b")


KINDS = {c.kind: c for c in (Env, Ceiling, OpRow, ModelRow, LedgerRow, Fairness, Repeat)}


def to_line(record):
    """The record as one line of JSON, newline included. Null fields are left out; six digits are kept."""
    body = {k: float(f"{v:.6g}") if isinstance(v, float) else v
            for k, v in dataclasses.asdict(record).items() if v is not None}
    # Not a number is no JSON, and a record that holds one is a bug in whoever measured.
    return json.dumps({"schema": SCHEMA, "kind": record.kind, **body}, allow_nan=False, separators=(",", ":")) + "\n"


def from_dict(body):
    """A record from a decoded line. Raises LabError for an unknown kind, schema or field, or a missing field."""
    if not isinstance(body, dict):
        raise LabError("not a record: expected a JSON object")
    schema, kind = body.get("schema"), body.get("kind")
    if not isinstance(schema, int) or schema < 1:
        raise LabError(f"not a record: no schema version (got {schema!r})")
    if schema > SCHEMA:
        raise LabError(f"schema version {schema} is newer than this lab's {SCHEMA}: update the lab to read it")
    if kind not in KINDS:
        raise LabError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    cls = KINDS[kind]
    values = {k: v for k, v in body.items() if k not in ("schema", "kind")}
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    required = {n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if unknown or missing:
        raise LabError(f"a {kind} record with " + " and ".join(
            f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("no", missing)) if names))
    return cls(**values)


def key(record):
    """What makes two measurements the same one in two runs: kind and the fields of key_fields, hashable."""
    return (record.kind, *(freeze(getattr(record, f)) for f in record.key_fields))


def freeze(value):
    """A hashable form of a JSON value, independent of the order of an object's members."""
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(freeze, value))
    return value


def path_of(where):
    """The records file of a path: itself, or records.jsonl inside a folder."""
    where = Path(where)
    return where / FILE if where.is_dir() or where.suffix != ".jsonl" else where


@dataclass
class Records:
    """What a file holds. `notices` are lines for the user: a torn last line, lines skipped as too new."""
    path: Path
    rows: list
    notices: list = field(default_factory=list)

    def runs(self):
        """Run ids, oldest first."""
        return list(dict.fromkeys(r.run for r in self.rows))

    def of_run(self, run):
        return [r for r in self.rows if r.run == run]

    def of_kind(self, kind, run=None):
        return [r for r in self.rows if r.kind == kind and run in (None, r.run)]


def read(where, newer="error"):
    """Reads a records file (or a folder that holds records.jsonl) into Records.

    newer: "error" raises LabError at a line with a schema newer than SCHEMA, "skip" leaves such lines out with a
    notice. A torn last line (a run killed by a full disk) is a notice; any other bad line is a LabError.
    """
    path = path_of(where)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LabError(f"no records: {path} does not exist; `lab bench all --out {path.parent}` writes it") from None
    except OSError as e:
        raise LabError(f"cannot read {path}: {e.strerror}") from None
    *lines, tail = data.split(b"\n")
    found = Records(path, [])
    skipped = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except ValueError:
            raise LabError(f"{path}:{number}: not JSON; remove the line to read the rest") from None
        schema = body.get("schema") if isinstance(body, dict) else None
        if newer == "skip" and isinstance(schema, int) and schema > SCHEMA:
            skipped += 1
            continue
        try:
            found.rows.append(from_dict(body))
        except LabError as e:
            raise LabError(f"{path}:{number}: {e}") from None
    if skipped:
        found.notices.append(f"{path}: skipped {skipped} lines of a newer schema than {SCHEMA}; update the lab")
    if tail.strip():
        found.notices.append(f"{path}: the last line is torn ({len(tail)} bytes) and was left out")
    return found


class Writer:
    """Appends records; every append is one write of whole lines, on disk when it returns.

    So a killed run leaves whole lines. A torn last line left by a full disk is cut off on opening (see `notices`).
    """

    def __init__(self, where):
        self.path = path_of(where)
        self.notices = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as e:
            raise LabError(f"cannot write {self.path}: {e.strerror}") from None
        self._cut_torn_tail()

    def _cut_torn_tail(self):
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._fd, whole)
            self.notices.append(f"{self.path}: cut off a torn last line of {len(data) - whole} bytes")

    def append(self, *records):
        data = "".join(map(to_line, records)).encode()
        written = os.write(self._fd, data)
        if written != len(data):
            raise LabError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        os.fsync(self._fd)

    def close(self):
        os.close(self._fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
