"""torch.ops.lab.*: registered from the contracts, for torch.compile, torch.export and CUDA graphs."""

import inspect

import pytest
import torch

from lab import torch_ops
from lab.contract import Case, Rand
from lab.dispatch import select
from lab.errors import LabError
from lab.ops import OPS, find

REGISTERED = [op.name for op in OPS if op.name not in torch_ops.LEFT_OUT]
lab = torch.ops.lab


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """torch runs the ops unless a test says otherwise; afterwards nothing is chosen."""
    monkeypatch.delenv("LAB_BACKEND", raising=False)
    torch_ops.use("torch")
    yield
    torch_ops.use(None)


def call_of(name: str, device: str, case: Case) -> dict:
    """The arguments of a case that the registered op takes, by name."""
    op, sizes = find(name), dict(case.sizes)
    dtype = sizes.pop("dtype", op.dtypes[0])
    given = vars(op.bound(*op.inputs(Rand(device, dtype), **sizes)))
    taken = {argument.name for argument in getattr(lab, name).default._schema.arguments}
    return {key: value for key, value in given.items() if key in taken}


def test_only_what_torch_cannot_express_is_left_out_and_says_why():
    assert torch_ops.LEFT_OUT == {
        "decode_step": "its argument model is a StepModel",
        "all_reduce_add": "its argument exchange is a Exchange",
        "all_reduce_add_rmsnorm": "its argument exchange is a Exchange",
        "all_argmax": "its argument exchange is a Exchange",
    }
    packed = {key for key, why in torch_ops.RESTRICTED.items() if why == "no PackedMatrix"}
    assert packed == {
        f"{op.name}.{'table' if op.name == 'embedding' else 'w'}" for op in OPS if op.takes_formats
    }
    workspaces = {f"{op.name}.workspace" for op in OPS if op.workspace}
    assert set(torch_ops.RESTRICTED) - packed == workspaces


@pytest.mark.parametrize("name", REGISTERED)
def test_an_op_passes_torchs_own_check(name, device):
    call = tuple(call_of(name, device, find(name).cases[0]).values())
    packet = getattr(lab, name)
    torch.library.opcheck(packet.default, call)
    assert ("out" in packet.overloads()) == (find(name).outputs(*call) is not None)
    if "out" in packet.overloads():
        torch.library.opcheck(packet.out, call, {"out": find(name).outputs(*call)})


def test_what_an_op_writes_is_what_its_contract_says():
    for name in REGISTERED:
        op = find(name)
        for overload in getattr(lab, name).overloads():
            arguments = getattr(getattr(lab, name), overload)._schema.arguments
            written = {a.name for a in arguments if a.alias_info is not None} - {"out"}
            assert written == set(op.mutates + op.state) & {a.name for a in arguments}, name


def test_optional_arguments_are_written_under_the_compiler_too(device):
    """rmsnorm's residual, and a plan's attention with its cache: eager and compiled give the same."""
    x, w, residual = (Rand(device, torch.float32, seed)(3, 64) for seed in range(3))

    def step(x, w, residual):
        y = lab.rmsnorm(x, w[0], 1e-5, residual)
        lab.rope(y.view(3, 1, 64), residual.view(3, 1, 64), positions, cos_sin)
        return y + residual, lab.silu_mul(y)

    positions, cos_sin = torch.arange(3, dtype=torch.int32, device=device), torch.rand(8, 64, device=device)
    want_residual, got_residual = residual.clone(), residual.clone()
    want = step(x, w, want_residual)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, got_residual)
    assert not torch.equal(got_residual, residual)
    torch.testing.assert_close((*got, got_residual), (*want, want_residual))


def test_an_exported_program_asks_for_the_backend_when_it_runs(device):
    class Norm(torch.nn.Module):
        def forward(self, x, w):
            return lab.rmsnorm(x, w, 1e-5)

    x, w = Rand(device, torch.float32)(5, 96), Rand(device, torch.float32, 1)(96)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Norm(), (x, w), dynamic_shapes={"x": {0: rows}, "w": None})
    assert "lab.rmsnorm" in program.graph_module.code
    want = select("torch", device).rmsnorm(x[:3], w, 1e-5)
    for backend in ("torch", "cuda"):
        torch_ops.use(backend)
        torch.testing.assert_close(program.module()(x[:3].contiguous(), w), want)
    torch_ops.use(None)
    with pytest.raises(LabError, match="no backend chosen"):
        program.module()(x, w)


def test_the_backend_that_was_chosen_runs(device, monkeypatch):
    """With an override too, and for LAB_BACKEND; each kernel is what select() gives, not torch's."""
    x = Rand(device, torch.float32)(2, 32)
    ran = []
    for language in ("cuda", "torch"):
        launch = find("silu_mul").launchers[language]
        monkeypatch.setitem(
            find("silu_mul").launchers,
            language,
            lambda *args, language=language, launch=launch, **options: (
                ran.append(language) or launch(*args, **options)
            ),
        )
    torch_ops.use("cuda")
    lab.silu_mul(x)
    torch_ops.use("cuda", {"silu_mul": "torch"})
    lab.silu_mul(x)
    monkeypatch.setenv("LAB_BACKEND", "cuda")
    torch_ops.use(None)
    lab.silu_mul.out(x, out=torch.empty(2, 16, device=device))
    assert ran == ["cuda", "torch", "cuda"]


def test_mistakes_are_refused(device):
    x, w = torch.rand(2, 32, device=device), torch.rand(32, device=device)
    with pytest.raises(LabError, match="must agree"):
        lab.rmsnorm(x, w[:16], 1e-5)
    with pytest.raises(LabError, match="unknown backend"):
        torch_ops.use("cudnn")
    with pytest.raises(LabError, match="unknown op"):
        torch_ops.use("torch", ["norm=cuda"])
    packed = torch.empty(0)
    with pytest.raises(RuntimeError, match="linear"):
        lab.linear(x, [packed])
    with pytest.raises(RuntimeError, match="autograd"):
        lab.rmsnorm(x.requires_grad_(), w, 1e-5).sum().backward()


def test_an_op_without_annotations_is_left_out_with_the_reason(monkeypatch):
    op = find("silu_mul")
    bare = type(op)(**{**vars_of(op), "name": "bare", "validate": lambda gate_up, out=None: None})
    monkeypatch.setattr(torch_ops, "LEFT_OUT", {})
    torch_ops.register(bare)
    assert torch_ops.LEFT_OUT == {"bare": "its argument gate_up has no annotation"}
    assert not hasattr(lab, "bare")


def vars_of(op) -> dict:
    return {name: getattr(op, name) for name in inspect.signature(type(op)).parameters}


@pytest.mark.gpu
def test_a_cuda_graph_replays_an_op(device):
    torch_ops.use("triton")
    x, w = Rand(device, torch.bfloat16)(4, 256), Rand(device, torch.bfloat16, 1)(256)
    lab.rmsnorm(x, w, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lab.rmsnorm(x, w, 1e-5)
    x.copy_(x.flip(0))
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, select("torch", device).rmsnorm(x, w, 1e-5), rtol=2e-2, atol=1e-2)
