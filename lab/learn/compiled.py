"""What Triton's compiler did for a kernel, by source line: what `lab explain` shows beside the Triton code.

The kernel is compiled as its launcher would launch it on a GPU that need not be here. Its code for GPUs
(TTGIR) has the layout of every tensor: which elements a thread, a warp and a block hold. Its PTX has the
instructions: how many bytes one load takes, shuffles, barriers, copies into shared memory, tensor cores.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.inspect import call, listing, triton_code
from lab.inspect import gpu as gpus

INSTRUCTIONS = {  # of PTX, by what they are called here; the first that fits counts
    "load of {} bytes": re.compile(r"\bld\.global(?:\.\S+)?"),
    "store of {} bytes": re.compile(r"\bst\.global(?:\.\S+)?"),
    "cp.async of 16 bytes": re.compile(r"\bcp\.async\.cg\."),
    "cp.async": re.compile(r"\bcp\.async\.ca\."),
    "shuffle": re.compile(r"\bshfl\.sync"),
    "barrier": re.compile(r"\bbar(?:rier)?\.sync"),
    "{} on tensor cores": re.compile(r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)|mma\.sync\S*?\.(m\d+n\d+k\d+)"),
    "ldmatrix": re.compile(r"\bldmatrix\."),
    "atomic": re.compile(r"(?<![\w.])(?:atom|red)\."),
}
TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<(\w+)>|(\w+)), (#[\w]+)>")
LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
    r"warpsPerCTA = \[([\d, ]+)\]",
    re.M,
)
RING = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")


@dataclass(frozen=True)
class Compiled:
    """A kernel of one launch. by_line: {line of the kernel's file: texts}."""

    kernel: str
    summary: str
    by_line: dict[int, list[str]]


def kernels(op, args, arch="sm_90a") -> list[Compiled]:
    """What was made of each kernel that a call launches. args: of lab.inspect.call. Raises LabError where the
    kernels cannot be compiled, as without Triton."""
    gpu = gpus.find(arch)
    found = []
    for launch in triton_code.launches(op, args, gpu):
        from triton_kernels import offline

        code = offline.compile(launch, gpu.triton)
        settings = {k: v for k, v in launch.meta.items() if k.isupper() or k == "num_stages"}
        warps, shared = code.metadata.num_warps, code.metadata.shared
        summary = f"{code.metadata.name} for {gpu.card}: {math.prod(triton_code.grid_of(launch)):,} programs "
        summary += f"of {warps} warps, {shared:,} bytes of shared memory; "
        summary += " ".join(f"{k}={v}" for k, v in settings.items())
        found.append(Compiled(code.metadata.name, summary, lines_of(code.asm, file_of(launch))))
    return found


def at_point(op, point, dtype, arch="sm_90a") -> list[Compiled]:
    """The same of an op at a Point of lab/harness/shapes.py; its tensors take no memory."""
    from lab.contract import DTYPES
    from lab.harness import shapes

    try:
        args, _ = shapes.arguments(op, point, call.Blank(DTYPES[dtype]), gpus.find(arch).multiprocessors)
        return kernels(op, args, arch)
    except LabError:
        raise
    except Exception as error:  # whatever Triton's compiler says of a kernel that it does not take
        raise LabError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def file_of(launch) -> str:
    """The name of the file of a launch's kernel."""
    return Path(launch.kernel.fn.__code__.co_filename).name


def lines_of(asm: dict, file: str) -> dict[int, list[str]]:
    """{line of a file: texts}: the layout of what a line reads, and the instructions that it became. asm: the
    kernel's texts "ttgir" and "ptx"; what an inlined function became counts where the file calls it."""
    layouts = {
        name: [[int(v) for v in values.split(",")] for values in rest]
        for name, *rest in LAYOUT.findall(asm["ttgir"])
    }
    rings = dict(RING.findall(asm["ttgir"]))
    texts: dict[int, list[str]] = defaultdict(list)
    for text, place in listing.ttgir_places(asm["ttgir"]):
        if place is None or Path(place.file).name != file:
            continue
        alloc = re.search(r"(%\w+) = ttg\.local_alloc : \(\)", text)
        said = _layout_of(text, layouts)
        if alloc and alloc[1] in rings:
            said = f"a ring of {rings[alloc[1]]} stages in shared memory"
        elif "ttg.convert_layout" in text:
            said = "from one layout to another, through shared memory or by shuffles"
        if said and said not in texts[place.line]:
            texts[place.line].append(said)
    for line, counted in instructions(asm["ptx"], file).items():
        texts[line].append(", ".join(f"{n} x {name}" for name, n in counted.items()))
    return {line: found for line, found in texts.items() if found}


def instructions(ptx: str, file: str) -> dict[int, Counter]:
    """{line of a file: how many of each of INSTRUCTIONS it became}."""
    found: dict[int, Counter] = defaultdict(Counter)
    place = None
    for code, where in listing.ptx(ptx):
        place = where or place
        if place is None or Path(place.file).name != file:
            continue
        for name, pattern in INSTRUCTIONS.items():
            match = pattern.search(code)
            if match:
                words = [word for word in match.groups() if word]
                found[place.line][name.format(*words or [width(match[0])])] += 1
                break
    return found


def width(instruction: str) -> int:
    """Bytes of one thread's access: 16 of ld.global.v4.b32."""
    parts = instruction.split(".")
    many = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    return many * next((int(p[1:]) // 8 for p in parts if re.fullmatch(r"[busf]\d+", p)), 4)


def _layout_of(text: str, layouts) -> str:
    """ "4096 bf16 at once: 8 neighbours a thread, 32 threads a warp, 8 warps" for a line of TTGIR that reads
    memory. Dimensions of one element are left out."""
    found = TENSOR.search(text) if re.search(r"= tt\.load |async_copy_global_to_local ", text) else None
    if not found or found[4] not in layouts:
        return ""
    tile = [int(size) for size in found[1].rstrip("x").split("x")]
    kept = [i for i, size in enumerate(tile) if size > 1] or [0]
    shape, each, threads, warps = (
        " x ".join(str(values[i]) for i in kept) for values in (tile, *layouts[found[4]])
    )
    return (
        f"{shape} {found[2] or found[3]} at once: {each} neighbours a thread, {threads} threads a warp, "
        f"{warps} warps"
    )
