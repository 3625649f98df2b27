"""Every Triton kernel, as its launcher configures it, compiles for the GPUs that this machine need not have.

Narrow loads and spilled registers are mistakes in a kernel or a configuration, and show in the machine code.
Shared memory must fit what one block may have on the architecture."""

import re

import pytest
import torch

from lab.formats import FORMATS, PackedMatrix
from lab.formats import kv as kv_formats
from lab.model.weights import Layer, Weights
from lab.ops.decode_step import StepModel, StepWorkspace
from triton_kernels import offline
from triton_kernels.common import recording
from triton_kernels.decode_attention import decode_attention
from triton_kernels.decode_step import decode_step
from triton_kernels.embedding import embedding
from triton_kernels.kv_append import kv_append
from triton_kernels.linear import linear
from triton_kernels.rmsnorm import rmsnorm
from triton_kernels.rope import rope
from triton_kernels.sample import sample
from triton_kernels.silu_mul import silu_mul

pytestmark = pytest.mark.usefixtures("kept_listings")
TENSOR_CORE = r"\bHG?MMA\b"
MAX_SHARED = {"sm_90": 227 << 10, "sm_80": 163 << 10}
F32, F16, BF16, I32 = torch.float32, torch.float16, torch.bfloat16, torch.int32


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def run_linear(t, ints, rows, n=6144, k=4096):
    linear(t(rows, k), t(n, k), None, t(rows, n))


def run_rmsnorm(t, ints, rows, cols, heads=None):
    x = t(rows, cols) if heads is None else t(rows, 3 * heads, cols)[:, :heads]
    rmsnorm(x, t(cols), 1e-5, t(rows, cols) if heads is None else None, x)


def run_rope(t, ints, head_dim):
    q, k, _ = t(4, 48 * head_dim).unflatten(1, (48, head_dim)).split((32, 8, 8), dim=1)
    rope(q, k, ints(4), empty(4096, head_dim, dtype=F32))


def run_append(t, ints, head_dim):
    cache = t(64, 8, 16, head_dim)
    kv_append(t(4, 8, head_dim), t(4, 8, head_dim), cache, cache, ints(4, 16), ints(4))


def run_attention(t, ints, head_dim, splits):
    cache, partial = t(64, 8, 16, head_dim), empty(4, 8, splits, 4, head_dim + 2, dtype=F32)
    q = t(4, 32, head_dim)
    decode_attention(q, cache, cache, ints(4, 16), ints(4), 0.1, splits, partial, ints(4, 8), q)


def in_format(t, name, rows, k):
    """A matrix: plain, or packed in the format of this name."""
    if name is None:
        return t(rows, k)
    f = FORMATS[name]
    shapes = (f.codes_shape(rows, k), torch.uint8), (f.scales_shape(rows, k), f.scale_dtype)
    return PackedMatrix(name, rows, k, *(empty(*shape, dtype=dtype) for shape, dtype in shapes))


