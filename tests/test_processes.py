"""Commands with limits."""

import sys

import pytest

from lab import processes
from lab.processes import OverLimit, run_group


def python(code):
    return [sys.executable, "-c", code]


def test_status_and_both_outputs():
    status, said = run_group(python("import sys; print('a', flush=True); sys.stderr.write('b'); sys.exit(3)"))
    assert (status, said) == (3, "a\nb")


def test_what_is_no_text_is_replaced():
    assert run_group(python(r"import os; os.write(1, b'a\xffb')"))[1] == "a\ufffdb"


@pytest.mark.parametrize(
    "code, said",
    [
        ("import time; time.sleep(60)", r"took more than 1 s \(--timeout\)"),
        ("while True: print('x' * 1000)", "printed more than 1 MiB"),
        ("print('x' * (3 << 20))", "printed more than 1 MiB"),  # and is at its end at once
    ],
)
def test_a_limit_ends_a_command(code, said, monkeypatch):
    monkeypatch.setattr(processes, "MOST_OUTPUT", 1 << 20)
    with pytest.raises(OverLimit, match=said):
        run_group(python(code), timeout=1 if "sleep" in code else 30)
