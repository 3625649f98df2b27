"""Records that no bench wrote: values that cannot be right, two writers at once, names that are paths."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import cli
from lab.errors import LabError, shown
from lab.records import card, compare, schema
from lab.records.schema import Env, LedgerRow, ModelRow, OpRow, Writer, read, to_line
from lab.records.session import Session
from lab.report import build, load, page, twins

ROOT = Path(__file__).parent.parent


def op_row(us=10.0, run="r", **fields):
    given = dict(op="linear", backend="cuda", dtype="bf16", batch=1, shape={"n": 4, "k": 4}) | fields
    return OpRow(run, **given, us=us, us_p10=us * 0.99, us_p90=us * 1.01, n=50)


def body(record=None, **changes):
    """The decoded line of a good op row, with changes."""
    return json.loads(to_line(record or op_row())) | changes


def write(folder, *lines, run="r"):
    """A records file of an env row, two good rows and these lines, which are numbers 4, 5 ..."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [
        to_line(Env(run, "before", "cuda", gpu="H100")),
        to_line(op_row(run=run)),
        to_line(op_row(run=run, batch=2)),
    ]
    text = "".join(good) + "".join(
        line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines
    )
    (folder / schema.FILE).write_text(text)
    return folder


DEEP = {"a": {"b": {"c": {"d": {"e": 1}}}}}
BAD = [
    ("run", ["r"], "run is ['r'], not text"),
    ("run", {"r": 1}, "not text"),
    ("run", None, "run is None, not text"),
    ("op", "a\0b", "it holds a NUL"),
    ("op", "\ud800", "no valid Unicode"),
    ("op", "x" * 1_000_000, "op is a text of 1000000 characters"),
    ("op", 5, "op is 5, not text"),
    ("us", "fast", "us is 'fast', not a number"),
    ("us", True, "us is True, not a number"),
    ("us", 10**400, "us is 1000"),
    ("us", float("nan"), "us is nan, not a finite number"),
    ("us", float("inf"), "us is inf, not a finite number"),
    ("us", -3.0, "us is -3.0, not a time"),
    ("us", 0, "us is 0, not a time"),
    ("us_p10", -1, "us_p10 is -1, not a time"),
    ("us_p90", 1e-300, "us_p90 is 1e-300, not a time"),
    ("us", [1.0], "not a number"),
    ("n", 2.5, "n is 2.5, not a whole number"),
    ("n", -1, "n is -1, less than 0"),
    ("batch", 0, "batch is 0, less than 1"),
    ("batch", False, "batch is False, not a whole number"),
    ("batch", None, "batch is None"),
    ("context", 1e30, "context is 1e+30, not a finite number below 2^63"),
    ("gbps", -1.0, "gbps is -1.0, less than 0"),
    ("shape", 7, "shape is 7, not an object"),
    ("shape", DEEP, "nested more than 4 deep"),
    ("shape", {"n": float("nan")}, "shape has an entry 'n' that is nan"),
    ("shape", {"\0": 1}, "NUL"),
    ("config", [], "config is [], not an object"),
    ("verdict", "faster", "verdict is 'faster', not an object"),
    ("verdict", {"triton": {}}, "verdict has an entry 'triton' that is {}, not text"),
    ("models", "all", "models is 'all', not a list"),
    ("models", [["m"]], "models has an entry that is ['m'], not text"),
    ("emulated", "no", "emulated is 'no', neither true nor false"),
    ("error", 3, "error is 3, not text"),
]


@pytest.mark.parametrize("field, value, says", BAD, ids=lambda v: str(v)[:30])
def test_a_value_that_cannot_be_right_leaves_its_line_out_by_name(tmp_path, field, value, says):
    found = read(write(tmp_path, body(**{field: value}), body(op_row(batch=3))))
    assert [r.batch for r in found.rows if r.kind == "op"] == [1, 2, 3]
    (notice,) = found.notices
    assert notice.startswith(f"{tmp_path / schema.FILE}:4: left out: {field} ") and says in notice
    assert len(notice) < len(str(tmp_path)) + 200 and notice.isprintable()


