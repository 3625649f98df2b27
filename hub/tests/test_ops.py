"""Run after the package was built: python -m pytest tests (from its folder)."""

from pathlib import Path

import kernels
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernel():
    return kernels.get_local_kernel(PACKAGE / "build", backend=DEVICE)


def test_rmsnorm(kernel):
    x, w = torch.randn(3, 576, device=DEVICE), torch.randn(576, device=DEVICE)
    want = torch.nn.functional.rms_norm(x, (576,), w, 1e-5)
    torch.testing.assert_close(kernel.rmsnorm(x, w, 1e-5), want)
    out = torch.empty_like(x)
    assert kernel.rmsnorm(x, w, 1e-5, out=out) is out
    torch.testing.assert_close(out, want)


def test_linear(kernel):
    x, w = torch.randn(2, 256, device=DEVICE), torch.randn(96, 256, device=DEVICE) / 16
    torch.testing.assert_close(kernel.linear(x, w), x @ w.T, rtol=1e-3, atol=1e-3)


def test_layers(kernel):
    x = torch.randn(2, 5, 64, device=DEVICE)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernel.layers.SiluAndMul()(x), torch.nn.functional.silu(gate) * up)


def test_bad_input_is_refused(kernel):
    with pytest.raises(kernel.LabError, match="must agree"):
        kernel.rmsnorm(torch.ones(2, 8, device=DEVICE), torch.ones(4, device=DEVICE), 1e-5)
