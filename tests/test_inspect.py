"""lab inspect: facts of kernels that are known, the occupancy formula, the listings, the fairness cards. No
GPU."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lab import extension
from lab.errors import LabError
from lab.inspect import binary, call, command, cuda_code, listing, triton_code
from lab.inspect import gpu as gpus
from lab.inspect import kernel as kernels
from lab.inspect.fairness import built_in, code_lines, fairness
from lab.ops import OPS, find
from lab.records import schema
from triton_kernels.core.packed_rows import PACKED

pytestmark = pytest.mark.usefixtures("kept_listings")


def cuda_missing():
    """Why the CUDA kernels cannot be looked at here, or None."""
    try:
        extension.load("_cuda")
    except LabError as error:
        return str(error)


needs_cuda = pytest.mark.skipif(cuda_missing() is not None, reason=str(cuda_missing()))
BOTH = [pytest.param("cuda", marks=needs_cuda), "triton"]


def look(name, backend, dtype="bf16", arch="sm_90a", **sizes):
    built = extension.load("_cuda").build_info()["archs"] if backend == "cuda" else []
    if built and arch.removeprefix("sm_") not in built:
        pytest.skip(f"lab._cuda is built for {', '.join(built)}, not for {arch}")
    found, errors = command.look(
        find(name), dtype, sizes or find(name).default_sizes(), gpus.find(arch), [backend]
    )
    assert not errors
    return found[backend]


# ---- occupancy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, registers, shared, threads, blocks, limit",
    [
        ("sm_90a", 32, 0, 256, 8, "warps"),  # 64 warps / 8
        ("sm_90a", 32, 0, 32, 32, "blocks"),
        ("sm_90a", 255, 0, 128, 2, "registers"),  # 255 * 32 -> 8192 a warp; 2 warps in each of 4 partitions
        ("sm_90a", 168, 0, 128, 3, "registers"),  # 168 * 32 = 5376 a warp; 3 in each partition
        ("sm_90a", 96, 0, 96, 6, "registers"),  # 3072 a warp; 5 in each partition = 20 warps; 20 / 3
        ("sm_90a", 64, 72192, 64, 3, "shared memory"),  # (228 KiB) / (72192 + 1024) = 3.2
        ("sm_80", 64, 72192, 64, 2, "shared memory"),  # (164 KiB) / (72192 + 1024) = 2.3
        ("sm_90a", 64, 227 << 10, 256, 1, "shared memory"),  # the most that a block may have
        ("sm_90a", 64, 228 << 10, 256, 0, "shared memory"),
    ],
)
def test_occupancy_by_hand(arch, registers, shared, threads, blocks, limit):
    found = gpus.occupancy(gpus.find(arch), registers, shared, threads)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * (threads // 32) / 64


# ---- instructions ------------------------------------------------------------------------------------------


def test_mix_tells_instructions_apart():
    code = """
        /*0000*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.64 R4, [R2.64] ;
        /*0020*/                   LDG.E R4, desc[UR10][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0040*/              @P2  STG.E.U16 desc[UR4][R2.64], R0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0060*/                   HFMA2.MMA.BF16_V2 R4, R8, R2, R4 ;
        /*0070*/                   UBLKCP [UR8], [UR4], UR6 ;
        /*0080*/                   SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2], RZ ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   LDL R3, [R1] ;
        /*00b0*/              @!PT EXIT ;
        /*00c0*/                   NOP;
    """
    found = {name: n for name, n in kernels.mix(code).items() if n}
    assert found == {
        "global load, 128 bit": 1,
        "global load, 64 bit": 1,
        "global load, 32 bit or less": 1,
        "cp.async": 1,
        "global store, 32 bit or less": 1,
        "tensor core": 1,
        "fused multiply-add": 1,
        "bulk copy": 1,
        "mbarrier": 1,
        "block barrier": 1,
        "local memory (spills)": 1,
        "control flow and fence": 1,
        "all": 12,
    }


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("backend", BOTH)
def test_known_kernels(backend, arch):
    """What must be in the machine code of these, whoever compiled them."""
    (embedding,) = look("embedding", backend, arch=arch)
    (attention,) = look("decode_attention", backend, arch=arch)
    (linear,) = look("linear", backend, arch=arch, batch=16, n=6144, k=4096)
    (exact,) = look("linear", backend, "fp32", arch, batch=16, n=6144, k=4096)
    (drawn,) = look("sample", backend, "fp32", arch, batch=1, vocab=32000, temperature=0.8, top_k=50)
    assert embedding.mix["global load, 128 bit"] and embedding.mix["global store, 128 bit"]
    assert attention.mix["cp.async"] and attention.mix["special function"] and attention.mix["atomic"]
    assert (
        attention.shared_dynamic > 16 << 10
        and attention.grid[0] * attention.grid[1] * attention.grid[2] == 8 * 33
    )
    if (backend, arch) == ("cuda", "sm_90a"):
        (short,) = look(
            "decode_attention",
            backend,
            arch=arch,
            **{**find("decode_attention").default_sizes(), "lengths": (1024,), "splits": 16},
        )
        assert attention.cluster == 1 and short.cluster == 8  # only few blocks merge in clusters
    assert linear.mix["tensor core"] and linear.mix["cp.async"] and not exact.mix["tensor core"]
    assert exact.mix["fused multiply-add"] and drawn.mix["special function"]
    for kernel in (embedding, attention, linear, exact, drawn):
        assert kernel.spills == 0 == kernel.mix["local memory (spills)"]
        assert 0 < kernel.registers <= 255 and 0 < kernel.occupancy <= 1 and kernel.blocks >= 1
        assert kernel.mix["other"] < 0.02 * kernel.mix["all"]
        assert (kernel.backend, kernel.arch) == (backend, arch) and kernel.threads % 32 == 0


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_every_op_can_be_looked_at(op, backend):
    try:
        found = look(op, backend, "bf16" if torch.bfloat16 in find(op).dtypes else "fp32")
    except ModuleNotFoundError:
        pytest.skip(f"{op} has no {backend} kernel yet")
    assert found and all(k.mix["all"] > 10 and k.spills == 0 for k in found)


@needs_cuda
def test_the_sizes_choose_the_instantiation():
    (wide,) = look("rmsnorm", "cuda", rows=1, cols=4096)
    (narrow,) = look("rmsnorm", "cuda", rows=1, cols=4097)
    assert wide.mix["global load, 128 bit"] and not narrow.mix["global load, 128 bit"]
    assert wide.instance != narrow.instance


@needs_cuda
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("cols", [256, 2048], ids=["a warp", "a block"])
def test_rmsnorm_has_all_loads_in_flight_before_it_uses_one(dtype, cols):
    """Four vectors each of the weight, of x and of the residual. A compiler that takes vectors apart right at
    their loads waits for the weight before it waits for the kernel before, or for x before it asks for the
    residual: 0.3 us of 1.9 on an H200."""
    (kernel,) = look("rmsnorm", "cuda", dtype, rows=1, cols=cols, residual=True)
    loads, loaded = 0, set()
    for line in kernel.texts["sass"].splitlines():
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(\S+)\s*(.*?) *;", line)
        if not found:
            continue
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", found[2])]
        if found[1] == "LDG.E.128":
            loads += 1
            loaded |= set(range(registers[0], registers[0] + 4))
        elif loaded & set(registers):
            break
    assert loads == 12


@needs_cuda
def test_recording_runs_nothing_and_ends():
    module, op = extension.load("_cuda"), find("silu_mul")
    first = cuda_code.launches(op, call.arguments(op, "bf16", {"rows": 2, "cols": 64}), gpus.find("sm_90a"))
    assert [launch["kernel"] for launch in first] == ["silu_mul_kernel"] and module.take_launches() == []


@needs_cuda
def test_a_launch_is_planned_for_the_card_that_is_asked_for():
    op = find("norm_linear")  # many outputs: so many blocks for each multiprocessor
    args = call.arguments(op, "bf16", dict(batch=1, n=128256, k=4096))
    h100, a100 = (
        cuda_code.launches(op, args, gpus.find(arch))[-1]["grid"][0] for arch in ("sm_90a", "sm_80")
    )
    assert h100 * 108 == a100 * 132


def test_the_host_build_records_too():
    host = pytest.importorskip("lab._host")
    if not hasattr(host, "record_launches"):
        pytest.skip("lab._host is older than its sources")
    table, ids, out = torch.ones(4, 64), torch.zeros(3, dtype=torch.int32), torch.full((3, 64), 7.0)
    call_it = lambda: host.embedding(  # noqa: E731
        ids=ids.data_ptr(),
        table=(table.data_ptr(), 0, 0),
        out=out.data_ptr(),
        rows=3,
        cols=64,
        vocab=4,
        dtype=0,
        stream=0,
    )
    host.record_launches(132)
    try:
        call_it()
        (launch,) = host.take_launches()
    finally:
        host.record_launches(0)
    assert launch["kernel"] == "embedding_kernel" and launch["grid"][0] > 0 and bool((out == 7).all())
    call_it()
    assert bool((out == 1).all()) and host.take_launches() == []


# ---- listings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sass", "ptx", "ttgir"])
@pytest.mark.parametrize("backend", BOTH)
def test_code_stands_beside_the_source(backend, kind):
    (kernel,) = look("silu_mul", backend)
    if (backend, kind) == ("cuda", "ttgir"):
        with pytest.raises(LabError, match="only Triton has TTGIR"):
            list(listing.lines(kernel, kind))
        return
    if (backend, kind) == ("cuda", "ptx") and isinstance(
        kernel.texts["ptx"], LabError
    ):  # a build for cards alone
        with pytest.raises(LabError, match=r'LAB_CUDA_ARCH="...;90\+ptx"'):
            list(listing.lines(kernel, kind))
        return
    text = list(listing.lines(kernel, kind))
    name = "silu_mul.cu" if backend == "cuda" else "silu_mul.py"
    beside = [line.split(" | ")[-1] for line in text if f" | {name}:" in line]
    source = (
        (listing.ROOT / ("cuda_src" if backend == "cuda" else "triton_kernels") / name)
        .read_text()
        .splitlines()
    )
    for line in beside:
        place, _, said = line.partition("  ")
        number = int(place.split()[0].rpartition(":")[2])
        assert source[number - 1].strip() == said
    assert len({line.partition("  ")[0] for line in beside}) > 3
    code = "\n".join(line.partition(" | ")[0] for line in text)
    assert {"sass": "EXIT", "ptx": "ret;", "ttgir": "tt.return"}[kind] in code and ".section" not in code


# ---- the fairness card -------------------------------------------------------------------------------------


def test_lines_of_code(tmp_path):
    (tmp_path / "part.h").write_text("int x;\n")
    (tmp_path / "common.cuh").write_text("int y;\n" * 9)
    (tmp_path / "a.cu").write_text(
        '// text\n#include "common.cuh"\n#include "part.h"\n\n'
        'int f() {  // why\n  /* long\n\n */\n  return puts("// no comment");\n}\n'
    )
    assert code_lines(tmp_path / "a.cu") == (5, 1)
    (tmp_path / "a.py").write_text(
        '"""Doc\n\nstring."""\nimport os\n\n# why\ndef f():\n    """More."""\n'
        "    return (1,\n            2)\n"
    )
    assert code_lines(tmp_path / "a.py") == (4, 0)


def test_settings_for_packed_weights_are_counted(monkeypatch):
    counted = triton_code.configurations(find("linear"), gpus.find("sm_90a"))
    monkeypatch.delattr("triton_kernels.linear.PACKED")
    of_packed = {str(m) for entries in PACKED["sm_90"].values() for *_, m in entries}
    assert len(of_packed) > 4
    assert counted - triton_code.configurations(find("linear"), gpus.find("sm_90a")) == len(of_packed)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_settings_of_every_op_are_counted(op, arch):
    assert triton_code.configurations(op, gpus.find(arch)) >= 1


@pytest.mark.parametrize("backend", BOTH)
def test_fairness_records_survive_a_round_trip(tmp_path, backend):
    rows, errors = fairness(find("linear"), "bf16", {"batch": 16, "n": 6144, "k": 4096}, "sm_90a")
    card = next(row for row in rows if row.backend == backend)
    assert card.configurations > 1 and card.spill_bytes == 0 and 50 < card.code_lines < 1000
    assert backend == "cuda" or card.compile_s > 0.01
    assert (
        sum(card.mix.values()) == card.instructions and card.mix["tensor core"] > 0 and all(card.mix.values())
    )
    with schema.Writer(tmp_path) as writer:
        writer.append(*rows)
    assert schema.read(tmp_path).rows == [schema.from_dict(json.loads(schema.to_line(row))) for row in rows]
    assert len({schema.key(row) for row in rows}) == len(rows)


# ---- the command -------------------------------------------------------------------------------------------


def lab(*words):
    return subprocess.run(
        [sys.executable, "-m", "lab", "inspect", *words], capture_output=True, text=True, cwd=listing.ROOT
    )


def test_json_schema():
    done = lab("rmsnorm", "--json", "--sizes", "rows=2", "cols=576", "--dtype", "fp16")
    body = json.loads(done.stdout)
    assert (body["op"], body["dtype"], body["arch"]) == ("rmsnorm", "fp16", "sm_90a")
    assert body["sizes"] == {"rows": 2, "cols": 576, "residual": True}
    assert {k["backend"] for k in body["kernels"]} | set(body["errors"]) == {"cuda", "triton"}
    for kernel in body["kernels"]:
        assert set(kernel) == {
            "backend",
            "name",
            "instance",
            "arch",
            "grid",
            "threads",
            "registers",
            "spills",
            "blocks",
            "shared_static",
            "shared_dynamic",
            "occupancy",
            "limit",
            "mix",
            "cluster",
            "dependent_launch",
        }
        assert set(kernel["mix"]) == {*kernels.MIX, "other", "all"}
        assert sum(n for name, n in kernel["mix"].items() if name != "all") == kernel["mix"]["all"]


def main(*words):
    from lab import cli

    return cli.run(["inspect", *words])


@pytest.mark.parametrize(
    "name, words, sizes",
    [
        ("linear", ["batch=16"], dict(batch=16, n=28672, k=4096)),
        ("linear", [], dict(batch=1, n=28672, k=4096)),
        ("rmsnorm", ["cols=64"], dict(rows=1, cols=64, residual=True)),
        (
            "decode_attention",
            ["lengths=64"],
            dict(lengths=(64,), splits=33, q_heads=32, kv_heads=8, head_dim=128),
        ),
    ],
)
def test_sizes_that_are_not_given_are_those_of_the_default(name, words, sizes):
    assert command.sizes_of(find(name), SimpleNamespace(case=None, sizes=words, weight_format=None)) == sizes
    assert call.arguments(find(name), "bf16", sizes)


@pytest.mark.parametrize("name, words", [("rmsnorm", ["rows=0"]), ("linear", ["k=0"])])
def test_a_call_without_elements_is_refused(name, words):
    sizes = command.sizes_of(find(name), SimpleNamespace(case=None, sizes=words, weight_format=None))
    with pytest.raises(LabError, match=f"{name} has nothing to do at these sizes"):
        call.arguments(find(name), "bf16", sizes)


def test_a_call_with_packed_weights():
    """The kernel that is shown is that of the format, though no weights are rounded for it."""
    for name, matrix in (("linear", "w"), ("norm_linear_silu_mul", "w"), ("embedding", "table")):
        op = find(name)
        args = SimpleNamespace(case=None, sizes=["batch=2"], weight_format="int4-g128")
        a = op.bound(*call.arguments(op, "bf16", command.sizes_of(op, args)))
        assert getattr(a, matrix).format_name == "int4-g128"
    (kernel,) = look("linear", "triton", batch=1, n=64, k=256, format="fp8")
    assert kernel.name == "packed_linear_kernel" and "FORMAT=7" in kernel.instance


@pytest.mark.parametrize(
    "words, says",
    [
        (["linaer"], "did you mean linear"),
        (["linear", "--arch", "sm_75"], "choose from sm_90a, sm_80"),
        (["linear", "--dtype", "fp8"], "choose from fp32, fp16, bf16"),
        (["linear", "--backend", "torch"], "choose from cuda, triton"),
        (["linear", "--case", "99"], "has no case 99; choose from 0"),
        (["linear", "--sizes", "batch=1", "m=3"], "unknown size of linear 'm'"),
        (["linear", "--sizes", "batch"], "write NAME=NUMBER"),
        (["linear", "--sizes", "batch=65", "n=1", "k=8"], "1 to 64 rows"),
        (["linear", "--weight-format", "int5"], "unknown weight format 'int5'"),
        (["rope", "--weight-format", "fp8"], "rope has no weights in a format"),
        (["linear", "--ttgir", "--backend", "cuda"], "only Triton has TTGIR|lab._cuda"),
        ([], "name an op"),
        (["--all"], "--all --out DIR"),
    ],
)
def test_mistakes_are_one_line_that_lists_the_choices(words, says):
    with pytest.raises(LabError, match=says):
        main(*words)


def test_without_nvcc_the_triton_half_still_shows(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lab._cuda", None)
    assert main("silu_mul") == 0
    shown = capsys.readouterr()
    assert "silu_mul_kernel" in shown.out
    assert "lab._cuda is not built" in shown.err and shown.err.count("\n") == 1
    with pytest.raises(LabError, match="needs nvcc, no GPU"):
        main("silu_mul", "--backend", "cuda")


def test_symbols_of_what_is_no_elf_file():
    assert binary.symbols(b"text") == []


def test_the_seconds_of_a_file_are_those_of_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.inspect.fairness.ROOT", tmp_path)
    folder = tmp_path / "build/cuda"
    folder.mkdir(parents=True)
    for name, seconds in (("whole.cu", "3"), ("parted.cu.half", "1.5"), ("parted.cu.bf16", "2.5")):
        (folder / f"{name}.seconds").write_text(seconds)
    found = [built_in(tmp_path / f"{name}.cu") for name in ("whole", "parted", "absent")]
    assert found == [3, 4, None]
