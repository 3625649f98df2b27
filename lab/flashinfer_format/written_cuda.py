"""Our CUDA kernels as solutions: a file main.cpp, whose `run` is bound by torch and fills the launcher's
arguments, beside a copy of the kernel's file and of what it includes.

Of decode_attention the definition asks for more than our op: the log-sum-exp, perhaps another layout of the
cache, and lists of pages. The first two are compiled into the kernel by LAB_LSE and LAB_NHD, so its copy is
included by a file that defines these; that file also has the kernel that makes a table of the lists.
"""

from __future__ import annotations

from lab.flashinfer_format.attention import NHD
from lab.flashinfer_format.schema import BuildSpec, Definition, Solution, Source
from lab.flashinfer_format.written import AUTHOR, EPS, HARDWARE, solution_name
from lab.own_modules import CUDA, included

MAIN = """\
// WHAT by the CUDA kernel `OP`.
#include <ATen/core/Tensor.h>
INCLUDES
#include <torch/csrc/utils/pybind.h>

HEADER
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
DECODE_INCLUDES = """\
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
"""
DECODE = """\
void run(at::Tensor q, at::Tensor k_cache, at::Tensor v_cache, at::Tensor kv_indptr, at::Tensor kv_indices,
         at::Tensor kv_last_page_len, double sm_scale, at::Tensor output, at::Tensor lse) {
  const int batch = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k_cache.size(HEADS_AT);
  if (batch == 0) return;
  // Sizes come from shapes alone, so that the call can be captured in a graph: a sequence has no more pages
  // than all have together.
  const int width = kv_indices.numel();
  const auto ints = kv_indptr.options();
  at::Tensor table = at::empty({batch, width}, ints), lengths = at::empty({batch}, ints);
  PagedListsArgs lists{};
  lists.kv_indptr = address(kv_indptr), lists.kv_indices = address(kv_indices);
  lists.kv_last_page_len = address(kv_last_page_len);
  lists.table = address(table), lists.lengths = address(lengths);
  lists.batch = batch, lists.width = width, lists.page_size = PAGE_SIZE, lists.stream = stream();
  paged_lists(lists);
  const int splits = splits_of(batch, kv_heads, int64_t(width) * PAGE_SIZE);
  at::Tensor tickets = at::zeros({batch, kv_heads}, ints);
  at::Tensor partial =
      at::empty({batch, kv_heads, splits, heads / kv_heads, head_dim + 2}, lse.options());
  DecodeAttentionArgs a{};
  a.q = {address(q), int64_t(heads) * head_dim};
  a.cache = {address(k_cache), address(v_cache), address(table), kv_heads, PAGE_SIZE, width};
  a.context_lens = address(lengths), a.out = address(output), a.lse = address(lse);
  a.splits = {address(partial), address(tickets), splits};
  a.batch = batch, a.q_heads = heads, a.head_dim = head_dim;
  a.scale = sm_scale, a.dtype = dtype(q), a.stream = stream();
  decode_attention(a);
}
"""
LISTS_H = """\
// What the files of this solution have in common.
#pragma once
#define LAB_LSE  // the kernel's second output
LAYOUT
#include "launchers/decode_attention.h"

// kv_indptr int32 [batch + 1], kv_indices int32 [width], kv_last_page_len int32 [batch]: sequence b has the
// pages kv_indices[kv_indptr[b]] to kv_indices[kv_indptr[b + 1] - 1]. They become row b of table int32
// [batch, width], whose other entries are not written, and lengths int32 [batch], in tokens.
struct PagedListsArgs {
  Ptr kv_indptr, kv_indices, kv_last_page_len, table, lengths;
  int batch, width, page_size;
  Ptr stream;
};
void paged_lists(const PagedListsArgs& a);

// Blocks that share a sequence's context: enough to fill the device, if the longest has so many tokens.
int splits_of(int batch, int kv_heads, int64_t most_tokens);
"""
LISTS_CU = """\
// decode_attention with the log-sum-exp of each head, and the table of pages that it reads, made of lists.
#include "paged_lists.h"

#include <algorithm>

#include "decode_attention.cuh"

__global__ void paged_lists_kernel(const int* kv_indptr, const int* kv_indices, const int* kv_last_page_len,
                                   int* table, int* lengths, int width, int page_size) {
  const int b = blockIdx.y, first = kv_indptr[b], pages = kv_indptr[b + 1] - first;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread == 0) lengths[b] = pages > 0 ? (pages - 1) * page_size + kv_last_page_len[b] : 0;
  for (int i = thread; i < pages; i += gridDim.x * blockDim.x) {
    table[size_t(b) * width + i] = kv_indices[first + i];
  }
}

void paged_lists(const PagedListsArgs& a) {
  const int blocks = 1 + a.width / a.batch / 1024;  // of a sequence; four pages for each thread, on average
  launch({dim3(blocks, a.batch), dim3(256), 0, a.stream}, "paged_lists_kernel", paged_lists_kernel,
         as<const int>(a.kv_indptr), as<const int>(a.kv_indices), as<const int>(a.kv_last_page_len),
         as<int>(a.table), as<int>(a.lengths), a.width, a.page_size);
}

int splits_of(int batch, int kv_heads, int64_t most_tokens) {
  const int64_t fill = ceil_div(2 * multiprocessors(), batch * kv_heads), most = (most_tokens + 63) / 64;
  return int(std::max<int64_t>(1, std::min(fill, most)));
}
"""
BODIES = {  # by family: (what is computed, the function run)
    "gemm_n*_k*": ("C = A B^T", GEMM),
    "rmsnorm_h*": ("RMS norm", PLAIN_NORM),
    "fused_add_rmsnorm_h*": ("RMS norm of a sum", ADDED_NORM),
    "gqa_paged_decode_h*_kv*_d*_ps*": ("Paged decode attention", DECODE),
}


def solution_of(subject, definition: Definition) -> Solution:
    """Our CUDA kernel as a solution."""
    op, paged = subject.family.op, subject.family.op == "decode_attention"
    what, body = BODIES[subject.family.name]
    main = MAIN.replace("WHAT", what).replace("OP", op).replace("BODY\n", body)
    main = main.replace("INCLUDES\n", DECODE_INCLUDES if paged else "")
    main = main.replace("HEADER", '#include "paged_lists.h"' if paged else f'#include "launchers/{op}.h"')
    sources = []
    if paged:
        nhd = list(subject.layout) == NHD
        layout = "#define LAB_NHD  // pages are [page_size, kv_heads, head_dim]\n" if nhd else ""
        main = main.replace("HEADS_AT", "2" if nhd else "1")
        main = main.replace("PAGE_SIZE", str(subject.sizes["page_size"]))
        sources = [
            Source("paged_lists.h", LISTS_H.replace("LAYOUT\n", layout)),
            Source("paged_lists.cu", LISTS_CU),
        ]
    sources.insert(0, Source("main.cpp", main))
    for path in sorted(included([CUDA / f"{op}.cu", CUDA / "settings_table.h"])):
        name = path.relative_to(CUDA)
        if name.parts[0] == "host" and name.name != "shapes.h":  # the emulation of CUDA on a CPU
            continue
        if paged and name.as_posix() == f"{op}.cu":
            name = name.with_suffix(".cuh")  # is included, not compiled by itself
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
