"""`lab new OP`: the files of a new op, which build and say what to fill in. `lab new kernel OP`: a copy of an
op's kernel in your own folder, for `lab try`.

No file that exists is written over. Three of the lab's files get a line each, as CONTRIBUTING.md describes.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from lab.errors import LabError
from lab.files import write_whole
from lab.names import known

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIX = {"cuda": ".cu", "triton": ".py"}
FOLDER = {"cuda": "cuda_src", "triton": "triton_kernels"}
OF_CXX = set(
    "alignas auto bool case catch char const default delete do double enum extern float goto inline int long "
    "namespace new operator private public short signed sizeof static struct switch template this throw "
    "typedef typename union unsigned using virtual void volatile".split()
)
# Names that the templates below use, or that are asked for at the object with all ops (lab.dispatch.Ops).
TAKEN = set(
    "case chosen check_contents cuda dense device launch lab main op refuse reference some_rows tl torch "
    "torch_ trace triton validate whole".split()
)

CONTRACT = '''"""NAME: FILL IN: the formula in one line

  x, out [rows, cols] of one dtype. FILL IN: shapes, and where a kernel rounds.
Kernels: cuda_src/NAME.cu, triton_kernels/NAME.py
"""

import torch

from lab.contract import DTYPE_CODES, FLOATS, Op, case, dense, refuse, some_rows
from lab.errors import LabError


def validate(x: torch.Tensor, out: torch.Tensor | None = None) -> None:
    """FILL IN: the arguments, and all conditions on them, for kernels are given raw addresses."""
    if x.dtype not in FLOATS or x.dim() != 2:
        refuse("NAME", "x must be [rows, cols] in float32, float16 or bfloat16")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        refuse("NAME", "out must look like x")
    dense("NAME", x.get_device(), *((x,) if out is None else (x, out)))


def reference(x):
    """FILL IN: (the right output,), computed in float64."""
    raise LabError("NAME is not filled in yet: begin with reference() in lab/ops/NAME.py")


def cuda(k, x, out):
    k.NAME(
        x=x.data_ptr(),
        out=out.data_ptr(),
        n=x.numel(),
        dtype=DTYPE_CODES[x.dtype],
        stream=k.stream(),
    )


def triton(x, out):
    from triton_kernels.NAME import NAME

    NAME(x, out)


def torch_(x, out):
    """FILL IN: the same in torch, for those who have neither kernel."""
    out.copy_(reference(x)[0])


op = Op(
    name="NAME",
    summary="FILL IN",
    dtypes=FLOATS,
    validate=validate,
    launchers={"cuda": cuda, "triton": triton, "torch": torch_},
    outputs=lambda x: torch.empty_like(x),
    reference=reference,
    inputs=lambda rand, rows, cols: (rand(rows, cols),),
    nbytes=lambda a: 2 * a.x.nbytes,  # FILL IN: what must be read and written once
    flops=lambda a: a.x.numel(),  # FILL IN
    # FILL IN: (relative, absolute); a step of the dtype is one rounding to it.
    tolerance=lambda a: (torch.finfo(a.x.dtype).eps, 1e-30),
    rows=some_rows,
    direction="copy",
    cases=(  # FILL IN: sizes that are awkward for your kernels
        case("one hidden state", rows=1, cols=576),
        case("no whole block", rows=3, cols=101),
    ),
)
'''
HEADER = """#pragma once
#include "arguments.h"

// FILL IN: the formula.
struct CAMELArgs {
  Ptr x, out;
  int64_t n;
  int dtype;
  Ptr stream;
};
void NAME(const CAMELArgs& a);
"""
CUDA = """// NAME: FILL IN: the formula
//
//   x, out [n]
//   mapping   one thread per element
//   traffic   n elements read, n written
//   contract  lab/ops/NAME.py          twin  triton_kernels/NAME.py
#include "common.cuh"
#include "launchers/NAME.h"
#include "sizes.h"

using namespace lab;

template <typename T>
__global__ void NAME_kernel(const T* x, T* out, int64_t n) {
  // 1. Locate: one element a thread.
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  pdl_wait();

  // 2. Compute and store: FILL IN. In float32, rounded once.
  out[i] = from_float<T>(to_float(x[i]));
}

void NAME(const CAMELArgs& a) {
  if (a.n == 0) return;
  by_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch({dim3(blocks_for(a.n, 128)), dim3(128), 0, a.stream}, "NAME_kernel", NAME_kernel<T>,
           as<const T>(a.x), as<T>(a.out), a.n);
  });
}
"""
TRITON = '''"""NAME: FILL IN: the formula

