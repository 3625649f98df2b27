"""CONTRIBUTING.md's section "Add an op", followed literally in a copy of the lab: the op it adds must work
everywhere. And the files of `lab new`, in the same copy: to build it takes longest."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.learn import new
from lab.records import schema

ROOT = Path(__file__).resolve().parent.parent
NAME, NEW = "scaled_add", "soft_cap"
# A line that begins with a file's name, and the fenced block below it.
BLOCK = re.compile(r"^`([\w./]+)`[^\n]*\n\n```(\w+)\n(.*?)^```$", re.M | re.S)


# Asked of the copy of the lab: the tuner's candidates, what a bench on a GPU holds it to and takes from DRAM,
# its look in a picture, and what it launches under the settings of the first candidate.
WHAT_ELSE_KNOWS_IT = f"""
import torch
from lab.contract import Rand
from lab.ops import find
from lab.report import style
from lab.tune.tuner import candidates
from triton_kernels import common, settings
op = find("{NAME}")
found = candidates("triton", op.name, 1, 2, {{"cols": 576}}, 40)
print(len(found), "candidates")
print(op.direction)
print([name for name in op.names if name in op.cold])
print(style.part_colors([op.name])[op.name])
args = op.inputs(Rand("cpu", torch.bfloat16), rows=1, cols=576)
with common.recording("sm_90") as launches, settings.forced(op.name, found[0]):
    op.launchers["triton"](*args, out=op.outputs(*args))
print("BLOCK", launches[0].meta["BLOCK"])
"""

# All that is asked of the copy, in one process, for a process takes seconds to import torch.
ASK = """
import json, sys
sys.path.insert(0, "tests")
from conftest import FORKS
from lab import worker
from lab.cli import main
worker.subprocess = FORKS
def end(status):
    print("<status>", status, "<end>", sep="", flush=True)
for words in json.loads(sys.argv[1]):
    try:
        end(main(words))
    except SystemExit as ended:  # --help
        end(ended.code or 0)
