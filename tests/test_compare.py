"""Compare: verdicts from the spread, matching, what is not comparable, exit codes."""

import argparse
import json
import random

import pytest

from lab.errors import LabError
from lab.records import compare
from lab.records.schema import Env, LedgerRow, ModelRow, OpRow, Writer, read


def row(us, spread=0.005, n=50, run="r", **fields):
    given = dict(op="linear", backend="cuda", dtype="bf16", batch=1, shape={"n": 4, "k": 4}) | fields
    return OpRow(run, **given, us=us, us_p10=us * (1 - spread), us_p90=us * (1 + spread), n=n)


def env(run="r", **fields):
    return Env(run, "before", "cuda", **(dict(gpu="H100", driver="580", torch="2.11", triton="3.6") | fields))


def write(folder, *rows):
    with Writer(folder) as w:
        w.append(*rows)
    return str(folder)


def run(*argv):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.main(parser.parse_args(list(map(str, argv))))


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (row(100), row(100), "same"),
        (row(100), row(100.8), "same"),  # below the smallest effect
        (row(100, 0.0001), row(100.9, 0.0001), "same"),  # and stays the same however tight the spread
        (row(100), row(110), "slower"),
        (row(110), row(100), "faster"),
        (row(100, 0.2), row(110, 0.2), "ambiguous"),  # a bare ratio would say slower
        (row(100, 0.3, n=5), row(100, 0.3, n=5), "ambiguous"),  # equal medians that nobody knows well
        (row(100, 0.03, n=400), row(100, 0.03, n=400), "same"),
        (row(2.0), row(2.08), "same"),  # 4%, but below the grain of a launch
        (row(100), row(110, n=2), "ambiguous"),
    ],
)
def test_verdicts(a, b, expected):
    assert compare.verdict(a, b) == expected


def test_two_samples_of_one_distribution_rarely_raise_an_alarm():
    rand = random.Random(0)

    def measured(centre):
        s = sorted(rand.gauss(centre, centre * 0.01) for _ in range(40))
        r = row(s[20])
        r.us_p10, r.us_p90, r.n = s[4], s[36], 40
        return r

    said = [
        compare.verdict(measured(50), measured(50 * rand.gauss(1, 0.005)), compare.BETWEEN_RUNS)
        for _ in range(500)
    ]
    assert said.count("same") > 0.9 * len(said)
    assert said.count("slower") + said.count("faster") < 0.01 * len(said)
    said = [compare.verdict(measured(50), measured(55), compare.BETWEEN_RUNS) for _ in range(500)]
    assert said.count("slower") > 0.95 * len(said)


def test_rows_are_matched_by_key_and_sorted_by_what_needs_a_look():
    a = [row(100), row(50, backend="triton"), row(7, batch=2), row(9, cache="warm")]
    failed = OpRow("r", "linear", "cuda", "bf16", 1, {"k": 4, "n": 4}, cache="warm", error="out of memory")
    b = [row(120), row(50, backend="triton"), row(7, batch=4), failed]
    pairs, only_a, only_b = compare.match(a, b)
    assert [(p.verdict, p.a.backend, p.a.cache) for p in pairs] == [
        ("slower", "cuda", "cold"),
        ("failed", "cuda", "warm"),
        ("same", "triton", "cold"),
    ]
    assert pairs[0].change == pytest.approx(0.2)
    assert [r.batch for r in only_a] == [2] and [r.batch for r in only_b] == [4]


def test_models_and_ledger_rows_count_and_gaps_do_not():
    model = ModelRow("r", "m", "cuda", "basic", "graph", "bf16", 1, 32, us=9.0, us_p10=8.9, us_p90=9.1, n=9)
    total = LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 32, "total", us=9.0, us_p10=8.9, us_p90=9.1, n=9)
    gap = LedgerRow("r", "m", "cuda", "basic", "bf16", 1, 32, "gap", us=1.0)
    pairs, _, _ = compare.match([model, total, gap], [model, total, gap])
    assert sorted(p.a.kind for p in pairs) == ["ledger", "model"]


def test_exit_codes(tmp_path, capsys):
    a = write(tmp_path / "a", env("a"), row(100, run="a"), row(30, run="a", batch=2))
    same = write(tmp_path / "same", env("b"), row(100.5, run="b"), row(20, run="b", batch=2))
    slower = write(tmp_path / "slower", env("b"), row(120, run="b"), row(30, run="b", batch=2))
    assert run(a, same) == 0
    out = capsys.readouterr().out
    assert "1 faster (50.0%)" in out and "1 same (50.0%)" in out
    assert run(a, slower) == 1
    out = capsys.readouterr().out
    assert "+20.0%" in out and "slower: 1 of 2 rows" in out
    assert run(a, slower, "--fail-on-slower", "25%") == 0
    assert run(a, slower, "--min-us", 30) == 0


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(gpu="A100"), r"not comparable: GPU differs \(GPU: H100 and A100\)"),
        (dict(driver="590", triton="3.7"), "not comparable: driver / triton differ "),
        (dict(device="cpu", gpu=None), "device / GPU differ"),
    ],
)
def test_not_comparable_says_what_differs(tmp_path, change, said):
    a = write(tmp_path / "a", env("a"), row(100, run="a"))
    other = env("b")
    other.__dict__.update(change)
    b = write(tmp_path / "b", other, row(100, run="b"))
    with pytest.raises(LabError, match=said):
        run(a, b)
    assert run(a, b, "--anyway") == 0


