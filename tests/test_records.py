"""Records: schema, atomic appends, torn lines, newer schemas, keys."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import synthetic_records as synthetic

from lab.errors import LabError
from lab.records import schema
from lab.records.schema import (
    Accuracy,
    Ceiling,
    Env,
    Fairness,
    Foreign,
    InsideRow,
    LedgerRow,
    ModelRow,
    OpRow,
    Repeat,
    ServingRow,
    Writer,
    key,
    read,
    to_line,
)

EXAMPLES = [
    Env("r1", "before", "cuda", gpu="H100", throttle=[], settings={"quick": True}),
    Ceiling("r1", "read", "cuda", 1 << 32, us=1404.0, us_p10=1.0, us_p90=2.0, n=3, gbps=3059.0, best=True),
    OpRow("r1", "linear", "cuda", "bf16", 1, {"n": 8, "k": 4}, us=8.0, us_p10=7.0, us_p90=9.0, n=20),
    ModelRow("r1", "m", "cuda", "basic", "graph", "bf16", 1, 1024, us=1000.0),
    ServingRow("r1", "m", "cuda", "fused", "bf16", 16, "lengths", 1.0, us=1010.0, graph_us=1000.0),
    LedgerRow("r1", "m", "cuda", "basic", "bf16", 1, 1024, "kernel", op="linear", kernel="k", us=1.0),
    Fairness(
        "r1",
        "linear",
        "cuda",
        "bf16",
        "sm_90a",
        {"n": 8, "k": 4},
        "k",
        registers=40,
        occupancy=0.5,
        mix={"shuffle": 5},
    ),
    InsideRow("r1", "m", "cuda", "persistent", "bf16", 1, 1024, "block", block=3, stamps=[9, 5, 2]),
    Accuracy("r1", "m", "fp8", "fp32", "t", 256, 0.01, 0.9, 8, 32, {"qkv": 0.02}, "F32"),
    Repeat("r1", "a", "b", "c0ffee", 200, 1, 2, 3, 0.015, 0.03),
    Foreign("r1", "vLLM", "1", "m", "bf16", 1, 64, "step", 5.0, "H100", "none", "made up"),
]


def test_every_kind_survives_a_round_trip(tmp_path):
    with Writer(tmp_path) as w:
        w.append(*EXAMPLES)
    got = read(tmp_path)
    assert got.rows == EXAMPLES and got.notices == [] and got.runs() == ["r1"]
    assert {r.kind for r in got.rows} == set(schema.KINDS)
    assert [r.op for r in got.of_kind("op", "r1")] == ["linear"] and got.of_kind("op", "r2") == []


def test_the_examples_of_the_docstring_are_valid_records():
    found = re.findall(r"^  (\{.*?\})\n(?! {3})", schema.__doc__, re.S | re.M)
    rows = [schema.from_dict(json.loads(text)) for text in found]
    assert {r.kind for r in rows} == set(schema.KINDS)


def test_a_fairness_record_from_before_the_mix_still_loads():
    body = json.loads(to_line(EXAMPLES[6]))
    del body["mix"]
    assert schema.from_dict(body).mix == {}


def test_null_fields_are_left_out_and_nan_is_refused():
    assert "gbps" not in json.loads(to_line(EXAMPLES[2]))
    with pytest.raises(ValueError):
        to_line(OpRow("r", "o", "cuda", "bf16", 1, {}, us=float("nan")))


def test_torn_last_line_is_a_notice_and_is_cut_on_append(tmp_path):
    path = tmp_path / schema.FILE
    path.write_text(to_line(EXAMPLES[1]) + to_line(EXAMPLES[2])[:40])
    got = read(path)
    assert got.rows == [EXAMPLES[1]] and "torn" in got.notices[0]
    with Writer(path) as w:
        assert "torn" in w.notices[0]
        w.append(EXAMPLES[3])
    again = read(path)
    assert again.rows == [EXAMPLES[1], EXAMPLES[3]] and again.notices == []


@pytest.mark.parametrize(
    "line, what",
    [
        ("{broken\n", "not JSON"),
        ("[1]\n", "not a record"),
        ('{"kind":"op"}\n', "no schema"),
        ('{"schema":1,"kind":"song"}\n', "unknown kind"),
        (
            '{"schema":1,"kind":"ceiling","run":"r","direction":"read","backend":"x","bytes":1,"speed":3}\n',
            "unknown speed",
        ),
        ('{"schema":1,"kind":"ceiling","run":"r","direction":"read"}\n', "no backend, bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, what):
    (tmp_path / schema.FILE).write_text(to_line(EXAMPLES[0]) + line)
    with pytest.raises(LabError, match=rf"records\.jsonl:2: .*{what}"):
        read(tmp_path)


def test_a_newer_schema_is_an_error_or_skipped_with_a_notice(tmp_path):
    newer = json.loads(to_line(EXAMPLES[1])) | {"schema": schema.SCHEMA + 1, "colour": "red"}
    (tmp_path / schema.FILE).write_text(to_line(EXAMPLES[1]) + json.dumps(newer) + "\n")
    with pytest.raises(LabError, match="newer"):
        read(tmp_path)
    got = read(tmp_path, newer="skip")
    assert got.rows == [EXAMPLES[1]] and "skipped 1" in got.notices[0]


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(LabError, match="lab bench"):
        read(tmp_path / "nowhere")


def test_keys_ignore_run_time_and_member_order_but_not_identity():
    a = OpRow("r1", "linear", "cuda", "bf16", 1, {"n": 8, "k": 4}, us=8.0)
    b = OpRow("r2", "linear", "cuda", "bf16", 1, {"k": 4, "n": 8}, us=9.0, config={"splits": 4}, models=["m"])
    assert key(a) == key(b)
    for change in (
        dict(backend="triton"),
        dict(batch=2),
        dict(cache="warm"),
        dict(timer="event"),
        dict(dtype="fp16"),
    ):
        assert key(a) != key(OpRow(**{**a.__dict__, **change})), change
    assert len({key(r) for r in EXAMPLES}) == len(EXAMPLES)


def _append_many(path, name, count):
    with Writer(path) as w:
        for i in range(count):
            w.append(OpRow(name, "linear", "cuda", "bf16", i + 1, {"n": i}))


def test_two_writers_never_mix_their_lines(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_append_many, args=(tmp_path, name, 200)) for name in "ab"]
    for j in jobs:
        j.start()
    for j in jobs:
        j.join()
    got = read(tmp_path)
    assert len(got.of_run("a")) == len(got.of_run("b")) == 200


def test_a_killed_run_loses_nothing_that_it_had_appended(tmp_path):
    """The kill may fall into a write: part of that lot is there, and the next writer cuts its torn line."""
    code = (
        "import sys; from lab.records.schema import *\n"
        "w = Writer(sys.argv[1])\n"
        "for lot in range(100_000):\n"
        "    w.append(*[OpRow('r', 'linear', 'cuda', 'bf16', 1, {'n': lot}, note='x' * 3000)] * 8)\n"
        "    print(lot, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    path = tmp_path / schema.FILE
    for _ in range(10):
        assert child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    appended = 10 + len(child.stdout.read().splitlines())
    child.wait()
    assert path.stat().st_size > 200_000
    lots = [row.shape["n"] for row in read(path).rows]
    assert lots == [i // 8 for i in range(len(lots))]
    assert 8 * appended <= len(lots) <= 8 * (appended + 1)
    with Writer(path) as w:
        w.append(EXAMPLES[1])
    got = read(path)
    assert got.notices == [] and len(got.rows) == len(lots) + 1 and got.rows[-1] == EXAMPLES[1]


def cpu_seconds(work):
    """The least CPU time of three tries: other work on the machine only ever adds to it."""
    found = []
    for _ in range(3):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


def test_reading_costs_little_more_than_decoding_the_json(tmp_path):
    """Every field of every row is checked; held to json.loads of the same lines on the same machine.

    It took twice as long as json.loads on an x86 server core.
    """
    some = [to_line(r) for r in synthetic.make(batches=(1, 4), contexts=(1024,))]
    lines = (some * (20_000 // len(some) + 1))[:20_000]
    path = tmp_path / schema.FILE
    path.write_text("".join(lines))
    with schema.no_collection():
        alone = cpu_seconds(lambda: [json.loads(line) for line in lines])
    whole = cpu_seconds(lambda: read(path))
    assert len(read(path).rows) == len(lines)
    assert whole < 4 * alone, f"{whole / alone:.2f} times the time of json.loads"


def test_a_line_that_is_surely_right_passes_the_check_of_every_field():
    """The quick check of a whole line may be unsure; it must never pass what a field's check refuses."""
    wrong = (
        None,
        True,
        "x",
        "\0",
        "x" * 20_000,
        -1,
        -0.5,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        [],
        {},
        [1],
    )
    refused = 0
    for example in EXAMPLES:
        body = json.loads(to_line(example))
        layout = schema._layout(body["kind"], tuple(body))
        assert schema._surely_right(layout, body)
        for name in body.keys() - {"schema", "kind"}:
            for value in wrong:
                bad = {**body, name: value}
                optional = name in layout.schema.optional
                problem = value is not None or not optional
                problem = problem and layout.schema.checks[name](value)
                if problem:
                    refused += 1
                    assert not schema._surely_right(layout, bad), (name, value)
                    with pytest.raises(schema.BadValue, match=name):
                        schema.from_dict(bad)
    assert refused > 500
