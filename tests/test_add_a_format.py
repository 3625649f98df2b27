"""CONTRIBUTING.md's section "Add a weight format", followed literally in a copy of the lab: the format is
to be packed, unpacked exactly and multiplied in every language.

Of CUDA one kernel is compiled, embedding's, for those of the products take minutes.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from test_add_an_op import ROOT, follow

TITLE = "Add a weight format"

# Linked with the objects of the host build: the embedding with a table of the format, the choice among
# formats that products make, and eight codes as 16-bit numbers.
CUDA = r"""
#include "embedding.cu"
#include "core/packed_product.cuh"

extern "C" void look_up(const EmbeddingArgs* a) { embedding(*a); }

extern "C" bool is_chosen(int format) {
  PackedProduct<float> p{};
  p.w.format = format;
  try {
    by_packed<float, 1>(p, [](auto) {});
  } catch (const std::invalid_argument&) {
    return false;
  }
  return true;
}

template <typename T>
void to_pairs(int format, const uint32_t* words, uint32_t (&pairs)[4]) {
  by_format(format, [&](auto of) {
    using F = decltype(of);
    F::template numbers<T>(pairs, words, F::template zero_pair<T>(0.f));
  });
}
extern "C" void in_pairs(int format, bool is_half, const uint32_t* words, uint32_t* out) {
  uint32_t pairs[4];
  is_half ? to_pairs<half>(format, words, pairs) : to_pairs<bf16>(format, words, pairs);
  for (int i = 0; i < 4; ++i) out[i] = pairs[i];
}
"""

# Asked of the copy, in one process.
ASK = """
import ctypes, sys
import pytest, torch
from lab import cli
from lab.contract import Rand
from lab.dispatch import select
from lab.formats import FORMATS
from lab.ops import find

f = FORMATS["e5m2"]
codes = torch.arange(256, dtype=torch.uint8)
codes = codes[codes & 127 < 124]  # the others are infinite or NaN
every = torch.stack([codes.roll(i) for i in range(40)])
table = f.from_codes(every, torch.rand(40, 1, 1) + 0.5)
exact = table.double()
assert torch.equal(table.raw_codes(), every)
assert torch.equal(exact, every.view(torch.float8_e5m2).double() * table.scales_by_row()[:, 0].double())

w = torch.randn(37, 300)
error = (f.quantise(w).double() - w).abs()
assert (error <= w.abs() / 8 + 1e-6).all() and error.max() > 0  # half a step of two bits of mantissa
assert f.bytes_of(40, 256) == 40 * (256 + 4)
print("python ok")

ids = torch.arange(40, dtype=torch.int32)
for backend in ("torch", "triton"):
    ops = select(backend, "cpu")
    assert torch.equal(ops.embedding(ids, table, torch.float32), exact.float()), backend
    cases = [one for one in find("linear").cases if one.sizes.get("format") == "e5m2"]
    assert len(cases) == 2
    for one in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            op = find("linear")
            args = op.inputs(Rand("cpu", dtype), **one.sizes)
            rtol, atol = op.tolerance(op.bound(*args))
            y = ops.linear(*args)
            torch.testing.assert_close(y.double(), op.reference(*args)[0], rtol=rtol, atol=atol)
    print(backend, "ok")

built = ctypes.CDLL(sys.argv[1])
built.is_chosen.restype = ctypes.c_bool
assert [n for n in range(-1, 15) if built.is_chosen(n)] == [*range(1, 13)]
class Arguments(ctypes.Structure):
    _fields_ = [("ids", ctypes.c_size_t), ("data", ctypes.c_size_t), ("scales", ctypes.c_size_t),
                ("format", ctypes.c_int), ("out", ctypes.c_size_t), ("rows", ctypes.c_int),
                ("cols", ctypes.c_int), ("vocab", ctypes.c_int), ("dtype", ctypes.c_int),
                ("stream", ctypes.c_size_t)]
out = torch.full(table.shape, torch.nan)
built.look_up(ctypes.byref(Arguments(
    ids.data_ptr(), table.codes.data_ptr(), table.scales.data_ptr(), f.number, out.data_ptr(),
    40, table.k, 40, 0, 0)))
assert torch.equal(out, exact.float())
for is_half, dtype in ((True, torch.float16), (False, torch.bfloat16)):
    for first in range(0, 248, 8):
        eight = every[0, first : first + 8]
        words = eight[[0, 2, 1, 3, 4, 6, 5, 7]].contiguous()  # the order of a packed lane
        pairs = torch.full((8,), torch.nan, dtype=dtype)
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in (words, pairs))
        built.in_pairs(f.number, is_half, *addresses)
        assert torch.equal(pairs.float(), eight.view(torch.float8_e5m2).float()), (dtype, first)
print("cuda ok")

assert cli.main(["explain", "e5m2"]) == 0 and cli.main(["ops"]) == 0
tests = ["tests/test_matrix.py", "tests/test_twins.py", "-k", "e5m2"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
"""


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, words[:2]))} ...\n{done.stdout}"
    return done.stdout


@pytest.mark.skipif(
    not (ROOT / "build/host").is_dir(), reason="needs the objects of the host build: make build"
)
def test_contributing_adds_a_weight_format(tmp_path):
    for name in ("cuda_src", "triton_kernels", "lab", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert follow(tmp_path, TITLE) == [
        "lab/formats/e5m2.py",
        "lab/formats/__init__.py",
        "cuda_src/formats/e5m2.cuh",
        "cuda_src/formats/by_format.cuh",
        "cuda_src/launchers/arguments.h",
        "triton_kernels/formats/e5m2.py",
        "triton_kernels/formats/__init__.py",
    ]
    (tmp_path / "of_format.cu").write_text(CUDA)
    host = [ROOT / "build/host" / f"{path.name}.o" for path in sorted((ROOT / "cuda_src/host").glob("*.cpp"))]
    built = tmp_path / "of_format.so"
    flags = ["-std=c++17", "-O0", "-fPIC", "-pthread", "-shared", "-Wl,-Bsymbolic"]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    source = [f"-I{tmp_path / 'cuda_src'}", "-x", "c++", tmp_path / "of_format.cu", "-x", "none"]
    run(*compiler, *flags, *source, *host, "-o", built)

    clean = {
        "PYTHONPATH": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
        "TRITON_INTERPRET": "1",
    }
    shown = run(sys.executable, "-c", ASK, built, cwd=tmp_path, env={**os.environ, **clean})
    for words in ("python ok", "torch ok", "triton ok", "cuda ok"):
        assert words in shown, shown
    assert "1. Move the fields ─" in shown and "2. Multiply ─" in shown
    assert "e5m2                8 bits a weight  8-bit floats (e5m2), one scale a row" in shown
    assert " passed" in shown and " failed" not in shown, shown
