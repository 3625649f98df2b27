"""What the tests share: markers that skip with a reason, the device, seeded random tensors."""

import functools
import importlib.util
import os

# Side by side (pytest -n) each process takes its share of the cores; before torch is imported, and for child
# processes.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

from lab.contract import Rand

GPU = torch.cuda.is_available()
# Of these files nothing is `quick`: they compile programs, run sanitizers, emulate a GPU's shapes, compile
# Triton kernels for GPUs, interpret whole models or open a browser.
NOT_QUICK = {
    "test_host",
    "test_exercises",
    "test_own_kernel",
    "test_extension",
    "test_add_an_op",
    "test_gpu_shapes",
    "test_tune",
    "test_triton_compile",
    "test_inspect",
    "test_triton_fused",
    "test_triton_step",
    "test_persistent",
    "test_fused",
    "test_interpreter",
    "test_ladder",
    "test_report",
    "test_demo",
    "test_gpu_check",
    "test_harness",
    "test_oracle",
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    reasons = {
        "gpu": None if GPU else "needs an NVIDIA GPU (make gpu-check runs these)",
        "oracle": None if importlib.util.find_spec("transformers") else "needs transformers (make oracle)",
    }
    for item in items:
        if item.path.stem not in NOT_QUICK and "slow" not in item.keywords:
            item.add_marker(pytest.mark.quick)
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


@pytest.fixture(autouse=True, scope="session")
def sources_are_highlighted_once():
    """Each page shows the same kernels' sources, and colouring them takes longer than most of the other work."""
    from lab.report import twins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twins, "highlight", functools.cache(twins.highlight))
        yield