def test_nothing_in_common_is_not_comparable(tmp_path):
    a, b = write(tmp_path / "a", env(), row(1)), write(tmp_path / "b", env(), row(1, batch=3))
    with pytest.raises(LabError, match="no row"):
        run(a, b)
    with pytest.raises(LabError, match="no env row"):
        run(a, write(tmp_path / "c", row(1)))


def test_one_run_of_a_file_can_be_named_and_the_last_is_the_default(tmp_path):
    both = write(tmp_path / "a", env("one"), row(100, run="one"), env("two"), row(150, run="two"))
    assert run(f"{both}@one", both) == 1
    assert run(both, both) == 0
    with pytest.raises(LabError, match="has no run 'three': it has one, two"):
        run(f"{both}@three", both)


def test_json_and_shares(tmp_path):
    a = write(tmp_path / "a", env("a"), row(100, run="a"))
    b = write(tmp_path / "b", env("b"), row(90, run="b"))
    assert run(a, b, "--json", tmp_path / "v.json") == 0
    body = json.loads((tmp_path / "v.json").read_text())
    assert body["rows"][0]["verdict"] == "faster" and body["rows"][0]["change"] == pytest.approx(-0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "v.json"]
    assert compare.parse_share("5%") == compare.parse_share("0.05") == 0.05
    for bad in ("5", "fast", "-1%"):
        with pytest.raises(LabError, match="write 5%"):
            compare.parse_share(bad)


def drawn(rand, centre, name, batch):
    """A row of 40 samples of a time of `centre`, one run's offset from the next being half a per cent."""
    centre *= rand.gauss(1, 0.005)
    s = sorted(rand.gauss(centre, centre * 0.01) for _ in range(40))
    r = row(s[20], run=name, batch=batch)
    r.us_p10, r.us_p90, r.n = s[4], s[36], 40
    return r


def test_the_false_alarms_of_one_commit_are_printed_and_recorded(tmp_path, capsys):
    rand = random.Random(0)
    runs = {
        name: write(
            tmp_path / name,
            env(name, commit="c0ffee"),
            *(drawn(rand, us * (1.05 if name == "shifted" else 1), name, us) for us in range(20, 420)),
        )
        for name in ("a", "b", "shifted")
    }
    home = write(tmp_path / "home", env("measured"))
    assert run(runs["a"], runs["b"], "--record", home) == 0
    assert "false alarms:" in capsys.readouterr().out
    (found,) = (r for r in read(home).rows if r.kind == "repeat")
    assert (found.run, found.a, found.b, found.commit, found.rows) == ("measured", "a", "b", "c0ffee", 400)
    assert found.share == pytest.approx((found.faster + found.slower) / 400, rel=1e-4) and found.share <= 0.05
    pairs, _, _ = compare.match(compare.open_run(runs["a"])[0], compare.open_run(runs["shifted"])[0])
    assert sum(p.verdict == "slower" for p in pairs) > 0.8 * len(pairs)


def test_other_tables_are_said_and_are_no_repeat(tmp_path, capsys):
    a, b = (
        write(
            tmp_path / name,
            env(name, commit="c0ffee", tuned={"cuda": digest, "triton": None}),
            row(100, run=name),
        )
        for name, digest in (("a", "1a2b3c4d"), ("b", None))
    )
    assert run(a, b) == 0
    said = capsys.readouterr()
    assert (
        "tables of lab tune differ" in said.err and "1a2b3c4d" in said.err and "false alarms" not in said.out
    )


def test_other_commits_are_no_repeat(tmp_path, capsys):
    a = write(tmp_path / "a", env("a", commit="one"), row(100, run="a"))
    for name, commit in (("b", "two"), ("c", None)):
        b = write(tmp_path / name, env(name, commit=commit), row(100, run=name))
        assert run(a, b) == 0 and "false alarms" not in capsys.readouterr().out
        with pytest.raises(LabError, match="not two runs of one commit"):
            run(a, b, "--record", a)
    with pytest.raises(LabError, match="not two runs"):
        run(a, a, "--record", a)
