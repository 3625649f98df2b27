"""Barriers, fences and waits: the checks that fail when one is missing, on a machine with no GPU.

barriers      every op under schedules in which one thread runs as far ahead of the others as barriers let it
pdl_wait      what the kernel before writes is hidden until the wait, so a kernel that does not wait computes
              NaN
fences        the race detector: tests/race_detector.py (`make tsan`); here, what nvcc alone compiles, by its
              text
planted       tests/mutants/synchronisation.py lists removals; the quickest to build are tried here
"""

import inspect
import os
import re
import subprocess
import sys
import unittest.mock
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mutants import planted, synchronisation
from mutants.order import missing_fences, unordered_arrivals
from references import decode_step_is_remembered, with_remembered_reference  # noqa: F401

from lab.check import check_case
from lab.contract import Rand
from lab.dispatch import select
from lab.ops import OPS, find, linear

host = pytest.importorskip("lab._host")
ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = [dict(ahead="lowest"), dict(ahead="highest")]
CASES = [pytest.param(op, c, id=f"{op.name}-{i}") for op in OPS for i, c in enumerate(op.cases)]

# Arguments that a kernel may read before pdl_wait(): weights and tables, which no kernel writes, and what is
# older than the kernel before (see rope_append_attention.cu).
EARLY = {
    "embedding": {"table"},
    "rmsnorm": {"weight", "w"},
    "all_reduce_add_rmsnorm": {"w"},
    "linear": {"w", "bias"},
    "linear_add": {"w", "bias"},
    "norm_linear": {"norm_w", "w", "bias"},
    "norm_linear_silu_mul": {"norm_w", "w"},
    "norm_linear_argmax": {"norm_w", "w"},
    "rope_append_attention": {
        "q_norm",
        "k_norm",
        "positions",
        "cos_sin",
        "k_cache",
        "v_cache",
        "k_scales",
        "v_scales",
        "block_table",
        "workspace",
    },
}
TILED = linear.tiled
# Kernels with one launch after another, so that nothing overlaps.
NOT_PDL = {"rope", "kv_append", "silu_mul", "decode_step"}


@contextmanager
def schedule(**options):
    host.set_schedule(**options)
    try:
        yield
    finally:
        host.set_schedule()


def emulated(op, extension=None):
    """op's CUDA kernel on the CPU: of this build, or of another extension."""
    if extension is None:
        return getattr(select("cuda", "cpu", {op.name: "cuda"}), op.name)
    return planted.bind(op, extension)


# ---- barriers ----------------------------------------------------------------------------------------------

# What the ops' own cases leave out: a thread whose top-k threshold is lost keeps tokens that top-k has cut
# off.
BOTH_THRESHOLDS = dict(batch=32, vocab=1030, temperature=4.0, top_k=3, top_p=0.9, seed=5)


@pytest.mark.usefixtures("decode_step_is_remembered")
@pytest.mark.parametrize("options", SCHEDULES, ids=["lowest", "highest"])
@pytest.mark.parametrize("op, case", CASES)
def test_a_thread_far_ahead_of_the_others_changes_nothing(op, case, options):
    with schedule(**options):
        outcome = check_case(
            with_remembered_reference(op), emulated(op), Rand("cpu", op.dtypes[-1]), case.sizes
        )
    assert outcome.error is None, f"{case.why}: {outcome.error}"


@pytest.mark.parametrize(
    "options", [{}, *SCHEDULES, dict(seed=1)], ids=["fixed", "lowest", "highest", "random"]
)
def test_both_thresholds_of_sample_reach_every_thread(options):
    with schedule(**options):
        outcome = check_case(
            find("sample"), emulated(find("sample")), Rand("cpu", torch.float32), BOTH_THRESHOLDS
        )
    assert outcome.error is None, outcome.error


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="lowest or highest"):
        host.set_schedule(ahead="first")
    done = subprocess.run(
        [sys.executable, "-c", "from lab import _host; _host.set_schedule()"],
        cwd=ROOT,
        text=True,
        env={**os.environ, "LAB_HOST_AHEAD": "first"},
        capture_output=True,
    )
    assert done.returncode and "LAB_HOST_AHEAD=first: lowest or highest is needed" in done.stderr


