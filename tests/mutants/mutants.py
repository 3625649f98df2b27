"""The mutants: a file, a text that stands in it once, what takes its place, and the tests that should notice."""
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    why: str
    op: str                     # `lab check --op` of it
    tests: str = ""             # what pytest runs besides; with "only", in its place
    dtype: str = ""             # of the check; all by default


def check(file, op, old, new, why, tests="", dtype=""):
    return Mutant(file, old, new, why, op, tests, dtype)


CU, PY = "cuda_src/", "triton_kernels/"
SAMPLING = "tests/test_sampling.py -k {backend}"
# Of the same file, what is enough for the interpreter, which takes minutes for all of it.
TOP_K, TOP_P = (f"tests/test_sampling.py -k '{{backend}} and {test}'" for test in ("top_k_keeps_k", "top_p_is_exact"))
IDLE = "tests/test_idle_rows.py -k {backend}"
MUTANTS = [
    check(CU + "rope.cu", "rope", "  if (position < 0) return;\n", "", "an idle row is rotated, by an address before the table"),
    check(CU + "rope.cu", "rope", "if (position < 0) return;", "if (position < -1) return;", "an idle row is rotated"),
    check(CU + "rope.cu", "rope", "k + b * k_stride", "k + b * q_stride", "q's stride used for k"),
    check(CU + "rope.cu", "rope", "a * cosine[e] - c * sine[e]", "a * cosine[e] + c * sine[e]", "a sign"),
    check(CU + "kv_append.cu", "kv_append", "v + b * v_stride", "v + b * k_stride", "k's stride used for v"),
    check(CU + "kv_append.cu", "kv_append", "  if (position < 0) return;\n", "", "an idle row is appended"),
    check(CU + "kv_append.cu", "kv_append", "(size_t(page) * kv_heads + h)", "(size_t(page) * kv_heads)", "a head's index"),
    check(CU + "embedding.cu", "embedding", "id < vocab", "id <= vocab", "id == vocab is taken",
          "tests/test_idle_rows.py -k embedding"),          # behind the table lies NaN in a check, and nothing in that test
    check(CU + "embedding.cu", "embedding", "0 <= id &&", "-1 <= id &&", "id -1 is taken"),
    check(CU + "silu_mul.cu", "silu_mul", "from_float<T>(g / (1.f + expf(-g)) * to_float(up.v[e]))",
          "from_float<T>(to_float(from_float<T>(g / (1.f + expf(-g)))) * to_float(up.v[e]))", "one rounding too many"),
    check(CU + "silu_mul.cu", "silu_mul", "row + cols + c", "row + cols - N + c", "an offset"),
    check(CU + "rmsnorm.cu", "rmsnorm", "/ cols + eps)", "/ cols)", "no eps", dtype="bf16"),
    check(CU + "rmsnorm.cu", "rmsnorm", "squares = fmadd(to_float(v[i].v[e]), to_float(v[i].v[e]), squares);",
          "squares = to_float(from_float<T>(fmadd(to_float(v[i].v[e]), to_float(v[i].v[e]), squares)));",
          "the sum of squares rounded to T at each step", dtype="bf16"),
    check(CU + "rmsnorm.cu", "rmsnorm", "const float scale = rsqrtf(", "const float scale = to_float(from_float<T>(1.f)) * rsqrtf(1e-6f + ",
          "eps a little too large", dtype="bf16"),
    check(CU + "rmsnorm.cu", "rmsnorm", "if (cols > kPanel) {", "if (cols > 2 * kPanel) {", "a second panel not read again"),
    check(CU + "sample.cu", "sample", "above + weights[i] >= wanted", "above + weights[i] > wanted", ">= for >", SAMPLING),
    check(CU + "sample.cu", "sample", "return uint64_t(top_k);", "return uint64_t(top_k) + 1;", "top-k keeps one more", SAMPLING),
    check(CU + "sample.cu", "sample", "double(top_p) * double(total)", "double(top_p) * 1.001 * double(total)",
          "top-p's mass off by 0.1 %", SAMPLING),
    check(CU + "sample.cu", "sample", "if (order_key(l) < lowest) return;", "if (order_key(l) <= lowest) return;",
          "the last kept token left out", SAMPLING),
    check(CU + "sample.cu", "sample", "temperature == 0.f || top == 0xffffffffu", "temperature == 0.f",
          "a row with NaN is drawn from", SAMPLING),
    check(CU + "sample.cu", "sample", "out[row] = top == 0xffffffffu ? -1 : candidate_index(best)",
          "out[row] = candidate_index(best)", "a row with NaN gives its index", SAMPLING),
    check(CU + "sample.cu", "sample", "key >> (shift + 8) == prefix", "key >> (shift + 8) >= prefix", "keys of other digits count",
          SAMPLING),
    check(CU + "sample.cu", "sample", "m < (1u << 23)", "m < (1u << 24)", "u above a half rounded to float32", SAMPLING),
    check(CU + "sample.cu", "sample", "philox(seed, token, position, row, 0)", "philox(seed, token, position, 0, 0)",
          "rows share their noise", SAMPLING),
    check(CU + "rope_append_attention.cu", "rope_append_attention",
          "attention.owns(position) ? attention.page_of(position) : 0", "attention.page_of(position)",
          "the table read at -1 for an idle row", IDLE, "bf16"),
    check(CU + "rope_append_attention.cu", "rope_append_attention", "v + b * v_stride", "v + b * k_stride",
          "k's stride used for v", dtype="bf16"),
    check(CU + "rope_append_attention.cu", "rope_append_attention", "rotation.live && head < group, q_norm, eps",
          "rotation.live && head < group, q_norm, 0.f", "no eps", dtype="bf16"),
    check(CU + "core/split_attention.cuh", "decode_attention", "    if (threadIdx.x == 0) atomicExch(ticket, 0u);\n", "",
          "a ticket not reset", IDLE, "bf16"),
    check(CU + "core/split_attention.cuh", "decode_attention", "float top = -FLT_MAX, total = 0.f;\n      Vec<float> sum{};\n      LAB_UNROLL\n      for (int p = 0; p < Parts; ++p) top",
          "float top = 0.f, total = 0.f;\n      Vec<float> sum{};\n      LAB_UNROLL\n      for (int p = 0; p < Parts; ++p) top",
          "the largest score never below 0", dtype="bf16"),
    check(CU + "decode_attention.cu", "decode_attention", "i < group * D ? load", "i < (group - 1) * D ? load",
          "the last head of a group has no query", dtype="bf16"),
    check(CU + "decode_step.cu", "decode_step", "  a.counters[kTag] = tag;\n", "", "the tag not kept for the next launch", IDLE),
    check(CU + "decode_step.cu", "decode_step", "  atomicExch(a.counters + kTicket, 0u);\n", "", "a ticket not reset", IDLE),
    check(CU + "decode_step.cu", "decode_step", "  if (position < 0) return;\n", "", "an idle row is decoded"),
    check(CU + "decode_step.cu", "decode_step", "sum_of_warps(squares) * mean + eps", "sum_of_warps(squares) * mean", "no eps"),
    check(PY + "rope.py", "rope", "(position >= 0)[:, None]", "(position >= -1)[:, None]", "an idle row is rotated"),
    check(PY + "kv_append.py", "kv_append", "v + b[:, None] * v_stride",
          "v + b[:, None] * k_stride", "k's stride used for v"),
    check(PY + "kv_append.py", "kv_append", "live = position >= 0", "live = position >= -1", "an idle row is appended"),
    check(PY + "embedding.py", "embedding", "token < vocab", "token <= vocab", "id == vocab is taken"),
    check(PY + "silu_mul.py", "silu_mul", "out = g / (1.0 + tl.exp(-g)) * u",
          "out = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32) * u", "one rounding too many"),
    check(PY + "rmsnorm.py", "rmsnorm", "/ cols + eps)", "/ cols)", "no eps", dtype="bf16"),
    check(PY + "rmsnorm.py", "rmsnorm", "tl.rsqrt(tl.sum(v32 * v32, axis=1) / cols + eps)",
          "tl.rsqrt((tl.sum(v32 * v32, axis=1) / cols + eps).to(v.dtype).to(tl.float32))", "the mean rounded to T", dtype="bf16"),
    check(PY + "sample.py", "sample", "_threshold(row, vocab, cut, top_k,", "_threshold(row, vocab, cut, top_k + 1,",
          "top-k keeps one more", TOP_K),
    check(PY + "sample.py", "sample", "top_p * tl.sum(mass, axis=0)", "top_p * 1.001 * tl.sum(mass, axis=0)",
          "top-p's mass off by 0.1 %", TOP_P),
    check(PY + "sample.py", "sample", "tl.where(v < 0.0625, series, -tl.log(u))", "-tl.log(u)", "u above a half rounded to float32",
          SAMPLING),
    check(PY + "sample.py", "sample", "tl.where(bad > 0, -1, winner)", "winner", "a row with NaN gives an index"),
    check(PY + "sample.py", "sample", "        index = tl.where(value > best, token, index)",
          "        index = tl.where(value >= best, token, index)", ">= for >: the last of equals wins"),
    check(PY + "core/split_attention.py", "decode_attention",
          "    tl.store(tickets + b * kv_heads + kv, 0)                    # ready for the next launch\n", "",
          "a ticket not reset", IDLE, "bf16"),
    check(PY + "core/split_attention.py", "decode_attention",
          "score = tl.where(live[None, :], score, float(\"-inf\"))", "score = score", "tokens past the context are attended to",
          dtype="bf16"),
    check(PY + "rope_append_attention.py", "rope_append_attention", "tl.load(v + b * v_stride", "tl.load(v + b * k_stride",
          "k's stride used for v", dtype="bf16"),
    check(PY + "rope_append_attention.py", "rope_append_attention", "/ (2 * HALF_DIM) + eps)", "/ (2 * HALF_DIM))", "no eps",
          dtype="bf16"),
    check(PY + "core/fused_product.py", "norm_linear", "+ eps)", ")", "no eps", dtype="bf16"),
    check(PY + "linear.py", "linear", "total += tl.load(bias + out", "total = total.to(y.dtype.element_ty).to(tl.float32) + tl.load(bias + out",
          "rounded before the bias", dtype="bf16"),
    check(PY + "norm_linear_argmax.py", "norm_linear_argmax", "(candidate < index)", "(candidate > index)",
          "the last of equals wins", "tests/test_triton_fused.py -k argmax_over", dtype="bf16"),
    check(PY + "norm_linear_argmax.py", "norm_linear_argmax", "    candidate = tl.where(nan, -1, candidate)\n", "",
          "a row with NaN gives an index", dtype="bf16"),
    check(PY + "norm_linear_argmax.py", "norm_linear_argmax",
          '        tl.store(scratch + 2 * MAX_PROGRAMS, 0)             # zero for the next launch\n', "",
          "a ticket not reset", dtype="bf16"),
    check(PY + "norm_linear_argmax.py", "norm_linear_argmax", "tl.where(out < n, total, float(\"-inf\"))", "total",
          "what lies past the last row takes part", dtype="bf16"),
]
