"""The tensors of one call in one piece of memory, each between two guard zones.

In an ordinary allocation, a kernel that writes past the end of a tensor overwrites a neighbour, and nobody
notices. In an arena it overwrites a known pattern, which is compared after the call. The pattern is NaN in
float32, float16 and bfloat16, so that a value that was read past an end spoils the result, too.

The memory can be a file. Then a worker process (lab/worker.py) maps the same file and runs the kernel on it,
and this process, which never loads the kernel, judges what the kernel wrote.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

ALIGNMENT = 256  # bytes, of every storage: CUDA's own allocations have at least this alignment
GUARD_BYTES = 4096, 65536  # of a guard zone, least and most; between them it is as large as its storage
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Region:
    """One storage in the arena. tensors: (path, dtype, size, stride, offset in elements) of each tensor in
    it."""

    start: int
    nbytes: int
    guard: int
    tensors: list = field(default_factory=list)

    @property
    def end(self):
        return self.start + self.nbytes

    @property
    def name(self):
        return " and ".join(path for path, *_ in self.tensors)


def tensors_in(path: str, value) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in a value, through dataclasses, lists and tuples, as ("workspace.tickets", tensor)."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_in(f"{path}[{i}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(f"{path}.{f.name}", getattr(value, f.name))


class Arena:
    """The values of a call, {"x": tensor, "eps": 1e-5, ...}, with their tensors copied into one guarded
    memory.

    device: where the memory lies. file: an open file that holds it instead, on the CPU. Views of one storage
    stay views of one storage. A value that holds addresses of its own tensors has a method readdress(), which
    is called wherever the arena is mapped (lab.ops.decode_step.StepModel).
    """

    def __init__(self, values: Mapping[str, object], device: str | torch.device = "cpu", file=None):
        self.regions, places, self.addresses = [], {}, set()
        end = 0
        for name, value in values.items():
            if hasattr(value, "readdress"):
                self.addresses.add(f"{name}.table")
            for path, t in tensors_in(name, value):
                storage = t.untyped_storage()
                key = storage.data_ptr() if storage.nbytes() else ("empty", len(places))
                if key not in places:
                    guard = round_up(min(max(storage.nbytes(), GUARD_BYTES[0]), GUARD_BYTES[1]))
                    places[key] = len(self.regions)
                    self.regions.append(Region(round_up(end) + guard, storage.nbytes(), guard))
                    end = self.regions[-1].end + guard
                self.regions[places[key]].tensors.append(
                    (path, t.dtype, tuple(t.shape), t.stride(), t.storage_offset())
                )
        self.recipe = pack(values, places)
        self.memory = allocate(max(round_up(end), ALIGNMENT), torch.device(device), file)
        ends = [0, *(r.end for r in self.regions)]
        for start, end in zip(ends, [*(r.start for r in self.regions), self.memory.numel()], strict=True):
            self.memory[start:end].copy_(guard_pattern(start, end))  # the storages are filled below
        self.fill(values)

    def fill(self, values: Mapping[str, object], keep: tuple[str, ...] = ()) -> None:
        """Copies in the contents of other values of the same sizes, except those whose names are in
        `keep`."""
        filled = set()
        for name, value in values.items():
            if name in keep:
                continue
            for path, t in tensors_in(name, value):
                region = self.region_of(path)
                if region.nbytes and region.start not in filled:
                    storage = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
                    if storage.numel() != region.nbytes:
                        raise ValueError(f"{path} has another size than the arena was made for")
                    self.memory[region.start : region.end].copy_(storage)
                    filled.add(region.start)

    def region_of(self, path: str) -> Region:
        return next(r for r in self.regions if any(p == path for p, *_ in r.tensors))

    def values(self) -> dict:
        """The values, with their tensors in the arena: the arguments for a kernel."""
        return unpack(self.memory, self.layout(), self.recipe)

    def layout(self) -> list[tuple[int, int]]:
        """(start, bytes) of each storage: with `recipe`, what another process needs to find the tensors."""
        return [(r.start, r.nbytes) for r in self.regions]

    def remember(self) -> dict:
        """Keeps a copy of the arena's bytes, and returns the values in that copy, for a reference."""
        self.before = self.memory.clone()
        return unpack(self.before, self.layout(), self.recipe, readdress=False)

    def damage(self, may_change: set[str]) -> str | None:
        """A message about a write since remember() that is not allowed, or None. may_change: names or paths
        of the values that may be written. Afterwards `overran` says whether it was outside of all tensors."""
        self.overran = True
        for r in self.regions:
            zones = (
                (r.start - r.guard, r.start, "before the start of"),
                (r.end, r.end + r.guard, "past the end of"),
            )
            for start, end, where in zones:
                if not torch.equal(self.memory[start:end], self.before[start:end]):
                    return self.overrun(r, start, end, where)
        self.overran = False
        for r in self.regions:
            if not torch.equal(self.memory[r.start : r.end], self.before[r.start : r.end]):
                wrong = self.changed(r, may_change | self.addresses)
                if wrong:
                    return wrong
        return None

    def overrun(self, region: Region, start: int, end: int, where: str) -> str:
        bytes_ = (self.memory[start:end] != self.before[start:end]).nonzero()[:, 0] + (start - region.start)
        size = region.tensors[0][1].itemsize
        elements = torch.div(bytes_, size, rounding_mode="floor").unique()
        nearest = int(elements[0] if where.startswith("past") else elements[-1])
        count = f"{len(elements)} element{'s' if len(elements) > 1 else ''}"
        return (
            f"wrote {count} {where} {region.name}: element {nearest} of its memory, which has 0 to "
            f"{math.ceil(region.nbytes / size) - 1}"
        )

    def changed(self, region: Region, may_change: set[str]) -> str | None:
        """A message about a change in a storage that is not allowed, to a tensor or to the memory between
        tensors; or None."""
        different = self.memory[region.start : region.end] != self.before[region.start : region.end]
        other = torch.ones_like(different)  # the bytes that belong to no tensor of the call
        fixed = []
        for path, dtype, size, stride, offset in region.tensors:
            mark = torch.zeros(region.nbytes, dtype=torch.uint8, device=different.device)
            at(mark, INTEGERS[dtype.itemsize], size, stride, offset).fill_(-1 if dtype.itemsize > 1 else 255)
            other &= mark == 0
            if any(path == name or path.startswith((f"{name}.", f"{name}[")) for name in may_change):
                different &= mark == 0
            else:
                fixed.append((path, mark != 0))
        for path, mark in fixed:
            if bool((different & mark).any()):
                return f"{path} was changed, which the contract does not allow"
        if bool((different & other).any()):
            return f"memory between the rows of {region.name} was changed, which belongs to no argument"
        return None