def run_step(
    t,
    ints,
    hidden,
    intermediate,
    q_heads,
    kv_heads,
    head_dim,
    vocab,
    qk_norm=False,
    formats=(None,),
    head_format=None,
    kv_dtype=None,
    more_format=None,
):
    """formats: of the matrices of each layer. kv_dtype: that of the cache. more_format: of v and down in
    the last layer."""
    q, kv, norm = q_heads * head_dim, kv_heads * head_dim, t(head_dim) if qk_norm else None
    qkv = [in_format(t, name, q + 2 * kv, hidden) for name in formats]
    down = [in_format(t, name, hidden, intermediate) for name in formats]
    if more_format is not None:
        qkv[-1] = in_format(t, formats[-1], q + kv, hidden), in_format(t, more_format, kv, hidden)
        down[-1] = in_format(t, more_format, hidden, intermediate)
    layers = [
        Layer(
            t(hidden),
            qkv[i],
            None,
            norm,
            norm,
            in_format(t, name, hidden, q),
            None,
            t(hidden),
            in_format(t, name, 2 * intermediate, hidden),
            down[i],
        )
        for i, name in enumerate(formats)
    ]
    head = in_format(t, head_format, vocab, hidden)
    weights = Weights(None, head, layers, t(hidden), head)
    cos_sin, cache = empty(4096, head_dim, dtype=F32), t(len(layers), 256, kv_heads, 16, head_dim)
    scales = ()
    if kv_dtype is not None:
        shape = len(layers), *kv_formats.scale_shape(kv_dtype, 256, kv_heads, 16)
        scales = (empty(*shape, dtype=kv_formats.SCALE_DTYPES[kv_dtype]),) * 2
        cache = empty(*cache.shape, dtype=kv_formats.DTYPES[kv_dtype])
    model = StepModel.of(weights, cos_sin, q_heads, kv_heads, head_dim, 1e-5)
    decode_step(
        ints(1),
        ints(1),
        model,
        cache,
        cache,
        ints(1, 256),
        empty(1, vocab, dtype=F32),
        StepWorkspace.of(model),
        *scales,
        out=ints(1),
    )


STEPS = {
    "smollm2-135m": dict(hidden=576, intermediate=1536, q_heads=9, kv_heads=3, head_dim=64, vocab=49152),
    "qwen3-0.6b": dict(
        hidden=1024, intermediate=3072, q_heads=16, kv_heads=8, head_dim=128, vocab=151936, qk_norm=True
    ),
    "llama-3.2-1b": dict(hidden=2048, intermediate=8192, q_heads=32, kv_heads=8, head_dim=64, vocab=128256),
    "llama-3.1-8b": dict(hidden=4096, intermediate=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256),
}
PACKED_STEPS = {
    "8b-int4-g128": dict(STEPS["llama-3.1-8b"], formats=("int4-g128",), head_format="int8"),
    "8b-q4_k": dict(STEPS["llama-3.1-8b"], formats=("q4_k",), head_format="q6_k"),
    "1b-fp8-g128": dict(STEPS["llama-3.2-1b"], formats=("fp8-g128",), head_format="fp8-g128"),
    "1b-fp8": dict(STEPS["llama-3.2-1b"], formats=("fp8",), head_format="fp8"),
    "8b-kv-fp8": dict(STEPS["llama-3.1-8b"], kv_dtype="fp8"),
    "1b-kv-int8": dict(STEPS["llama-3.2-1b"], kv_dtype="int8"),
}
LAUNCHES = {
    "linear-1": (run_linear, dict(rows=1)),
    "linear-4": (run_linear, dict(rows=4)),
    "linear-16": (run_linear, dict(rows=16)),
    "linear-16-small": (run_linear, dict(rows=16, n=2048)),
    "linear-64": (run_linear, dict(rows=64)),
    "rmsnorm": (run_rmsnorm, dict(rows=1, cols=4096)),
    "rmsnorm-heads": (run_rmsnorm, dict(rows=4, cols=128, heads=32)),
    "rope": (run_rope, dict(head_dim=128)),
    "kv_append": (run_append, dict(head_dim=128)),
    "embedding": (lambda t, ints: embedding(ints(4), t(128256, 4096), t(4, 4096)), {}),
    "silu_mul": (lambda t, ints: silu_mul(t(4, 28672), t(4, 14336)), {}),
    "attention-64": (run_attention, dict(head_dim=64, splits=1)),
    "attention-96": (run_attention, dict(head_dim=96, splits=1)),
    "attention-128": (run_attention, dict(head_dim=128, splits=1)),
    "attention-64-split": (run_attention, dict(head_dim=64, splits=64)),
    "attention-128-split": (run_attention, dict(head_dim=128, splits=264)),
    **{f"step-{name}": (run_step, sizes) for name, sizes in (STEPS | PACKED_STEPS).items()},
}
# What is compiled for sm_80, too: every kernel, and of several shapes the largest ones, which come closest to
# the limits of shared memory and registers.
SM_80 = {
    "linear-4",
    "linear-64",
    "rmsnorm",
    "rope",
    "kv_append",
    "embedding",
    "silu_mul",
    "attention-128",
    "attention-128-split",
    "step-llama-3.1-8b",
}
# And in float32: the kernels that multiply matrices, for these could use tensor cores; of the others one.
FLOAT32 = {name for name in LAUNCHES if name.startswith(("linear", "attention"))} | {"rmsnorm"}
SAMPLING = {  # temperature, top_k, top_p, seed, min_p, whether each row has its own
    "greedy": (0.0, 0, 1.0, 7, 0.0, False),
    "drawn": (0.8, 50, 0.9, 7, 0.05, False),
    "by row": (0.0, 0, 1.0, 0, 0.0, True),
}