exec(sys.argv[2])
end(0)
import pytest
end(int(pytest.main(sys.argv[3:])))
"""


def section(title="Add an op"):
    """The text of a section."""
    return re.search(rf"^## {title}\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]


def follow(folder, title="Add an op"):
    """Writes every new file and makes every edit that the section asks for; the names of the files, in
    order."""
    done = []
    for name, language, text in BLOCK.findall(section(title)):
        path = folder / name
        if language == "diff":
            for place in text.split("@@\n"):
                old = "".join(line[1:] for line in place.splitlines(True) if line[0] in " -")
                new = "".join(line[1:] for line in place.splitlines(True) if line[0] in " +")
                before = path.read_text()
                assert before.count(old) == 1, (
                    f"{name} does not hold what CONTRIBUTING.md changes there: {old}"
                )
                path.write_text(before.replace(old, new))
        else:
            assert not path.exists(), f"CONTRIBUTING.md writes over {name}"
            path.write_text(text)
        done.append(name)
    return done


def copy(folder):
    """What building and running needs. Objects come along, so that only what is new is compiled."""
    shutil.copytree(
        ROOT / "build/host",
        folder / "build/host",
        copy_function=shutil.copy,
        ignore=shutil.ignore_patterns("bindings.*", "*.so"),
    )
    for name in ("cuda_src", "triton_kernels", "lab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder / name)


class Copy:
    """A copy of the lab with two more ops: that of CONTRIBUTING.md, and one of `lab new`."""

    # No GPU: its build would take minutes.
    settings = {"LAB_CUDA": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}

    def __init__(self, folder):
        copy(folder)
        self.folder = folder
        self.written = follow(folder)
        assert new.new_op(NEW, folder) == 0
        self.built = self.run("setup.py", "build_ext", "--inplace").stdout

    def run(self, *words, status=0):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, **self.settings, "PYTHONPATH": str(self.folder)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == status, f"{' '.join(words)}\n{done.stdout}"
        return done


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    if not (ROOT / "build/host").is_dir():
        pytest.skip("needs the objects of the host build: make build")
    return Copy(tmp_path_factory.mktemp("larger"))


def test_a_new_op_builds_and_its_check_fails_in_one_line(larger):
    """Until it is filled in; with a reference that says what its kernels do, it passes."""
    check = ("-m", "lab", "check", "--op", NEW, "--backend")
    said = larger.run(*check, "cuda,triton", status=2).stdout
    (line,) = [line for line in said.splitlines() if "lab:" in line]
    assert f"begin with reference() in lab/ops/{NEW}.py" in line
    contract = larger.folder / f"lab/ops/{NEW}.py"
    unfilled = f'raise LabError("{NEW} is not filled in yet: begin with reference() in lab/ops/{NEW}.py")'
    assert contract.read_text().count(unfilled) == 1
    contract.write_text(contract.read_text().replace(unfilled, "return (x.double(),)"))
    larger.run(*check, "cuda,triton,torch")


def test_contributing_adds_an_op(larger):
    tmp_path, run = larger.folder, lambda *words: larger.run(*words).stdout
    assert larger.written == [
        f"lab/ops/{NAME}.py",
        f"cuda_src/{NAME}.cu",
        f"triton_kernels/{NAME}.py",
        f"cuda_src/launchers/{NAME}.h",
        "cuda_src/launchers.h",
        "cuda_src/bindings.cpp",
        "lab/ops/__init__.py",
    ]
    build, *of_section = re.search(r"^```sh\n(.*?)^```", section(), re.M | re.S)[1].splitlines()
    assert build == "make build"
    # No kernel of another op was compiled again: their two files, the bindings, the facts of the build.
    made = larger.built
    assert f"{NAME}.cu" in made and f"{NEW}.cu" in made and "lab._host: 4 of " in made, made
    asked = [
        *of_section,
        "lab ops",
        f"lab report out/{NAME}",
        f"lab inspect {NAME} --backend triton",
        "lab tune --help",
    ]
    asked = [line.removeprefix("lab ").split() for line in asked]
    tests = ["-q", "tests/test_ops.py", "tests/test_twins.py", "-k", NAME]
    shown = run("-c", ASK, json.dumps(asked), WHAT_ELSE_KNOWS_IT, *tests)
    found = re.findall(r"(.*?)<status>(\d+)<end>\n", shown, re.S)
    assert [status for _, status in found] == ["0"] * (len(asked) + 2), shown
    *answers, (known, _), (tested, _) = found
    said = {words[0]: text for words, (text, _) in zip(asked, answers, strict=True)}

    assert re.search(rf"^{NAME} .*out = x \+ scale \* y$", said["ops"], re.M)
    for backend in ("cuda", "triton", "torch"):
        assert len(re.findall(rf"^{NAME} +\w+ {backend} +2/2 cases", said["check"], re.M)) == 3  # dtypes
    assert "1. Locate" in said["explain"] and "2. Add and store" in said["explain"]
    assert "blockIdx.x" in said["explain"] and "tl.program_id(0)" in said["explain"]
    rows = schema.read(tmp_path / "out" / NAME).of_kind("op")
    assert {(str(row.shape), tuple(row.models)) for row in rows} == {("{'cols': 576}", ("smollm2-135m",))}
    assert {(row.op, row.backend) for row in rows} == {
        (NAME, backend) for backend in ("cuda", "triton", "torch")
    }
    assert all(row.us > 0 and not row.error for row in rows)
    assert f"<summary>{NAME}</summary>" in (tmp_path / "out" / NAME / "index.html").read_text()
    for words in (f"{NAME} bf16 for sm_90a", "rows=1 cols=4096", f"{NAME}_kernel"):
        assert words in said["inspect"]
    assert re.search(rf"^ +OP .*{NAME}, or all", said["tune"], re.M)
    assert known.splitlines() == ["6 candidates", "copy", "['y']", "#aa4499", "BLOCK 512"]
    assert " passed" in tested and " failed" not in tested
