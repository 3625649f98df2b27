"""Records to tidy pandas frames, one set per run, with everything a reader must be warned of.

A line is left out of the frames, and a notice says so, when it failed or holds no usable number. Rows above
102% of the measured ceiling, or flagged by the harness, stay in the frames with `suspect` set: they are
listed, and no bandwidth picture shows them. Emulated rows lose any bandwidth they claim.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lab.errors import LabError
from lab.harness import untuned
from lab.records import compare, schema

ABOVE = compare.MOST_OF_CEILING  # more is a fault of the measurement, not a fast kernel
NUMBERS = {
    "batch",
    "context",
    "us",
    "us_p10",
    "us_p90",
    "us_p99",
    "n",
    "bytes",
    "flops",
    "gbps",
    "of_ceiling",
    "of_stream",
    "of_token",
    "rung",
    "calls",
    "order",
    "tokens_per_s",
    "ttft_ms",
    "weight_bytes",
    "kv_bytes",
    "workspace_bytes",
    "steady_bytes",
    "peak_bytes",
    "page_utilisation",
    "linearity",
    "configurations",
    "tried",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "threads",
    "occupancy",
    "instructions",
    "code_lines",
    "shared_lines",
    "compile_s",
    "rms_error",
    "tokens",
    "kl",
    "top1",
    "bytes_before",
    "block",
    "blocks",
    "others_us",
    "tiles_us",
    "work_us",
    "ahead",
    "normal_us",
    "scale",
    "graph_us",
    "of_graph",
    "ideal_tokens_per_s",
    "of_ideal",
    "rows_used",
    "prefill_share",
    "sequences",
    "seconds",
    "paused",
}
OBJECTS = {
    "shape": dict,
    "config": dict,
    "verdict": dict,
    "overrides": dict,
    "models": list,
    "mix": dict,
    "products": dict,
    "stamps": list,
}
BANDWIDTH = ("gbps", "of_ceiling", "of_stream")


@dataclass(frozen=True)
class Notice:
    level: str  # first: no figure may be read without it | warning: changes how some may be read | note
    text: str

    @property
    def label(self):
        return "Note" if self.level == "note" else "Warning"


@dataclass
class Run:
    """One bench run. Frames have every field of the record's dataclass as a column, also when they are empty.

    Numbers are floats with NaN where absent, texts are "" where absent; `suspect` marks what no win may rest
    on. `tuning` of op, model and ledger rows is "untuned" (of a model's row with the ops that are), or "".
    """

    id: str
    path: Path
    envs: list
    ceiling: pd.DataFrame
    op: pd.DataFrame  # those that are not in `ladder` or `packed`
    model: pd.DataFrame
    ledger: pd.DataFrame
    fairness: pd.DataFrame
    failures: pd.DataFrame
    skipped: pd.DataFrame  # rows whose configuration does not fit the memory
    notices: list = field(default_factory=list)
    ladder: pd.DataFrame = field(default_factory=pd.DataFrame)  # op rows that are rungs
    packed: pd.DataFrame = field(default_factory=pd.DataFrame)  # op rows with packed weights
    accuracy: pd.DataFrame = field(default_factory=pd.DataFrame)
    inside: pd.DataFrame = field(default_factory=pd.DataFrame)
    serving: pd.DataFrame = field(default_factory=pd.DataFrame)
    links: pd.DataFrame = field(default_factory=pd.DataFrame)  # ceilings of the link between GPUs
    divided: pd.DataFrame = field(default_factory=pd.DataFrame)  # model rows of several GPUs
    between: pd.DataFrame = field(default_factory=pd.DataFrame)  # op rows of calls between GPUs
    foreign: list = field(default_factory=list)  # of the same GPU

    @property
    def env(self):
        """The env row from before the measurements, or the first there is, or None."""
        return next((e for e in self.envs if e.when == "before"), self.envs[0] if self.envs else None)

    @property
    def emulated(self):
        """True when nothing in the run was timed on a GPU."""
        kinds = self.op, self.packed, self.model, self.serving, self.ledger, self.inside
        kinds += self.divided, self.between
        frames = [f["emulated"] for f in kinds if len(f)]
        if frames:
            return all(bool(emulated.all()) for emulated in frames)
        return self.env is not None and self.env.device != "cuda"

    @property
    def device(self):
        env = self.env
        if env is None:
            return "unknown device"
        return str(env.gpu or env.cpu or "unnamed CPU" if env.device != "cuda" else env.gpu or "unnamed GPU")

    @property
    def about(self):
        """What was measured, for a list of runs: a few names, or how many there are."""
        tokens = self.model, self.divided, self.ledger, self.inside
        parts = {
            "": _few("op", "ops", self.op, self.ladder, self.between),
            "packed ": _few_in_formats("op", "ops", self.packed),
            "tokens of ": _few_in_formats("preset", "models", *tokens),
            "KV cache in ": _few("kv_dtype", "formats", *tokens),
            "accuracy of ": _few_in_formats("model", "models", self.accuracy),
            "serving of ": _few_in_formats("model", "models", self.serving),
            "links between ": "GPUs" * bool(len(self.links)),
        }
        return "; ".join(what + names for what, names in parts.items() if names) or "no times"

    def best_ceiling(self, direction=None):
        """The best bandwidth in GB/s of a direction (None: of all), or None."""
        rows = self.ceiling if direction is None else self.ceiling[self.ceiling["direction"] == direction]
        return float(rows["gbps"].max()) if rows["gbps"].notna().any() else None

    @property
    def suspects(self):
        return pd.concat(
            [
                f[f["suspect"]].assign(kind=kind)
                for kind, f in (
                    ("op", self.op),
                    ("op", self.ladder),
                    ("op", self.packed),
                    ("model", self.model),
                    ("ledger", self.ledger),
                )
            ],
            ignore_index=True,
        )


@dataclass
class Stored:
    """One run's records as they were read: making frames of them takes longer than reading them."""

    id: str
    path: Path
    rows: list
    notices: list  # of the whole file
    joined: list = field(default_factory=list)  # runs of several GPUs (Stored), which are shown with this one

    @property
    def env(self):
        """Its first env row, or None."""
        envs = sorted((r for r in self.rows if r.kind == "env"), key=lambda r: r.when != "before")
        return envs[0] if envs else None

    @property
    def time(self):
        """When the run began, as its env row says; "" without one."""
        return str(self.env.time or "") if self.env else ""

    @property
    def of_several(self):
        """Whether it measured several GPUs."""
        settings = (self.env and self.env.settings) or {}
        return "ranks" in settings or "exchange" in settings

    def run(self):
        """The run with its frames."""
        rows = self.rows + [r for other in self.joined for r in other.rows if of_several_gpus(r)]
        by_kind = {kind: [r for r in rows if r.kind == kind] for kind in schema.KINDS}
        # What several GPUs did stands apart, but for ledgers (parallel_figures.py).
        by_kind["ceiling"], links = parted(by_kind["ceiling"], of_several_gpus)
        by_kind["model"], divided = parted(by_kind["model"], of_several_gpus)
        by_kind["op"], between = parted(by_kind["op"], of_several_gpus)
        run = Run(
            self.id,
            self.path,
            by_kind["env"],
            *(_frame(by_kind[kind], kind) for kind in ("ceiling", "op", "model", "ledger", "fairness")),
            failures=pd.DataFrame(),
            skipped=pd.DataFrame(),
            ladder=_frame([], "op"),
            packed=_frame([], "op"),
            accuracy=_frame(by_kind["accuracy"], "accuracy"),
            inside=_frame(by_kind["inside"], "inside"),
            serving=_frame(by_kind["serving"], "serving"),
            links=_frame(links, "ceiling"),
            divided=_frame(divided, "model"),
            between=_frame(between, "op"),
            notices=[Notice("warning", n) for n in self.notices],
        )
        own = _about_machine(run)
        for other in self.joined:
            said = f"Run {other.id}, of several GPUs of this machine, is shown, too."
            run.notices.append(Notice("note", said))
            # What is to be said of its machine, and is not said of this run's.
            run.notices += [
                Notice(notice.level, f"In run {other.id}: {notice.text}")
                for notice in _about_machine(other.run())
                if notice not in own
            ]
        for frame in (run.model, run.divided, run.ledger, run.inside):
            _name_by_format(frame)
        run.foreign = [r for r in _foreign(self.path) if run.env is not None and r.gpu == run.env.gpu]
        _mark_untuned(run, by_kind["op"], by_kind["fairness"])
        _drop_failures(run)
        _drop_unusable(run)
        _check_bandwidth(run)
        rung = run.op["rung"].notna()
        packed = (run.op["weight_format"] != "") & ~rung
        run.ladder, run.packed, run.op = (
            run.op[mine].reset_index(drop=True) for mine in (rung, packed, ~rung & ~packed)
        )
        repeats = list(map(_about_repeat, by_kind["repeat"]))
        run.notices = _about_machine(run) + run.notices + _about_gaps(run) + repeats
        return run


def parted(rows, which):
    """(those that are not, those that are)."""
    return [r for r in rows if not which(r)], [r for r in rows if which(r)]


def load(where):
    """Every Run found in records.jsonl of a folder and of its subfolders, newest first. Raises as `find`."""
    return [stored.run() for stored in find(where)]


def find(where):
    """Every run as Stored, newest first.

    Raises LabError when there is no file, no readable line, or a damaged one.
    """
    where = Path(where)
    if not where.exists():
        raise LabError(f"no such folder: {where}")
    paths = [where] if where.is_file() else sorted(where.rglob(schema.FILE))
    if not paths:
        raise LabError(
            f"no {schema.FILE} in {where} or its subfolders; `lab bench all --out {where}` writes one"
        )
    runs, skipped = [], []
    for path in paths:
        found = schema.read(path, newer="skip")
        skipped += found.notices
        by_run = {}
        for row in found.rows:
            by_run.setdefault(row.run, []).append(row)
        runs += joined([Stored(run, path, rows, found.notices) for run, rows in by_run.items()])
    if not runs:
        raise LabError("; ".join(skipped) or f"no records in {', '.join(map(str, paths))}")
    return sorted(runs, key=lambda run: (run.time, run.id), reverse=True)


def joined(runs):
    """The runs of one file, those of several GPUs joined to one of a single GPU, if the same card, software
    and commit made it, or else to each other: a command for each number of GPUs measures what belongs
    together."""
    alone = [run for run in runs if not run.of_several]
    found = list(alone)
    for run in filter(lambda run: run.of_several, runs):
        beside = (
            other for other in reversed(found) if other.env and compare.same_setting(run.env, other.env)
        )
        host = next(beside, None)
        if host is None:
            found.append(run)
        else:
            host.joined.append(run)
    return found


def _few(column, what, *frames, between=", "):
    """The values of a column of some frames, or, of more than three, how many."""
    found = list(dict.fromkeys(value for f in frames if column in f for value in f[column] if value))
    return between.join(found) if len(found) <= 3 else f"{len(found)} {what}"


def _few_in_formats(column, what, *frames):
    """The same, with the weight formats that occur in the frames."""
    formats = _few("weight_format", "formats", *frames, between=" and ")
    return _few(column, what, *frames) + f" in {formats}" * bool(formats)


def of_several_gpus(row):
    """Whether a row says what several GPUs did. (A run of several measures the ceilings of one, too.)"""
    if row.kind == "ceiling":
        return str(row.direction).startswith("link")
    if row.kind == "op":
        return "ranks" in (row.shape or {})
    return row.kind in ("model", "ledger") and row.ranks != 1


def _foreign(path):
    """The Foreign records beside a records file. Raises LabError for a file that holds something else."""
    beside = path.with_name(schema.FOREIGN_FILE)
    return schema.read(beside).of_kind("foreign") if beside.exists() else []


def _frame(rows, kind):
    cls = schema.KINDS[kind]
    rows = list(
        {schema.key(r): r for r in rows}.values()
    )  # a resumed bench may have measured a key again: the last
    columns = [f.name for f in dataclasses.fields(cls)]
    data = {}
    for column in columns:
        values = [getattr(r, column) for r in rows]
        if column in NUMBERS:
            data[column] = pd.Series(values, dtype=float)
        elif column in OBJECTS:
            kind_of = OBJECTS[column]
            data[column] = pd.Series(
                [v if isinstance(v, kind_of) else kind_of() for v in values], dtype=object
            )
        elif column in ("emulated", "best"):
            data[column] = pd.Series([v is True for v in values], dtype=bool)
        else:
            data[column] = pd.Series(["" if v is None else str(v) for v in values], dtype=object)
    frame = pd.DataFrame(data, columns=columns)
    frame["suspect"] = False
    return frame


def _name_by_format(frame):
    """Makes the name in `model` say the formats of weights and KV cache that are not in the dtype: steps that
    read other bytes are another model to all pictures. `preset` keeps the name without."""
    frame["preset"] = frame["model"]
    said = [
        ", ".join(filter(None, [r.weight_format, r.kv_dtype and f"KV cache {r.kv_dtype}"]))
        for r in frame[["weight_format", "kv_dtype"]].itertuples()
    ]
    frame["model"] = [f"{name} ({words})" if words else name for name, words in zip(frame["preset"], said)]


def _mark_untuned(run, op_rows, fairness):
    """Adds the column `tuning`. An op of a model or a ledger counts as untuned where the cards, or all of its
    backend's op rows, say so; which ops a plan runs is read from the ledgers."""
    cards = untuned.by_cards(fairness)
    marks = {schema.key(r): untuned.is_untuned(r, cards) for r in op_rows}
    run.op["tuning"] = [untuned.WORD if mark else "" for mark in marks.values()]
    always = dict.fromkeys(cards, True)
    for r in run.op[run.op["error"] == ""].itertuples():
        always[r.backend, r.op] = always.get((r.backend, r.op), True) and r.tuning == untuned.WORD
    whole = {which for which, untuned_everywhere in always.items() if untuned_everywhere}
    led = run.ledger
    led["tuning"] = [
        untuned.WORD if (r.backend, r.op) in whole and r.row in ("kernel", "chain") else ""
        for r in led.itertuples()
    ]
    steps = {}
    for r in led[led["tuning"] != ""].itertuples():
        steps.setdefault((r.backend, r.plan), {})[r.op] = None
    run.model["tuning"] = [
        f"{untuned.WORD}: {', '.join(found)}" if found else ""
        for found in (steps.get((r.backend, r.plan), {}) for r in run.model.itertuples())
    ]
    if whole and not run.emulated:
        named = ", ".join(f"{backend} {op}" for backend, op in sorted(whole))
        run.notices.append(
            Notice(
                "warning",
                f"Untuned: {named}: no launch settings were raced for it by `lab tune`, so "
                "its times are no limit of its language; they are marked wherever they stand.",
            )
        )


def _drop_failures(run):
    failed = []
    for kind in ("ceiling", "op", "model", "serving", "ledger", "accuracy", "inside", "divided", "between"):
        frame = getattr(run, kind)
        bad = frame["error"] != ""
        failed.append(frame[bad].assign(kind=kind))
        setattr(run, kind, frame[~bad].reset_index(drop=True))
    failed = pd.concat(failed, ignore_index=True)
    too_large = failed["error"].str.startswith("does not fit")
    run.skipped, run.failures = failed[too_large], failed[~too_large]
    if len(run.skipped):
        run.notices.append(
            Notice("note", f"{len(run.skipped)} configurations were skipped, for they do not fit the memory.")
        )
    if len(run.failures):
        run.notices.append(
            Notice(
                "warning",
                f"{len(run.failures)} measurements failed and are in no picture; "
                "they are listed under Failures.",
            )
        )


def _drop_unusable(run):
    """Times must be finite and positive; a batch must be a number."""
    for kind in ("ceiling", "op", "model", "serving", "ledger"):
        frame = getattr(run, kind)
        ok = frame["us"].map(math.isfinite) & (frame["us"] > 0)
        if kind == "ledger":  # these are differences: nothing, or below it by the noise of two times
            ok = frame["us"].map(math.isfinite) & (
                (frame["us"] > 0) | frame["row"].isin(["chain", "gap", "unexplained"])
            )
        if "batch" in frame:
            ok &= frame["batch"] > 0
        if kind == "model":
            ok &= frame["context"] >= 0
        if (~ok).any():
            run.notices.append(
                Notice(
                    "warning",
                    f"{int((~ok).sum())} {kind} records hold no usable time "
                    "(missing, not a number, or not positive) and were left out.",
                )
            )
        setattr(run, kind, frame[ok].reset_index(drop=True))


def _check_bandwidth(run):
    for kind in ("op", "model", "ledger"):
        frame = getattr(run, kind)
        emulated = frame["emulated"] | (frame["timer"] == "wall")
        frame["emulated"] = emulated
        columns = [c for c in BANDWIDTH if c in frame]
        if frame.loc[emulated, columns].notna().any(axis=None):
            run.notices.append(
                Notice("warning", f"Emulated {kind} records claim a bandwidth; it was ignored.")
            )
        frame.loc[emulated, columns] = float("nan")
        # Warm figures come from the caches: they may exceed the ceiling and no bandwidth picture shows them.
        warm = frame.get("cache", pd.Series("", index=frame.index)) == "warm"
        frame.loc[(frame["of_ceiling"] > ABOVE) & (frame["flag"] == "") & ~warm, "flag"] = "above the ceiling"
        frame["suspect"] = (frame["flag"] != "") & ~warm & (frame["us"] > 0)
        if kind == "ledger":  # its other flags say how well the account adds up; its table shows them
            frame["suspect"] &= frame["flag"] == "above the ceiling"
    suspects = run.suspects
    if len(suspects):
        why = suspects["flag"].value_counts()
        run.notices.append(
            Notice(
                "warning",
                f"{len(suspects)} measurements are flagged ("
                + ", ".join(f"{count} {flag}" for flag, count in why.items())
                + f"); no bandwidth picture shows them and they count as no win. More than "
                f"{ABOVE:.0%} of the ceiling means that the measurement is wrong or that caches "
                "served it.",
            )
        )


def _about_machine(run):
    if not run.envs:
        return [Notice("warning", "No env record: the machine, the versions and the clocks are unknown.")]
    found = []
    env = run.env
    if run.emulated:
        found.append(
            Notice(
                "first",
                "Emulated on a CPU: CUDA kernels ran through their host build, Triton kernels "
                "through the interpreter. Times say nothing about a GPU and no bandwidth is "
                "claimed.",
            )
        )
    for note in (str(n) for e in run.envs for n in e.notes or []):
        if not (run.emulated and note.startswith("emulated")):  # said above
            said = re.search("(synthetic)|throttled|left out", note, re.I)
            found.append(Notice("note" if not said else "first" if said[1] else "warning", note))
    after = next((e for e in run.envs if e.when == "after"), None)
    if after is None and not run.emulated:
        found.append(
            Notice("warning", "No env record from after the run: it was stopped early, or is still running.")
        )
    elif (
        after and _number(env.sm_mhz) and _number(after.sm_mhz) and abs(after.sm_mhz / env.sm_mhz - 1) > 0.05
    ):
        found.append(
            Notice("warning", f"The SM clock moved from {env.sm_mhz:.0f} to {after.sm_mhz:.0f} MHz.")
        )
    if "+" in str(env.commit or ""):
        found.append(Notice("note", f"The source tree had uncommitted edits ({env.commit})."))
    settings = env.settings if isinstance(env.settings, dict) else {}
    if len(run.model) and not run.emulated and settings.get("compile") is False:
        found.append(Notice("note", "torch.compile was not measured in this run."))
    peers = env.peers if isinstance(env.peers, dict) else {}
    absent = [f"{name} ({why})" for name, why in peers.items() if not str(why)[:1].isdigit()]
    if absent:
        found.append(Notice("note", "Peers left out: " + "; ".join(absent) + "."))
    return list(dict.fromkeys(found))


def _about_repeat(r):
    return Notice(
        "note",
        f"Two runs of commit {str(r.commit)[:8]} on one card, compared: {compare.alarms(r)}: false alarms "
        f"(runs {r.a} and {r.b}; a change below {r.min_effect:.0%} is called the same; `make gpu-repeat` "
        "measures it again).",
    )


def _about_gaps(run):
    found = []
    measured = set().union(*(f["backend"] for f in (run.op, run.ladder, run.packed, run.model)))
    for name in ("cuda", "triton"):
        if name not in measured and measured:
            found.append(
                Notice(
                    "warning",
                    f"No usable measurement of the {name} backend: the pictures show what there "
                    "is, and comparisons that need it are left out.",
                )
            )
    others = run.ledger, run.accuracy, run.inside, run.serving, run.divided, run.between
    if not measured and not any(map(len, others)):
        found.append(Notice("warning", "No op, model or ledger measurement in this run yet."))
    only_serving = len(run.serving) and not measured and not len(run.ledger)  # whose rows have no shares
    if not run.emulated and run.best_ceiling() is None and not only_serving:
        found.append(
            Notice("warning", "No ceiling was measured in this run: shares are those that the rows state.")
        )
    return found


def _number(value):
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
