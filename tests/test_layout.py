"""Where files lie: ops beside each other in both languages, and what several of them are made of in core/."""

import re
from pathlib import Path

from lab.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
CUDA, TRITON = ROOT / "cuda_src", ROOT / "triton_kernels"
MEASUREMENT = {"bandwidth"}  # a kernel that is no op


def stems(folder, ending):
    return {path.stem for path in folder.glob(f"[!_]*{ending}")}


def test_a_kernel_file_is_an_op_and_cores_stand_apart():
    ops = {op.name for op in OPS} | MEASUREMENT
    assert stems(CUDA, ".cu") == ops | {
        f"decode_step_of_{part}"
        for part in ("a_rank", "fp8", "int8", "k_quants", "k_quants_fp8", "k_quants_int8")
    } and stems(CUDA, ".cuh") == {"common"}
    kernels = {
        path.stem
        for path in TRITON.glob("*.py")
        if re.search(rf"^@triton\.jit.*\ndef {path.stem}_\w*kernel\(", path.read_text(), re.M)
    }
    assert kernels == ops
    assert stems(CUDA / "core", ".cuh") and stems(TRITON / "core", ".py")
    assert not (stems(CUDA / "core", ".cuh") | stems(TRITON / "core", ".py")) & ops


def test_cores_of_one_name_say_the_same_of_themselves():
    """A name stands for one thing in both languages: where there are two files of it, both begin with the
    same topic."""
    topics = {
        "split_attention": ("paged cache", "softmax", "merge"),
        "exchange": ("ords", "ranks", "lab/ops/exchange.py"),
        "kv_codes": ("quantised KV cache", "codes"),
        "step_trace": ("records about itself", "lab ledger --inside", "clock"),
        "packed_rows": ("packed", "rows of w", "rows of x", "tensor cores"),
    }
    assert stems(CUDA / "core", ".cuh") & stems(TRITON / "core", ".py") == set(topics)
    for stem, topic in topics.items():
        for text in (
            (CUDA / "core" / f"{stem}.cuh").read_text(),
            (TRITON / "core" / f"{stem}.py").read_text(),
        ):
            opening = re.split(r"#pragma|import ", text)[0]
            assert all(words in opening for words in topic), stem