# ---- programmatic dependent launch -------------------------------------------------------------------------


def tensors(value):
    """The tensors in an argument: itself, or those of a workspace."""
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [t for t in vars(value).values() if isinstance(t, torch.Tensor)] if hasattr(value, "__dict__") else []
    )


def region(t):
    """(address, bytes) from the first element of a tensor to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else -1
    return t.data_ptr(), (last + 1) * t.element_size()


def waits_for_its_inputs(op, function, extension, dtype, sizes):
    """Checks a case while everything that the kernel before may have written is hidden until pdl_wait()."""
    names = list(inspect.signature(op.reference).parameters)
    early = EARLY.get(op.name, set())

    def hidden(*args, out=None):
        late = [t for name, value in zip(names, args) if name not in early for t in tensors(value)]
        late += [] if out is None else [out]

        def tiled(x, w):
            """linear's workspace, which a kernel of its own writes for the product."""
            workspace = TILED(x, w)
            late.extend([] if workspace is None else [workspace])
            extension.hide_until_pdl_wait([region(t) for t in late])
            return workspace

        extension.hide_until_pdl_wait([region(t) for t in late])
        try:
            with unittest.mock.patch.object(linear, "tiled", tiled):
                return function(*args) if out is None else function(*args, out=out)
        finally:
            extension.hide_until_pdl_wait([])

    return check_case(op, hidden, Rand("cpu", dtype), sizes)


@pytest.mark.parametrize("shapes", ["cpu", "gpu"])
@pytest.mark.parametrize("op, case", [p for p in CASES if p.values[0].name not in NOT_PDL])
def test_what_the_kernel_before_writes_is_touched_after_the_wait(op, case, shapes, request):
    if shapes == "gpu":
        request.getfixturevalue("gpu_shapes")
    with schedule(ahead="lowest"):  # one thread often issues the copies for all: before any other has waited
        outcome = waits_for_its_inputs(op, emulated(op), host, op.dtypes[-1], case.sizes)
    assert outcome.error is None, f"{case.why}: {outcome.error}"


def test_the_table_of_early_arguments_names_arguments():
    for name, early in EARLY.items():
        assert early & set(inspect.signature(find(name).reference).parameters), name


def test_every_other_op_is_launched_after_the_kernel_before():
    """An op in NOT_PDL that begins to overlap has to leave that list."""
    for name in NOT_PDL:
        host.record_launches(132, 9)
        try:
            op = find(name)
            emulated(op)(*op.inputs(Rand("cpu", op.dtypes[-1]), **op.cases[0].sizes))
        finally:
            launches = host.take_launches()
            host.record_launches(0)
        assert launches and not any(launch["pdl"] for launch in launches), name


# ---- what nvcc alone compiles ------------------------------------------------------------------------------

COMMON = (ROOT / "cuda_src" / "common.cuh").read_text()


@pytest.mark.parametrize(
    "name, instruction",
    [
        ("take_ticket", "atom.acq_rel.gpu.global.add.u32"),
        ("pdl_wait", "griddepcontrol.wait;"),
        ("pdl_launch_dependents", "griddepcontrol.launch_dependents;"),
        ("cp_async_wait", "cp.async.wait_group %0;"),
        ("cp_async_commit", "cp.async.commit_group;"),
        ("named_barrier", "bar.sync"),
        ("mbarrier_fence_init", "fence.mbarrier_init.release.cluster;"),
        ("mbarrier_fence_init", "fence.proxy.async.shared::cta;"),
        ("mbarrier_wait", "mbarrier.try_wait.parity"),
        ("mbarrier_arrive", "mbarrier.arrive.shared::cta"),
        ("store_word", "st.relaxed.gpu.global.u64"),
        ("load_words", "ld.relaxed.gpu.global.v2.u64"),
        ("cluster_sync", "barrier.cluster.arrive;\\nbarrier.cluster.wait;"),
    ],
)
def test_the_gpu_half_of_a_primitive_has_its_instruction(name, instruction):
    """The host build has its own half of these, so no emulated run notices what is missing here."""
    bodies = re.findall(rf"^LAB_DEVICE [\w ]+\b{name}\(.*?^}}", COMMON, re.M | re.S)
    body = next(body for body in bodies if "asm" in body)
    assert instruction in body
    assert '"memory"' in body, "the compiler may move accesses past it"