def round_up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def guard_pattern(start: int, end: int) -> torch.Tensor:
    """Bytes `start` to `end` of a pattern of varying bytes that reads as NaN in float32, float16 and bfloat16
    at every aligned address."""
    index = np.arange(start // 2, -(-end // 2), dtype=np.uint32)
    bits = (index * np.uint32(2654435761)) >> np.uint32(16)  # Knuth's multiplicative hash
    halves = 0x7F81 + bits % 0x7F | (bits & 0x8000)  # sign any, exponent all ones, mantissa not 0
    return torch.from_numpy(halves.astype(np.uint16).view(np.uint8)[start % 2 :][: end - start])


def allocate(nbytes: int, device: torch.device, file=None) -> torch.Tensor:
    """uint8 memory that begins at a multiple of ALIGNMENT."""
    if file is not None:
        resize(file, nbytes)
        return map_file(file, nbytes)
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def resize(file, nbytes: int) -> None:
    """Grows a file to `nbytes`. A larger file keeps its size, because a mapped file may not shrink."""
    if os.fstat(file.fileno()).st_size < nbytes:
        os.ftruncate(file.fileno(), nbytes)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a fault later
        os.posix_fallocate(file.fileno(), 0, nbytes)


def map_file(file, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)


def at(memory: torch.Tensor, dtype, size, stride, offset) -> torch.Tensor:
    """A tensor of these strides in uint8 memory. On the CPU its storage is exactly `memory`."""
    if memory.numel() == 0:
        return torch.empty_strided(size, stride, dtype=dtype, device=memory.device)
    if memory.device.type == "cpu":  # so that the interpreter knows where the memory ends
        base, start = torch.from_numpy(memory.numpy()), 0
    else:
        base, start = memory, memory.storage_offset()
    empty = torch.empty(0, dtype=dtype, device=memory.device)
    return empty.set_(base.untyped_storage(), start // dtype.itemsize + offset, size, stride)


def pack(values, places) -> bytes:
    """The values as bytes. Each tensor is replaced by its place: (storage, dtype, size, stride, offset)."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, torch.Tensor):
                return None
            storage = value.untyped_storage()
            place = places[storage.data_ptr()] if storage.nbytes() else None
            return place, value.dtype, tuple(value.shape), value.stride(), value.storage_offset()

    buffer = io.BytesIO()
    Pickler(buffer).dump(dict(values))
    return buffer.getvalue()


def unpack(memory: torch.Tensor, layout, recipe: bytes, readdress=True) -> dict:
    """The values of a recipe with their tensors in `memory`."""
    return unpack_from(
        [memory[start : start + nbytes] for start, nbytes in layout], memory[:0], recipe, readdress
    )


def unpack_from(storages: list[torch.Tensor], nothing: torch.Tensor, recipe: bytes, readdress=True) -> dict:
    """The values of a recipe with their tensors in `storages`, uint8. nothing: memory for tensors without
    elements."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place):
            storage, *shape = place
            return at(nothing if storage is None else storages[storage], *shape)

    values = Unpickler(io.BytesIO(recipe)).load()
    for value in values.values() if readdress else ():
        if hasattr(value, "readdress"):
            value.readdress()
    return values
