"""The host layer: CUDA kernels on a CPU, in small programs of their own (tests/host/*.cu).

features.cu checks every name that kernels use; planted.cu has one bug per kernel, and each must be caught: by
wrong numbers, by an error that names the place, or by a sanitizer. The clean kernels must pass under every
schedule.
"""

import hashlib
import inspect
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "host"
HOST = ROOT / "cuda_src" / "host"
PLANTED = (SOURCES / "planted.cu").read_text().splitlines()

COMMON = ["-std=c++17", "-Wall", "-Wextra", "-pthread", f"-I{ROOT / 'cuda_src'}"]
KERNEL = ["-x", "c++", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
# How each build compiles kernels and the scheduler, and links. The race detector must not see the scheduler.
BUILDS = {
    "plain": (["-O2"], ["-O2"], []),
    "thread": (["-O1", "-g", "-fsanitize=thread"], ["-O1", "-g", "-DLAB_HOST_TSAN"], ["-fsanitize=thread"]),
    "address": (
        ["-O0", "-g", "-fsanitize=address"],
        ["-O0", "-g", "-fsanitize=address"],
        ["-fsanitize=address"],
    ),
}
GPU_FEATURES = [
    "indices",
    "shuffles",
    "reductions",
    "atomics",
    "mma",
    "copies",
    "named_barriers",
    "float16",
    "math",
    "launches",
    "pipeline",
    "clusters",
    "wgmma",
    "exchange",
]
FEATURES = [*GPU_FEATURES, "threads", "callers", "fork"]
WRONG = [
    "store.no_barrier",
    "store.no_last_barrier",
    "copy.no_barrier",
    "copy.no_last_barrier",
    "bulk.read_before_copy",
    "product.no_barrier",
    "product.no_wait",
    "product.no_last_barrier",
    "product.early_copy",
]
CLEAN = ["store.none", "copy.none", "fault.none", "ticket.none", "bulk.none", "product.none"]


def compiler() -> str:
    names = [os.environ.get("CXX", "").split(" ")[0], "g++", "clang++", "c++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def compile_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr


def line(mark: str) -> str:
    """planted.cu:N of the line that carries the comment `line: mark`."""
    numbers = [i for i, text in enumerate(PLANTED, 1) if text.rstrip().endswith(f"// line: {mark}")]
    assert len(numbers) == 1, mark
    return f"planted.cu:{numbers[0]}"


def digest(build: str) -> str:
    """Of all that the programs of a build are made of."""
    how = compiler(), COMMON, KERNEL, BUILDS[build], inspect.getsource(Programs.make)
    found = hashlib.sha256(repr(how).encode())
    found.update(subprocess.run([compiler(), "--version"], capture_output=True).stdout)
    files = [*(ROOT / "cuda_src").glob("*.*h"), *HOST.iterdir(), *SOURCES.iterdir()]
    for path in sorted(path for path in files if path.is_file()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Programs:
    """Builds features and planted in one way, and runs them. They stay in build/ until a source changes."""

    def __init__(self, build: str, directory: Path):
        self.prefix: list[str] = []
        if build != "plain":
            self.need_runtime(compiler(), BUILDS[build][2], directory)
        kept = ROOT / "build" / "host_tests"
        self.directory = kept / f"{build}-{digest(build)}"
        if not self.directory.is_dir():
            self.make(build, directory)
            for old in kept.glob(f"{build}-*"):
                shutil.rmtree(old, ignore_errors=True)
            kept.mkdir(parents=True, exist_ok=True)
            new = kept / f"new-{os.getpid()}-{build}"  # whole, or not there
            shutil.copytree(directory, new)
            new.rename(self.directory)

    def make(self, build: str, directory: Path) -> None:
        kernel, scheduler, link = BUILDS[build]
        cxx = compiler()
        # The host layer as one file: each of its files would read the same headers of C++ again.
        whole = directory / "host.cpp"
        whole.write_text("".join(f'#include "{path}"\n' for path in sorted(HOST.glob("*.cpp"))))
        objects = {name: str(directory / f"{name}.o") for name in ("host", "features", "planted")}
        commands = [[cxx, *COMMON, *scheduler, "-c", str(whole), "-o", objects["host"]]]
        for name in ("features", "planted"):
            source = str(SOURCES / f"{name}.cu")
            commands.append([cxx, *COMMON, *KERNEL, *kernel, "-c", source, "-o", objects[name]])
        compile_all(commands)
        compile_all(
            [
                [cxx, *link, objects[name], objects["host"], "-pthread", "-o", str(directory / name)]
                for name in ("features", "planted")
            ]
        )

    def need_runtime(self, cxx: str, link: list[str], directory: Path) -> None:
        """Skips where a trivial program does not build or run with this sanitizer."""
        source, program = directory / "trivial.cpp", str(directory / "trivial")
        source.write_text("int main() { return 0; }\n")
        made = subprocess.run([cxx, *link, str(source), "-o", program], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{link[0]} does not link here: {made.stderr.strip().splitlines()[-1]}")
        if subprocess.run([program], capture_output=True).returncode:
            # Some kernels place memory where the race detector does not expect it, unless told not to
            # randomise.
            self.prefix = ["setarch", "-R"] if shutil.which("setarch") else []
            if not self.prefix or subprocess.run([*self.prefix, program], capture_output=True).returncode:
                pytest.skip(f"programs built with {link[0]} do not run here")

    def run(self, program: str, *arguments: str, **options: object) -> subprocess.CompletedProcess:
        """options: seed, poison, threads, stack, as in LAB_HOST_SEED and so on."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LAB_HOST_")}
        environment |= {
            f"LAB_HOST_{key.upper()}": str(value) for key, value in options.items() if value is not None
        }
        environment |= {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=67:detect_leaks=0"}
        return subprocess.run(
            [*self.prefix, str(self.directory / program), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Programs("plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def race_detector(tmp_path_factory):
    return Programs("thread", tmp_path_factory.mktemp("thread"))


@pytest.fixture(scope="module")
def address_sanitizer(tmp_path_factory):
    return Programs("address", tmp_path_factory.mktemp("address"))


# ---- what works --------------------------------------------------------------------------------------------


def test_all_features_are_listed(plain):
    assert sorted(plain.run("features").stdout.split()) == sorted(FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_feature(plain, name):
    for seed in (None, 1, 2, 3):
        done = plain.run("features", name, seed=seed)
        assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.parametrize("case", CLEAN)
def test_clean_kernel_passes_under_every_schedule(plain, case):
    assert plain.run("planted", case, poison=0).returncode == 0
    for seed in (None, *range(10)):
        done = plain.run("planted", case, seed=seed)
        assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.gpu
def test_gpu_agrees_with_the_same_program(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in /usr/local/cuda/bin")
    import torch

    program, arch = str(tmp_path / "features"), "sm_%d%d" % torch.cuda.get_device_capability()
    arch += "a" if arch == "sm_90" else ""  # which wgmma needs
    compile_all(
        [
            [
                nvcc,
                "-std=c++17",
                "-O2",
                f"-arch={arch}",
                f"-I{ROOT / 'cuda_src'}",
                "-x",
                "cu",
                str(SOURCES / "features.cu"),
                "-o",
                program,
            ]
        ]
    )
    checks = [name for name in GPU_FEATURES if name != "wgmma" or arch == "sm_90a"]
    done = subprocess.run([program, *checks], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_cuda_toolkit_is_needed():
    done = subprocess.run(
        [compiler(), *COMMON, *KERNEL, "-M", str(SOURCES / "features.cu")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "common.cuh" in done.stdout
    assert not re.search(r"cuda_runtime|cuda_fp16|cuda_bf16|cuda/include", done.stdout)


def test_static_shared_memory_is_refused(tmp_path):
    source = tmp_path / "static.cu"
    source.write_text(
        '#include "common.cuh"\n__global__ void kernel() { __shared__ float x[4]; x[0] = 0; }\n'
    )
    done = subprocess.run(
        [compiler(), *COMMON, *KERNEL, "-fsyntax-only", str(source)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "use lab::smem" in done.stderr


# ---- bugs that show as wrong numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("case", WRONG)
def test_missing_synchronisation_gives_wrong_numbers(plain, case):
    for seed in (None, 1, 2, 3):
        done = plain.run("planted", case, seed=seed)
        assert done.returncode == 1, f"seed {seed}: exit code {done.returncode} {done.stderr}"


def test_random_schedules_catch_what_a_fixed_order_hides(plain):
    """Each thread reads what the one before it wrote, with no barrier between."""
    assert plain.run("planted", "store.lower_neighbour").returncode == 0
    assert {plain.run("planted", "store.lower_neighbour", seed=seed).returncode for seed in range(3)} == {1}


def test_poison_catches_what_late_landing_hides(plain):
    """cp.async lands at the wait, after slow readers of the old tile are done; poison at issue does not
    wait."""
    assert plain.run("planted", "copy.no_last_barrier", poison=0).returncode == 0
    assert plain.run("planted", "copy.no_last_barrier").returncode == 1


def test_a_seed_repeats_its_schedule(plain):
    def reports(seed):
        return {plain.run("planted", "bulk.no_init", seed=seed).stderr for _ in range(3)}

    assert len(reports(1)) == 1
    assert len(set.union(*map(reports, range(5)))) > 1


# ---- bugs that end the launch ------------------------------------------------------------------------------

FAILURES = {
    "store.exits_early": [
        r"kernel store_kernel: deadlock",
        rf"block \(0,0,0\): 64 threads \(0-63\) wait in __syncthreads at .*{line('barrier')}",
        r"64 threads \(64-127\) have exited",
    ],
    "store.waits_elsewhere": [
        rf"64 threads \(0-63\) wait in __syncthreads at .*{line('barrier')}",
        rf"64 threads \(64-127\) wait in named_barrier at .*{line('elsewhere')}",
    ],
    "store.two_places": [
        r"divergent barrier: __syncthreads at .*planted.cu:\d+ while others wait in __syncthreads"
    ],
    "bulk.wrong_count": [
        rf"deadlock.*\n.*128 threads \(0-127\) wait in mbarrier_wait at .*{line('mbarrier')}"
    ],
    "bulk.no_init": [r"mbarrier_init was not called"],
    "copy.no_wait": [r"exits while its cp.async copies are in flight", r"in block \(0,0,0\)"],
    "copy.short_wait": [r"exits while its cp.async copies are in flight"],
    "copy.outside_copy": [r"cp_async16 at .*planted.cu:\d+: writes outside shared memory"],
    "fault.small_overrun": [r"access outside shared memory: byte 4096 of 4096", r"thread \(5,0,0\)"],
    "fault.slack_overrun": [
        r"written past the end of its 4100 bytes of shared memory",
        r"in block \(0,0,0\)",
    ],
    "fault.read_overrun": [r"access outside shared memory: byte 12096 of 4096", r"thread \(5,0,0\)"],
    "fault.wild_pointer": [r"illegal memory access at address 0x", r"thread \(5,0,0\)"],
    "fault.deep_recursion": [r"stack overflow.*LAB_HOST_STACK=65536"],
    "fault.division_by_zero": [r"integer division by zero"],
    "fault.too_little_smem": [r"needs 4096 bytes of shared memory, the launch gave 1000"],
    "fault.lane_exits": [
        r"the thread exits while others of its warp wait for it in __shfl_xor_sync at .*planted.cu"
    ],
}


@pytest.mark.parametrize("case", FAILURES)
def test_failure_is_reported_and_survived(plain, case):
    """Exit code 2 also says that clean kernels ran right after the failure, in the same process."""
    if case == "fault.division_by_zero" and os.uname().machine not in ("x86_64", "i686"):
        pytest.skip("integer division by zero does not trap on this processor")
    for seed in (None, 1):
        done = plain.run("planted", case, seed=seed)
        assert done.returncode == 2, f"seed {seed}: exit code {done.returncode} {done.stderr}"
        for pattern in FAILURES[case]:
            assert re.search(pattern, done.stderr), done.stderr


def test_every_planted_bug_is_tested(plain):
    tested = {*CLEAN, *FAILURES, *WRONG, "store.lower_neighbour", "ticket.no_fence", "ticket.plain_store"}
    assert set(plain.run("planted").stdout.split()) == tested


@pytest.mark.parametrize("name", ["SEED", "THREADS", "POISON", "STACK"])
def test_bad_option_is_named(plain, name):
    done = plain.run("planted", "store.none", **{name.lower(): "many"})
    assert f"LAB_HOST_{name}=many: a whole number is needed" in done.stderr
    assert done.returncode != 0


# ---- sanitizers --------------------------------------------------------------------------------------------

RACES = {
    "store.no_barrier": ["store", "load"],
    "store.no_last_barrier": ["store", "load"],
    "store.lower_neighbour": ["store", "load"],
    "ticket.no_fence": ["publish", "collect"],
    "ticket.plain_store": ["plain store"],
    "bulk.read_before_copy": ["bulk copy", "bulk read"],
}


@pytest.mark.parametrize("case", RACES)
def test_race_detector_names_both_sides(race_detector, case):
    done = race_detector.run("planted", case)
    assert done.returncode == 66, done.stderr
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    for mark in RACES[case]:
        assert line(mark) in done.stderr, f"{line(mark)} ({mark}) is not in\n{done.stderr}"


@pytest.mark.parametrize("case", CLEAN)
def test_race_detector_passes_clean_kernels(race_detector, case):
    for seed in (None, 1):
        done = race_detector.run("planted", case, seed=seed)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["shuffles", "reductions", "mma", "pipeline", "clusters", "copies", "named_barriers", "exchange"]
)
def test_race_detector_passes_features(race_detector, name):
    done = race_detector.run("features", name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["ACQ_REL", "RELAXED", "ACQUIRE", "RELEASE"])
def test_race_detector_notices_either_half_missing_of_a_tickets_fence(race_detector, order, tmp_path):
    """take_ticket as it is, and with less of its order: what other blocks left is then read without any."""
    sources = tmp_path / "cuda_src"
    shutil.copytree(ROOT / "cuda_src", sources, ignore=shutil.ignore_patterns("*.cu", "tuned"))
    common = (sources / "common.cuh").read_text()
    assert common.count("__ATOMIC_ACQ_REL") == 1
    (sources / "common.cuh").write_text(common.replace("__ATOMIC_ACQ_REL", f"__ATOMIC_{order}"))
    kernel, _, link = BUILDS["thread"]
    host = str(race_detector.directory / "host.o")
    flags = [*COMMON[:-1], f"-I{sources}", *KERNEL, *kernel]
    made, program = str(tmp_path / "ticket.o"), str(tmp_path / "ticket")
    compile_all([[compiler(), *flags, "-c", str(SOURCES / "ticket.cu"), "-o", made]])
    compile_all([[compiler(), *link, made, host, "-pthread", "-o", program]])
    done = race_detector.run(program)
    assert done.returncode == (0 if order == "ACQ_REL" else 66), done.stderr
    assert ("ticket.cu:" in done.stderr) == (order != "ACQ_REL"), done.stderr


def test_address_sanitizer_names_the_line_of_an_overrun(address_sanitizer):
    done = address_sanitizer.run("planted", "fault.small_overrun")
    assert done.returncode == 67, done.stderr
    assert "AddressSanitizer" in done.stderr
    assert line("overrun") in done.stderr


def test_address_sanitizer_passes_clean_kernels(address_sanitizer):
    for name in FEATURES:
        done = address_sanitizer.run("features", name)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    for case in [*CLEAN, "ticket.none"]:
        done = address_sanitizer.run("planted", case, seed=1)
        assert done.returncode == 0, f"{case}: {done.stderr}"
