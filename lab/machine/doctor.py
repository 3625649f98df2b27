"""`lab doctor`: what this machine can run, and for each thing that is missing one line on what to do.

A backend counts as working only after it has run rmsnorm here and agreed with the reference. Exit status 0 if
some device runs both backends, 1 if none does.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lab import extension
from lab.errors import LabError

ROOT = Path(__file__).resolve().parent.parent.parent
OK, MISSING, OPTIONAL = "ok", "missing", "optional"


@dataclass
class Finding:
    """One line of the report. `state`: ok | missing (something to do) | optional (absent, not needed)."""

    name: str
    state: str
    text: str
    todo: str = ""


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def main(args):
    found = examine()
    works = {f.name for f in found if f.state == OK}
    usable = [device for device in ("cpu", "cuda") if {f"cuda on {device}", f"triton on {device}"} <= works]
    if args.json:
        print(json.dumps({"usable": usable, "findings": [asdict(f) for f in found]}, indent=1))
        return 0 if usable else 1
    width = max(len(f.name) for f in found)
    for f in found:
        print(f"{f.state:<8}  {f.name:<{width}}  {f.text}")
        if f.todo:
            print(f"{'':<8}  {'':<{width}}  -> {f.todo}")
    for device in usable:
        where = "this GPU" if device == "cuda" else "the CPU (emulated: times say nothing about a GPU)"
        print(f"\nBoth backends run on {where}: lab run --backend cuda --device {device} --prompt Hello")
    if not usable:
        print("\nNo device runs both backends yet: see the lines marked missing.")
    return 0 if usable else 1


def examine():
    """All findings, in the order of the report."""
    found = [
        Finding(
            "python",
            OK,
            f"{platform.python_version()} at {sys.executable}, {platform.system()} "
            f"{platform.machine()}, {os.cpu_count()} cores",
        )
    ]
    torch = package(found, "torch", "run `make setup`")
    package(found, "triton", "run `make setup` (Triton has packages for Linux only)")
    gpu = find_gpu(found) if torch else None
    find_compiler(found)
    for module, device in (("_host", "cpu"), ("_cuda", "cuda")):
        find_extension(found, module, gpu if device == "cuda" else None)
    if torch:
        for device in ("cpu", "cuda") if gpu else ("cpu",):
            for backend in ("cuda", "triton"):
                found.append(prove(backend, device))
        find_model(found)
    for name, what in (
        ("flashinfer-python", "attention of FlashInfer as a peer"),
        ("liger-kernel", "Triton kernels of Liger as a peer"),
        ("transformers", "the oracle tests: `make oracle`"),
    ):
        have = installed(name)
        found.append(Finding(name, OK, have) if have else Finding(name, OPTIONAL, f"absent: {what}"))
    return found


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package(found, name, todo):
    have = installed(name)
    found.append(Finding(name, OK, have) if have else Finding(name, MISSING, "not installed", todo))
    return have


def find_gpu(found):
    """Returns the GPU's (major, minor), or None."""
    import torch

    built = f"torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU only'}"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        found.append(
            Finding(
                "gpu",
                OK,
                f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory / 2**30:.0f} GiB, driver {driver.splitlines()[0]}; {built}",
            )
        )
        return p.major, p.minor
    card = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if card:
        found.append(
            Finding(
                "gpu",
                MISSING,
                f"{card.splitlines()[0]}, which torch cannot use: {built}",
                "install a CUDA build of torch into the python that `make setup` uses",
            )
        )
    else:
        found.append(Finding("gpu", OPTIONAL, f"no NVIDIA GPU here; {built}"))
    return None


