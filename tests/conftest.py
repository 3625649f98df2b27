"""What the tests share: markers that skip with a reason, the device, seeded random tensors."""
import importlib.util

import pytest
import torch

from lab.contract import Rand

GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    reasons = {"gpu": None if GPU else "needs an NVIDIA GPU (make gpu-check runs these)",
               "oracle": None if importlib.util.find_spec("transformers") else "needs transformers (make oracle)"}
    for item in items:
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