def test_every_field_of_every_kind_is_checked():
    examples = [
        Env("r", "before", "cuda"),
        op_row(),
        ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 1, 64, us=5.0),
        LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 64, "kernel", us=5.0),
        schema.ServingRow("r", "m", "cuda", "basic", "bf16", 1, "lengths", 1.0, us=5.0),
        schema.InsideRow("r", "m", "cuda", "persistent", "bf16", 1, 64, "phase", us=5.0),
        schema.Ceiling("r", "read", "cuda", 64, us=5.0),
        schema.Repeat("r", "a", "b", "c", 1, 0, 0, 0, 0.0, 0.03),
        schema.Fairness("r", "linear", "cuda", "bf16", "sm_90a", {}, "k"),
        schema.Accuracy("r", "m", "fp8", "fp32", kl=0.1),
        schema.Foreign("r", "vLLM", "1", "m", "bf16", 1, 64, "step", 5.0, "GPU", "none", "made up"),
    ]
    assert {r.kind for r in examples} == set(schema.KINDS)
    for example in examples:
        for name in schema.SCHEMAS[example.kind].checks:
            for value in (object, float("nan"), [[[[[[]]]]]], 10**400, "\0"):
                value = [value] if value is object else value
                with pytest.raises(LabError, match=f"^{name} "):
                    schema.from_dict(body(example, **{name: value}))


def test_differences_of_times_may_be_negative_and_other_times_not():
    row = dict(
        schema=1,
        kind="ledger",
        run="r",
        model="m",
        backend="cuda",
        plan="basic",
        dtype="bf16",
        batch=1,
        context=1,
    )
    for kind in ("chain", "gap", "unexplained"):
        assert schema.from_dict(row | dict(row=kind, us=-1.5, us_p10=-2, of_token=-0.01)).us == -1.5
    for kind in ("kernel", "total", "swap"):
        with pytest.raises(LabError, match="us is -1.5, not a time"):
            schema.from_dict(row | dict(row=kind, us=-1.5))


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"schema":true,"kind":"op"}\n', "no schema version"),
        ('{"schema":1,"kind":["op"]}\n', "unknown kind"),
        ('{"schema":1,"kind":{"op":1}}\n', "unknown kind"),
        ("[" * 100_000 + "\n", "not JSON"),
        ('{"a":' * 100_000 + "\n", "not JSON"),
        ('{"schema":1' + "0" * 5000 + ',"kind":"op"}\n', "not JSON"),
        ("\xff\n", "not JSON|unknown"),
        ('{"schema":1,"kind":"\\u001b[31m"}\n', r"unknown kind '\\x1b\[31m'"),
    ],
)
def test_what_is_no_record_is_one_line(tmp_path, line, says):
    with pytest.raises(LabError, match=rf"records.jsonl:4: .*({says})") as error:
        read(write(tmp_path, line))
    assert str(error.value).isprintable()


def test_many_bad_lines_are_counted(tmp_path):
    found = read(write(tmp_path, *[body(us="fast")] * 1000))
    assert len(found.notices) == schema.NAMED + 1 and "left out 990 more lines" in found.notices[-1]
    assert "up to line 1003" in found.notices[-1]


def test_the_published_records_load_without_a_word():
    found = read(ROOT / "reports/h100")
    assert found.rows and found.notices == [] == found.left_out


def test_a_pipe_in_the_place_of_a_file_is_one_line(tmp_path):
    import os

    os.mkfifo(tmp_path / schema.FILE)
    for use in (read, Writer):
        with pytest.raises(LabError, match="no ordinary file"):
            use(tmp_path)


# Every verb that reads records


def run(*words):
    return cli.main(list(map(str, words)))


@pytest.mark.parametrize(
    "field, value",
    [
        ("us", float("nan")),
        ("us", "fast"),
        ("run", ["r"]),
        ("us", 10**400),
        ("op", "a\0b"),
        ("us", -1.0),
        ("batch", True),
    ],
    ids=str,
)
def test_compare_does_not_pass_over_a_line_without_a_usable_value(tmp_path, capsys, field, value):
    a, b = write(tmp_path / "a", body(batch=3)), write(tmp_path / "b", body(**{"batch": 3, field: value}))
    for one, other in ((a, b), (b, a), (b, b)):
        assert run("compare", one, other) == 2
        said = capsys.readouterr()
        assert "2 same" in said.out and f"{b / schema.FILE}:4: left out: {field}" in said.err
        assert (
            f"not comparable in full: 1 line of these runs hold no usable value, as {b / schema.FILE}:4:"
            in said.err
        )
    assert run("compare", a, b, "--anyway") == 0
    assert run("compare", a, a) == 0


def test_a_bad_line_of_another_run_does_not_matter_to_compare(tmp_path):
    where = write(tmp_path, body(run="old", us="fast"))
    with open(where / schema.FILE, "a") as file:
        file.write(
            "".join(
                to_line(Env(name, "before", "cuda", gpu="H100")) + to_line(op_row(run=name))
                for name in ("old", "new")
            )
        )
    assert run("compare", f"{where}@r", f"{where}@new") == 0
    assert run("compare", f"{where}@old", where) == 2


