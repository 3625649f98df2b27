"""What the tests share: markers that skip with a reason, the device, seeded random tensors."""

import faulthandler
import functools
import gc
import hashlib
import html
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

# Side by side (pytest -n) each process takes its share of the cores; before torch is imported, and for child
# processes.
if side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // side_by_side)))

import pytest
import tiers
import torch

from lab import worker
from lab.contract import Rand
from lab.errors import LabError
from lab.model.sources import default_model_file

GPU = torch.cuda.is_available()


def has_model() -> bool:
    """Whether the demo's model is on this machine: CI, for one, does not download it."""
    try:
        return default_model_file().is_file()
    except LabError:
        return False


def built_with_gpu_shapes() -> bool:
    """Whether the host build has the launch shapes of a GPU, too."""
    try:
        from lab import _host
    except ImportError:
        return False
    return _host.build_info()["gpu_shapes"]


# Kernels that tests compile are linked with the objects of this build.
os.environ.setdefault("LAB_HOST_GPU_SHAPES", str(int(built_with_gpu_shapes())))


def pytest_configure(config):
    """With --dist loadfile files go in the order of their names. pytest-xdist would take those of most tests
    first, and end with a long file of a single test on one worker alone."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_ignore_collect(collection_path, config):
    """`-m quick` does not import the files of which nothing is quick."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return tiers.tier(f"{collection_path.stem}::") != "quick" or None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    reasons = {
        "gpu": None if GPU else "needs an NVIDIA GPU (make gpu-check runs these)",
        "oracle": None if importlib.util.find_spec("transformers") else "needs transformers (make oracle)",
        "real_model": None if has_model() else "needs the model of `make demo`",
    }
    for item in items:
        tier = tiers.tier(f"{item.path.stem}::{item.name}", GPU)
        if tier != "default":
            item.add_marker(tier)
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device():
    return "cuda" if GPU else "cpu"


@pytest.fixture
def rand(device):
    """rand(dtype, seed=0) -> lab.dispatch.Rand on the device of the tests."""
    return lambda dtype=torch.float32, seed=0: Rand(device, dtype, seed)


@pytest.fixture
def gpu_shapes(monkeypatch, device):
    """On a CPU the CUDA kernels have the launch shapes of a GPU."""
    if device == "cpu" and not built_with_gpu_shapes():
        pytest.skip("needs a host build with LAB_HOST_GPU_SHAPES=1: make test")
    monkeypatch.setenv("LAB_HOST_SHAPES", "gpu")


@pytest.fixture(autouse=True, scope="session")
def sources_are_highlighted_once():
    """Each page shows the same kernels' sources, and colouring them takes longest."""
    from lab.report import twins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twins, "highlight", functools.cache(twins.highlight))
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Every picture of a report is empty, and sources are not coloured: for tests of what stands around
    them."""
    from lab.report import figures, twins

    empty = ElementTree.fromstring('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>')
    monkeypatch.setattr(figures, "drawn", lambda *_: empty)
    monkeypatch.setattr(twins, "highlight", lambda language, code: html.escape(code))


@pytest.fixture(scope="session")
def kept_listings():
    """Machine code is disassembled once on this machine: its listing stays in Triton's cache, as the compiled
    kernel does, for NVIDIA's disassembler takes a third of a second to start."""
    from triton.runtime.cache import get_cache_manager

    from lab.inspect import binary
    from triton_kernels import offline

    tools = [(path.name, path.stat().st_size) for path in sorted(offline.TOOLS.glob("*dis*"))]

    def kept(disassemble, code_of):
        def listing(*given):
            key = hashlib.sha256(repr((disassemble.__name__, given[1:], tools)).encode() + code_of(given[0]))
            cache = get_cache_manager(key.hexdigest())
            path = cache.get_file("listing") or cache.put(disassemble(*given), "listing", binary=False)
            return Path(path).read_text()

        return listing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "sass", kept(offline.sass, lambda code: code.asm["cubin"]))
        patch.setattr(binary, "disassembly", kept(binary.disassembly, lambda path: Path(path).read_bytes()))
        yield


@pytest.fixture
def limited_calls(monkeypatch):
    """limited_calls(seconds): a kernel's process has so long for each call, but as long as it takes to start.
    Tests of what exceeds a limit then need not wait for long, and pass on a busy machine, too."""
    from lab.worker import Worker

    def limit(seconds):
        start = Worker.start

        def start_unlimited(self):
            self.timeout = None
            start(self)
            self.timeout = seconds

        monkeypatch.setattr(Worker, "start", start_unlimited)

    return limit


class Forked:
    """What lab.worker takes of a subprocess.Popen, for a copy of this process: torch and Triton, which take
    seconds to import, are there already."""

    def __init__(self, command, pass_fds, **_):
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            faulthandler.disable()
            # Collected in this process, a file object of the other one would close a number that is taken.
            gc.freeze()
            torch.set_num_threads(1)  # the other threads of OpenMP were not copied, and would be waited for
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            kept = sorted([0, 1, 2, *pass_fds, os.sysconf("SC_OPEN_MAX")])
            for before, after in zip(kept, kept[1:]):
                os.closerange(before + 1, after)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            worker.main(*map(int, command[-2:]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=float("inf")):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked worker", timeout)
            time.sleep(0.01)
        return self.returncode


FORKS = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # in the place of lab.worker's subprocess


@pytest.fixture(autouse=True)
def workers_are_forked(request, monkeypatch):
    """Kernels' processes begin as copies of this one, but for tests with the marker own_process, and on a
    GPU, which a copy could not use."""
    if GPU or not hasattr(os, "fork") or "own_process" in request.keywords:
        return
    monkeypatch.setattr(worker, "subprocess", FORKS)