def compiled(architecture, run):
    """Records what `run` launches, compiles it, and checks the resources; returns the machine code."""
    with recording(architecture) as launches:
        run()
    assert len(launches) == 1
    code = offline.compile(launches[0], architecture)
    usage = offline.usage(code)
    assert usage["local"] == usage["stack"] == 0, f"spills: {usage}"
    assert usage["shared"] <= MAX_SHARED[architecture], usage
    return offline.sass(code)


@pytest.mark.parametrize(
    "architecture, dtype, name",
    [
        (arch, dtype, name)
        for arch, dtype, names in (
            ("sm_90", BF16, LAUNCHES),
            ("sm_90", F32, sorted(FLOAT32)),
            ("sm_80", BF16, sorted(SM_80)),
        )
        for name in names
    ],
    ids=str,
)
def test_compiles_with_wide_loads_and_no_spills(architecture, dtype, name):
    run, sizes = LAUNCHES[name]
    tensors, ints = lambda *s: empty(*s, dtype=dtype), lambda *s: empty(*s, dtype=I32)
    code = compiled(architecture, lambda: run(tensors, ints, **sizes))
    copies = re.findall(r"\bLDGSTS\S*\.128", code)  # to shared memory, past the registers
    wide = copies + re.findall(r"\bLDG\S*\.128", code)
    assert wide, "no 16-byte load"
    if name.startswith("attention") or name in ("linear-16", "linear-64"):
        assert copies, "no cp.async: the loads do not run ahead of the arithmetic"
        assert dtype == F32 or re.search(TENSOR_CORE, code), "no tensor core instruction"
    if dtype == F32:
        assert not re.search(TENSOR_CORE, code), "float32 went through tensor cores, which round it to TF32"


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_sampling_compiles(architecture, name):
    code = compiled(
        architecture,
        lambda: sample(
            empty(4, 128256, dtype=F32),
            empty(4, dtype=I32),
            *SAMPLING[name][:-1],
            empty(4, 6, dtype=I32) if SAMPLING[name][-1] else None,
            empty(4, dtype=I32),
        ),
    )
    assert re.search(r"\bLDG\S*\.128", code)


def test_step_of_a_file_of_several_formats_compiles():
    """A copy of the code for each format of a matrix, and q, k and v apart. (With several copies of a product
    the kernel spills a few registers.)"""
    sizes = dict(STEPS["llama-3.1-8b"], formats=("q4_k", "q4_k"), head_format="q6_k", more_format="q6_k")
    with recording("sm_90") as launches:
        run_step(lambda *s: empty(*s, dtype=BF16), lambda *s: empty(*s, dtype=I32), **sizes)
    code = offline.compile(launches[0], "sm_90")
    assert offline.usage(code)["shared"] <= MAX_SHARED["sm_90"]
    assert re.search(TENSOR_CORE, offline.sass(code))


@pytest.mark.parametrize("name", ["linear-16", "attention-128"])
def test_float16_uses_tensor_cores(name):
    run, sizes = LAUNCHES[name]
    code = compiled(
        "sm_90", lambda: run(lambda *s: empty(*s, dtype=F16), lambda *s: empty(*s, dtype=I32), **sizes)
    )
    assert re.search(TENSOR_CORE, code)
