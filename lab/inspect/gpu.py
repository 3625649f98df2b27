"""The limits of a multiprocessor of each architecture, and how many blocks of a kernel fit in one at a
time."""

from dataclasses import dataclass

from lab.errors import LabError

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """Limits from the CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"."""

    arch: str  # as nvcc calls it
    triton: str  # as triton_kernels' tables call it
    multiprocessors: int  # of `card`, for which launches are recorded
    card: str
    shared: int  # bytes of shared memory of one multiprocessor
    registers: int = 64 * 1024
    warps: int = 64
    blocks: int = 32
    reserved: int = 1024  # bytes of shared memory that the driver takes for each block
    shared_unit: int = 128  # bytes
    register_unit: int = 256  # a warp gets its registers in units of this many
    partitions: int = 4  # each has its own quarter of the registers and the warps

    @property
    def major(self):
        """The major number of the compute capability: 9 for sm_90a."""
        return int(self.triton.removeprefix("sm_")) // 10


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_90a", "sm_90", 132, "H100 SXM", 228 << 10),
        Gpu("sm_80", "sm_80", 108, "A100", 164 << 10),
    )
}


def find(arch):
    """The Gpu of "sm_90a" (or "sm_90") or "sm_80"; LabError with the choices for anything else."""
    name = "sm_90a" if arch == "sm_90" else arch
    if name not in GPUS:
        raise LabError(f"unknown architecture {arch!r}: choose from {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # resident on one multiprocessor
    share: float  # of its warps
    limit: str  # what prevents more blocks: registers | shared memory | warps | blocks


def occupancy(gpu, registers, shared, threads):
    """Theoretical occupancy, as cuda_occupancy.h of the CUDA toolkit computes it.

    registers: per thread. shared: static and dynamic bytes per block. threads: per block.
    """

    def up(n, unit):
        return -(-n // unit) * unit

    warps = -(-threads // WARP)
    per_warp = up(max(registers, 1) * WARP, gpu.register_unit)
    by_registers = gpu.registers // gpu.partitions // per_warp * gpu.partitions // warps
    limits = {
        "warps": gpu.warps // warps,
        "registers": by_registers,
        "shared memory": gpu.shared // up(shared + gpu.reserved, gpu.shared_unit),
        "blocks": gpu.blocks,
    }
    limit = min(limits, key=limits.get)  # the first of equals
    return Occupancy(limits[limit], limits[limit] * warps / gpu.warps, limit)