FENCES = ("wgmma_begin", "wgmma_publish", "mbarrier_fence_init")


@pytest.mark.parametrize("path", planted.sources(), ids=lambda path: path.stem)
def test_fences_of_other_paths_to_memory_are_where_they_belong(path):
    assert missing_fences(path.read_text()) == []


@pytest.mark.parametrize("fence", FENCES)
def test_a_missing_fence_of_another_path_to_memory_is_named(fence):
    left_out = [m for m in synchronisation.CUDA if m.why.partition("without ")[2].partition(",")[0] == fence]
    assert left_out
    for mutant in left_out:
        assert missing_fences(planted.mutate((ROOT / mutant.file).read_text(), mutant)) != []


# ---- Triton ------------------------------------------------------------------------------------------------

TRITON = sorted((ROOT / "triton_kernels").glob("*.py"))


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.stem)
def test_triton_programs_arrive_when_all_their_threads_have_stored(path):
    assert unordered_arrivals(path.read_text()) == []


@pytest.mark.parametrize(
    "mutant", synchronisation.TRITON, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.why}"
)
def test_a_missing_barrier_in_triton_is_named(mutant):
    assert unordered_arrivals(planted.mutate((ROOT / mutant.file).read_text(), mutant)) != []


# ---- planted -----------------------------------------------------------------------------------------------


def test_every_planted_removal_is_in_the_sources():
    for mutant in [*synchronisation.CUDA, *synchronisation.TRITON]:
        planted.mutate((ROOT / mutant.file).read_text(), mutant)


def test_what_is_explained_or_tested_elsewhere_is_on_the_list():
    names = {(mutant.file, mutant.why) for mutant in synchronisation.MUTANTS}
    assert {*synchronisation.REASONS, *synchronisation.TESTS} <= names
    assert not set(synchronisation.REASONS) & set(synchronisation.TESTS)


def test_descriptions_of_removals_are_unique():
    names = [(mutant.file, mutant.why) for mutant in synchronisation.MUTANTS]
    assert len(set(names)) == len(names)


def test_a_barrier_between_two_thresholds_is_missed(tmp_path):
    mutant = synchronisation.of("cuda_src/sample.cu", "select_threshold: without __syncthreads, 4 of 4")
    extension, op = planted.load(planted.build(mutant, "sample", tmp_path)), find("sample")
    errors = []
    for options in SCHEDULES:
        extension.set_schedule(**options)
        errors.append(
            check_case(op, emulated(op, extension), Rand("cpu", torch.float32), BOTH_THRESHOLDS).error
        )
    assert any(errors)


def test_a_kernel_that_never_waits_is_named(tmp_path):
    mutant = synchronisation.of("cuda_src/embedding.cu", "id_of_block: without pdl_wait")
    extension, op = planted.load(planted.build(mutant, "embedding", tmp_path)), find("embedding")
    outcome = check_case(op, emulated(op, extension), Rand("cpu", torch.float32), op.cases[0].sizes)
    assert re.search("embedding_kernel: .*no thread called pdl_wait", outcome.error)


def test_a_kernel_that_waits_too_late_is_wrong(tmp_path):
    late = planted.Mutant(
        "cuda_src/embedding.cu",
        "  pdl_wait();\n  pdl_launch_dependents();\n  const int id = ids[blockIdx.x];\n",
        "  const int id = ids[blockIdx.x];\n  pdl_wait();\n",
        "the id is read before the wait",
    )
    extension, op = planted.load(planted.build(late, "embedding", tmp_path)), find("embedding")
    case = op.cases[0].sizes
    assert check_case(op, emulated(op, extension), Rand("cpu", torch.float32), case).error is None
    assert waits_for_its_inputs(op, emulated(op, extension), extension, torch.float32, case).error is not None
