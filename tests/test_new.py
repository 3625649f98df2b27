"""`lab new`: the files of a new op say what to fill in; a copied kernel passes; nothing is written over.
(That the files of an op build: tests/test_add_an_op.py.)"""

import shutil

import pytest
from test_add_an_op import ROOT

from lab import cli
from lab.errors import LabError
from lab.learn import new


def bare(folder):
    """The files of the lab that get a line."""
    for path in new.NEW_LINES:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    for path in ("cuda_src/launchers", "triton_kernels"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    return folder


def test_a_new_op_has_four_files_and_three_lines(tmp_path, capsys):
    root = bare(tmp_path)
    assert new.new_op("soft_cap", root) == 0
    said = capsys.readouterr().out
    for path in new.NEW_FILES:
        text = (root / path.replace("NAME", "soft_cap")).read_text()
        assert "FILL IN" in text and "NAME" not in text and "CAMEL" not in text
        assert path.replace("NAME", "soft_cap") in said
    assert "struct SoftCapArgs" in (root / "cuda_src/launchers/soft_cap.h").read_text()
    before = {path: path.read_text() for path in root.rglob("*.*")}
    with pytest.raises(LabError, match="exists already"):
        new.new_op("soft_cap", root)
    assert before == {path: path.read_text() for path in root.rglob("*.*")}


@pytest.mark.parametrize("name", ["linear", "silu_mul"])
def test_an_op_that_exists_is_not_written_over(name, capsys):
    assert cli.main(["new", name]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["Upper"], ["a-b"], ["../x"], ["class"], ["namespace"], ["kernel"], ["trace"], ["launch"], ["a", "b"]],
)
def test_a_name_that_is_none(words, capsys):
    assert cli.main(["new", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lab: error: ")


@pytest.mark.parametrize("language, name", [("triton", "my_silu_mul.py"), ("cuda", "my_silu_mul.cu")])
def test_a_copied_kernel_is_tried_as_it_is(language, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "kernel", "silu_mul", "--language", language]) == 0
    assert f"lab try {name} --op silu_mul" in capsys.readouterr().out
    assert cli.main(["try", name, "--op", "silu_mul", "--device", "cpu", "--dtype", "fp32"]) == 0
    (tmp_path / name).write_text("mine")
    assert cli.main(["new", "kernel", "silu_mul", "--language", language]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
    assert cli.main(["new", "kernel", "silu_mul", "--out", f"a/folder/{name}"]) == 0
    assert (tmp_path / "a/folder" / name).is_file()
    assert cli.main(["new", "kernel", "silu_mull"]) == 2
    assert "silu_mul" in capsys.readouterr().err