def test_a_last_run_of_bad_lines_only_is_not_skipped_for_the_one_before(tmp_path):
    assert run("compare", write(tmp_path, body(run="new", us="fast")), tmp_path) == 2


def test_compare_of_differences_around_zero(tmp_path, capsys):
    def ledger(run, us):
        return LedgerRow(
            run, "m", "cuda", "basic", "bf16", 1, 32, "chain", op="rope", us=us, us_p10=us, us_p90=us, n=9
        )

    for name, us in (("a", 0.0), ("b", 5.0), ("c", -2.0)):
        with Writer(tmp_path / name) as out:
            out.append(Env(name, "before", "cuda"), ledger(name, us))
    assert run("compare", tmp_path / "a", tmp_path / "b") == 1 and "5.00" in capsys.readouterr().out
    assert run("compare", tmp_path / "c", tmp_path / "b") == 1
    assert run("compare", tmp_path / "b", tmp_path / "c") == 0


def test_hostile_names_do_not_control_the_terminal(tmp_path, capsys):
    evil = "\x1b[2J\x1b]0;title\x07\r\n‮"
    for name, us in (("a", 10.0), ("b", 20.0)):
        with Writer(tmp_path / name) as out:
            out.append(
                Env(evil, "before", "cuda", gpu=evil, commit=evil), op_row(us, run=evil, op=evil, role=evil)
            )
    assert run("compare", tmp_path / "a", tmp_path / "b", "--all") == 1
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))


def test_identical_rows_are_the_same_however_wide_their_spread(tmp_path, capsys):
    wide = [
        OpRow("r", "linear", "cuda", "bf16", b, {"n": 4}, us=100.0, us_p10=70.0, us_p90=130.0, n=5)
        for b in (1, 2)
    ]
    wide += [OpRow("r", "linear", "cuda", "bf16", 4, {"n": 4}, us=100.0)]
    assert compare.verdict(wide[0], wide[1]) == "ambiguous"
    with Writer(tmp_path) as out:
        out.append(Env("r", "before", "cuda"), *wide)
    assert run("compare", tmp_path, tmp_path) == 0
    assert "3 rows: 3 same (100.0%)" in capsys.readouterr().out


@pytest.mark.parametrize("field, value, says", BAD, ids=lambda v: str(v)[:30])
def test_report_leaves_the_line_out_and_says_so_on_the_page(tmp_path, field, value, says):
    write(tmp_path, body(**{field: value}))
    (run_,) = load.load(tmp_path)
    assert len(run_.op) == 2 and [n.level for n in run_.notices if f":4: left out: {field} " in n.text] == [
        "warning"
    ]


def test_a_bench_goes_on_after_bad_lines_and_measures_them_again(tmp_path, monkeypatch):
    now = Env("r", "before", "cpu", settings={"what": "ops"})
    monkeypatch.setattr(
        card, "environment", lambda run, *_: Env(run, "before", "cpu", settings={"what": "ops"})
    )
    (tmp_path / schema.FILE).write_text(
        to_line(now) + to_line(op_row()) + json.dumps(body(batch=2, us="fast")) + "\n"
    )
    session = Session(tmp_path, "cpu", {"what": "ops"})
    assert (
        session.resumed and session.run == "r" and session.has(op_row()) and not session.has(op_row(batch=2))
    )
    assert "records.jsonl:3: left out: us is 'fast'" in session.notices[0]
    session.finish(False)


# Names that are paths


def test_no_file_outside_the_project_gets_onto_the_page(tmp_path, undrawn, monkeypatch):
    """Ops whose names lead to files beside the project, in it but outside the kernels' folders, and
    nowhere."""
    secret = "the text of a file that is nobody's business"
    root = tmp_path / "project"
    for folder in ("cuda_src", "triton_kernels", "lab/ops"):
        (root / folder).mkdir(parents=True)
    for place in (tmp_path, root):
        for ending in (".cu", ".py"):
            (place / f"secret{ending}").write_text(f"// {secret}\n")
    names = [
        "../../secret",
        "../secret",
        str(tmp_path / "secret"),
        "ladder/../../secret",
        "./../../secret",
        "..",
        ".",
        "",
        "x" * 9000,
        "a/b",
        "linear\n",
        "C:\\secret",
        "‮",
    ]
    for op in names:
        for language in ("cuda", "triton"):
            with pytest.raises(LabError, match="kernel"):
                twins.source(language, op, root)
    monkeypatch.setattr(twins, "ROOT", root)
    monkeypatch.setattr(twins.source, "__defaults__", (root,))
    write(
        tmp_path / "in",
        *[body(op=op, models=[op], us=5.0 + i) for i, op in enumerate(names)],
        *[body(ModelRow("r", op, "cuda", op, "graph", "bf16", 1, 64, us=5.0)) for op in names],
    )
    assert build.main(SimpleNamespace(dir=str(tmp_path / "in"), out=str(tmp_path / "out"), run=None)) == 0
    assert secret not in (tmp_path / "out/index.html").read_text()
    assert {p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*")} == {
        "index.html",
        "README.md",
        "figures",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"project", "secret.cu", "secret.py", "in", "out"}


