"""Our CUDA kernels as solutions: a file main.cpp, whose `run` is bound by torch and fills the launcher's
arguments, beside a copy of the kernel's file and of what it includes."""

from __future__ import annotations

from lab.flashinfer_format.schema import BuildSpec, Definition, Solution, Source
from lab.flashinfer_format.written import AUTHOR, EPS, HARDWARE, solution_name
from lab.own_modules import CUDA, included

MAIN = """\
// WHAT by the CUDA kernel `OP`.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include "launchers/OP.h"
#include "settings_table.h"

#ifdef LAB_HOST  // emulated on a CPU
static Ptr stream() { return 0; }
#else
#include <c10/cuda/CUDAStream.h>
static Ptr stream() { return Ptr(c10::cuda::getCurrentCUDAStream().stream()); }
#endif

static Ptr address(const at::Tensor& t) { return Ptr(t.data_ptr()); }

static int dtype(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return int(DType::f32);
  return int(t.scalar_type() == at::kHalf ? DType::f16 : DType::bf16);
}

BODY
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("run", &run); }
"""
GEMM = """\
void run(at::Tensor A, at::Tensor B, at::Tensor C) {
  const int n = B.size(0), k = B.size(1);
  for (int64_t row = 0; row < A.size(0); row += 64) {  // the kernel takes at most 64 rows at a time
    const int rows = A.size(0) - row < 64 ? A.size(0) - row : 64;
    LinearArgs a{};
    a.x = address(A) + row * k * A.element_size();
    a.w.data = address(B);
    a.y = address(C) + row * n * C.element_size();
    a.rows = rows, a.n = n, a.k = k, a.dtype = dtype(A), a.out_dtype = dtype(C), a.stream = stream();
    linear(a);
  }
}
"""
NORM = f"""\
static void norm(at::Tensor x, at::Tensor w, Ptr residual, at::Tensor y) {{
  RmsnormArgs a{{}};
  a.x = address(x), a.w = address(w), a.residual = residual, a.y = address(y);
  a.rows = x.size(0), a.groups = 1, a.cols = x.size(1), a.x_stride = a.y_stride = x.size(1);
  a.eps = {EPS}f, a.dtype = dtype(x), a.stream = stream();
  rmsnorm(a);
}}

"""
PLAIN_NORM = (
    NORM
    + """\
void run(at::Tensor hidden_states, at::Tensor weight, at::Tensor output) {
  norm(hidden_states, weight, 0, output);
}
"""
)
ADDED_NORM = (
    NORM
    + """\
// The kernel stores the sum in the residual. Here that is an input that must not change, so it is copied
// first; a model does not do that.
void run(at::Tensor hidden_states, at::Tensor residual, at::Tensor weight, at::Tensor output) {
  at::Tensor sum = residual.clone();
  norm(hidden_states, weight, address(sum), output);
}
"""
)
BODIES = {  # by family: (what is computed, the function run)
    "gemm_n*_k*": ("C = A B^T", GEMM),
    "rmsnorm_h*": ("RMS norm", PLAIN_NORM),
    "fused_add_rmsnorm_h*": ("RMS norm of a sum", ADDED_NORM),
}


def solution_of(subject, definition: Definition) -> Solution | None:
    """Our CUDA kernel as a solution; None where there is no main.cpp for it yet."""
    op = subject.family.op
    if subject.family.name not in BODIES:
        return None
    what, body = BODIES[subject.family.name]
    main = MAIN.replace("WHAT", what).replace("OP", op).replace("BODY\n", body)
    sources = [Source("main.cpp", main)]
    for path in sorted(included([CUDA / f"{op}.cu", CUDA / "settings_table.h"])):
        name = path.relative_to(CUDA)
        if name.parts[0] != "host":  # the emulation of CUDA on a CPU
            sources.append(Source(name.as_posix(), path.read_text()))
    spec = BuildSpec(
        "cuda", HARDWARE, "main.cpp::run", ["torch"], destination_passing_style=True, binding="torch"
    )
    return Solution(
        solution_name("cuda", definition.name),
        definition.name,
        AUTHOR,
        spec,
        sources,
        description=f"The kernel cuda_src/{op}.cu of the decode kernel lab, with what it includes.",
    )