def said(*command):
    """The output of a command; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_compiler(found):
    """Reports nvcc, looking where setup.py looks."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(f"{root}/bin/nvcc" for root in roots if root)]
    places += [str(path) for entry in sys.path for path in Path(entry or ".", "nvidia").glob("*/bin/nvcc")]
    nvcc = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if nvcc:
        release = re.search(r"release [\d.]+", said(nvcc, "--version") or "")
        found.append(Finding("nvcc", OK, f"{release[0] if release else 'unknown release'} at {nvcc}"))
    else:
        found.append(
            Finding(
                "nvcc",
                OPTIONAL,
                "not on PATH, in CUDA_HOME, CUDA_PATH, /usr/local/cuda or pip's packages: "
                "the GPU build is left out",
            )
        )


def find_model(found):
    from lab.model.sources import DEFAULT_MODEL, default_model_file

    try:
        path = default_model_file()
        found.append(Finding("model", OK, f"{DEFAULT_MODEL} at {path} ({path.stat().st_size / 1e6:.0f} MB)"))
    except LabError as error:
        todo = "or run `make demo`; `--weights random` needs no model"
        found.append(Finding("model", MISSING, str(error), todo))


def find_extension(found, module, gpu):
    """Reports whether lab.<module> is built from the sources as they are now, and for this GPU."""
    kind = "host build" if module == "_host" else "GPU build"
    needed = module == "_host" or gpu
    bad = MISSING if needed else OPTIONAL
    spec = importlib.util.find_spec(f"lab.{module}")
    if spec is None:
        found.append(
            Finding(
                kind,
                bad,
                f"lab.{module} is not built",
                "run `make setup`" + ("" if module == "_host" else " (needs nvcc)") if needed else "",
            )
        )
        return
    try:
        built = importlib.import_module(f"lab.{module}")
        info = built.build_info()
    except ImportError as error:
        found.append(Finding(kind, bad, f"lab.{module} does not load: {error}", "run `make clean setup`"))
        return
    text = f"{info['compiler']}, for {', '.join(info['archs'])}"
    if info["sanitizer"] != "none":
        text += f", sanitizer {info['sanitizer']}"
    if different := extension.changed(built):
        found.append(Finding(kind, bad, f"{different} since; {text}", f"run `{extension.BUILD[module]}`"))
    elif gpu and not covers(info["archs"], gpu):
        found.append(
            Finding(
                kind,
                MISSING,
                f"built for {', '.join(info['archs'])}, not for this sm_{gpu[0]}{gpu[1]}",
                f"run `LAB_CUDA_ARCH={gpu[0]}{gpu[1]} make setup`",
            )
        )
    else:
        found.append(Finding(kind, OK, text))


def covers(archs, gpu):
    """Whether machine code or PTX of `archs` ("80", "90a", "90+ptx") runs on a GPU of compute capability
    (major, minor)."""
    for arch in archs:
        major, minor, exact, ptx = re.fullmatch(r"(\d+)(\d)([af]?)(\+ptx)?", arch).groups()
        built = int(major), int(minor)
        if built == gpu or not exact and built <= gpu and (ptx or built[0] == gpu[0]):
            return True
    return False


def prove(backend, device):
    """Runs rmsnorm and compares it with the reference, so that "ok" means that a kernel has run here."""
    import torch

    from lab import dispatch, ops

    name = f"{backend} on {device}"
    try:
        run = dispatch.select(backend, device, {"rmsnorm": backend})
        x, w = (torch.randn(shape, device=device) for shape in ((3, 576), (576,)))
        got = run.rmsnorm(x, w, 1e-5)
        want = next(op for op in ops.OPS if op.name == "rmsnorm").reference(x, w, 1e-5)[0]
        worst = (got.double() - want.to(got.device).double()).abs().max().item()
    except LabError as error:
        return Finding(name, MISSING, str(error))
    except Exception as error:  # a broken driver or installation is a finding, too
        return Finding(name, MISSING, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    if not worst < 1e-4:
        return Finding(
            name, MISSING, f"rmsnorm is off by {worst:.1e}", "run `lab check` and report what it says"
        )
    how = (
        {"cuda": "compiled by g++, emulated", "triton": "interpreted"}[backend]
        if device == "cpu"
        else "compiled"
    )
    return Finding(name, OK, f"rmsnorm agrees with the reference ({how})")