def test_shown():
    assert shown("\x1b[1m") == r"'\x1b[1m'" and shown("a" * 100, quotes=False) == "a" * 57 + "..."
    assert (
        shown([float("nan")]) == "[nan]"
        and shown("é", quotes=False) == "é"
        and shown("\ud800") == r"'\ud800'"
    )
    assert page.slug_of("../../x") == "x"


# Two writers

OPEN_AND_APPEND = """
import sys
from lab.records.schema import OpRow, Writer
for i in range(int(sys.argv[3])):
    with Writer(sys.argv[1]) as out:
        out.append(OpRow(sys.argv[2], "linear", "cuda", "bf16", i + 1, {"n": i}, note="x" * 3000))
"""


def test_processes_that_open_and_append_lose_no_line(tmp_path):
    jobs = [
        subprocess.Popen([sys.executable, "-c", OPEN_AND_APPEND, str(tmp_path), name, "150"], cwd=ROOT)
        for name in "abc"
    ]
    assert [j.wait() for j in jobs] == [0, 0, 0]
    found = read(tmp_path)
    assert found.notices == [] and [len(found.of_run(name)) for name in "abc"] == [150, 150, 150]


def _hold(path, ready, go):
    with open(path, "rb+") as file, schema.locked(file.fileno()):
        file.seek(0, 2)
        file.write(to_line(op_row(batch=7)).encode()[:40])
        file.flush()
        ready.set()
        go.wait(30)
        file.write(to_line(op_row(batch=7)).encode()[40:])
        file.flush()  # before the lock is given back, which happens before the file is closed


def test_a_line_that_another_process_is_writing_is_not_cut_off(tmp_path):
    """Holding the lock, a process has written the first half of a line: opening and reading both wait for the
    rest."""
    write(tmp_path)
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / schema.FILE, ready, go))
    holder.start()
    assert ready.wait(30)
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for code in (
            "import sys; from lab.records import schema; print(len(schema.read(sys.argv[1]).rows))",
            OPEN_AND_APPEND.replace("sys.argv[3]", "1").replace("sys.argv[2]", "'other'"),
        )
    ]
    import time

    time.sleep(1.5)
    assert [o.poll() for o in others] == [None, None]
    go.set()
    assert [o.wait(60) for o in others] == [0, 0] and others[0].stdout.read().strip() in ("4", "5")
    holder.join()
    found = read(tmp_path)
    assert found.notices == [] and [r.batch for r in found.rows if r.kind == "op" and r.run == "r"] == [
        1,
        2,
        7,
    ]
    assert len(found.of_run("other")) == 1


def test_a_torn_line_left_by_a_dead_writer_is_cut_off_by_the_next_append(tmp_path):
    with Writer(tmp_path) as out:
        out.append(op_row())
        with open(tmp_path / schema.FILE, "a") as file:
            file.write('{"schema":1,"kind":"op","run":"dead"')
        out.append(op_row(batch=2))
        assert "torn" in out.notices[0]
    assert [r.batch for r in read(tmp_path).rows] == [1, 2]


def test_a_full_disk_takes_back_what_it_took(tmp_path, monkeypatch):
    import errno
    import os

    real = os.write
    with Writer(tmp_path) as out:
        out.append(op_row())
        left = [50]

        def full(fd, data):
            count = min(left[0], len(data))
            left[0] -= count
            if not count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data[:count])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LabError, match=r"only 50 of 2\d\d bytes .*No space left on device"):
            out.append(op_row(batch=2))
        monkeypatch.undo()
        out.append(op_row(batch=3))
    found = read(tmp_path)
    assert found.notices == [] and [r.batch for r in found.rows] == [1, 3]
