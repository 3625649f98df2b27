"""Checks that memory is free before it is taken: a model that is too large gives one line of error, and no
machine that swaps."""

import torch

from lab.errors import LabError


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on a GPU, or available to programs on Linux; None where this cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def device_bytes(device: str, index: int) -> int | None:
    """All bytes of a GPU, asked without taking any; on a CPU free_bytes()."""
    if device == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    return free_bytes(torch.device(device))


def require_memory(nbytes: int, device: str | torch.device, what: str, remedy: str) -> None:
    """Raises LabError when `nbytes` are not free on the device."""
    free = free_bytes(torch.device(device))
    if free is not None and nbytes > free:
        raise LabError(
            f"{what} needs {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on {device}; {remedy}"
        )