x, out [n]
mapping   a program owns BLOCK elements
traffic   n elements read, n written
contract  lab/ops/NAME.py          twin  cuda_src/NAME.cu
"""

import triton
import triton.language as tl

from triton_kernels.common import launch


@triton.jit
def NAME_kernel(x, out, n, BLOCK: tl.constexpr):
    # 1. Locate: a block of elements; elements past n are masked.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n

    # 2. Compute and store: FILL IN. In float32, rounded once.
    value = tl.load(x + i, mask=live).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=live)


def NAME(x, out):
    """Launch NAME."""
    launch(NAME_kernel, (triton.cdiv(x.numel(), 1024),), x, out, x.numel(), BLOCK=1024, num_warps=4)
'''
NEW_FILES = {
    "lab/ops/NAME.py": CONTRACT,
    "cuda_src/launchers/NAME.h": HEADER,
    "cuda_src/NAME.cu": CUDA,
    "triton_kernels/NAME.py": TRITON,
}
# file: (the line below which a line is added, that line)
NEW_LINES = {
    "cuda_src/launchers.h": ('#include "launchers/bandwidth.h"\n', '#include "launchers/NAME.h"\n'),
    "cuda_src/bindings.cpp": (
        "  OP(silu_mul, gate_up, y, rows, cols, dtype, stream);\n",
        "  OP(NAME, x, out, n, dtype, stream);\n",
    ),
    "lab/ops/__init__.py": (
        '    """Ops that no plan of the decoder uses: callers name them, as select(...).<name>."""\n',
        "    NAME: Call\n",
    ),
}


def main(args) -> int:
    first, *more = args.words
    if first == "kernel" and len(more) == 1:
        return new_kernel(more[0], args.language, args.out)
    if first == "kernel" or more:
        raise LabError("write `lab new OP` for a new op, or `lab new kernel OP` for a copy of an op's kernel")
    if args.language or args.out:
        raise LabError(
            "--language and --out are of `lab new kernel OP`: a new op has a kernel in each language"
        )
    return new_op(first, ROOT)


def new_op(name: str, root: Path) -> int:
    """Writes the files of an op into a checkout of the lab. Raises LabError before anything is written."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name) or keyword.iskeyword(name) or name in OF_CXX:
        raise LabError(f"{name!r} is no name for an op: write small letters, digits and _, as in scaled_add")
    if name in TAKEN:
        raise LabError(f"{name!r} already means something in the files of an op: choose another name")

    def filled(text: str) -> str:
        return text.replace("NAME", name).replace("CAMEL", name.title().replace("_", ""))

    files = {root / filled(path): filled(text) for path, text in NEW_FILES.items()}
    for path in files:
        must_be_new(path, path.relative_to(root), "choose another name")
    edits = {}
    for path, (above, line) in NEW_LINES.items():
        text = (root / path).read_text() if (root / path).is_file() else ""
        if text.count(above) != 1:
            raise LabError(
                f"{path} is not as CONTRIBUTING.md has it: add the line {filled(line).strip()} yourself"
            )
        edits[root / path] = text.replace(above, above + filled(line))
    for path, text in files.items():
        write_whole(path, text)
        print(f"new      {path.relative_to(root)}")
    for path, text in edits.items():
        write_whole(path, text)
        print(f"a line   {path.relative_to(root)}")
    print(
        f"\nReplace every FILL IN, the contract's first; then: make build, lab check --op {name}, "
        f"lab explain {name}"
    )
    return 0


def must_be_new(path: Path, shown_as: Path, advice: str) -> None:
    """Raises LabError if there is such a file, or a symbolic link that leads nowhere."""
    if path.exists() or path.is_symlink():
        raise LabError(f"{shown_as} exists already: no file is written over; {advice}")


def new_kernel(op: str, language: str | None, out: str | None) -> int:
    """Copies an op's kernel to a file of the user's."""
    from lab.ops import OPS

    known(op, [one.name for one in OPS], "op")
    if language is None:
        language = "cuda" if out and out.endswith(".cu") else "triton"
    path = Path(out or f"my_{op}{SUFFIX[language]}")
    if path.suffix != SUFFIX[language]:
        raise LabError(f"{path}: a kernel in {language} is a {SUFFIX[language]} file")
    source = ROOT / FOLDER[language] / f"{op}{SUFFIX[language]}"
    must_be_new(path, path, "choose another with --out")
    write_whole(path, source.read_text())
    print(f"new      {path}, a copy of {source.relative_to(ROOT)}\nChange it, then: lab try {path} --op {op}")
    return 0
