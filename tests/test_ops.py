"""Every op on every backend against its reference: an op is tested by being listed in lab.ops.OPS.

On a machine with no GPU `cuda` is the host build and `triton` the interpreter, on the same cases.
"""

import pytest
import torch
from references import decode_step_is_remembered, with_remembered_reference  # noqa: F401

from lab.check import check_case
from lab.contract import BACKENDS, DTYPES
from lab.dispatch import select
from lab.ops import OPS

NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASES = [
    pytest.param(op, dtype, c, id=f"{op.name}-{NAMES[dtype]}-{i}")
    for op in OPS
    for dtype in op.dtypes
    for i, c in enumerate(op.cases)
]


# On a CPU the CUDA kernels also run in the shapes that they have on a GPU; tests/test_gpu_shapes.py has more.
GPU_SHAPES = pytest.param("cuda in a GPU's shapes", id="gpu_shapes")


@pytest.mark.usefixtures("decode_step_is_remembered")
@pytest.mark.parametrize("backend", [*BACKENDS, GPU_SHAPES])
@pytest.mark.parametrize("op, dtype, case", CASES)
def test_meets_its_contract(op, dtype, case, backend, rand, device, request):
    if backend.endswith("shapes"):
        request.getfixturevalue("gpu_shapes")
        backend = "cuda"
    slow = backend == "triton" or op.whole_step
    if slow and (device, dtype) == ("cpu", torch.float16) and case not in op.cases[:2]:
        pytest.skip("on a CPU, float16 differs from bfloat16 by the type of a number")
    function = getattr(select(backend, device, {op.name: backend}), op.name)
    # What a call leaves in a workspace does not depend on the dtype: interpreted, one dtype is called twice.
    calls = 1 if (backend, device) == ("triton", "cpu") and dtype != op.dtypes[-1] else 2
    outcome = check_case(with_remembered_reference(op), function, rand(dtype), case.sizes, calls)
    assert outcome.error is None, f"{case.why}: {outcome.error}"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["linear", "decode_attention", "sample"])
def test_runs_repeat_bit_for_bit(name, backend, rand, device):
    """Reductions have a fixed order: splits merge in order whichever block comes last."""
    op = next(op for op in OPS if op.name == name)
    function = getattr(select(backend, device, {name: backend}), name)
    dtype = op.dtypes[-1]
    args = op.inputs(rand(dtype), **op.cases[1].sizes)
    first = function(*args)
    assert all(torch.equal(function(*args), first) for _ in range(3))
