"""The functions that the judge relies on in a kernel's process, as they were before the kernel's file was
loaded.

A file can replace any function of any module: time.perf_counter by one that stands still, torch.cuda.Event
by one that reports half the time. So whoever measures in that process imports this module first, uses
`keep`, and asks patched() afterwards. The verdict itself is formed in another process, which never loads the
file.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
import torch.profiler

import lab.arena
import lab.contract
import lab.worker

# (what to call it, its owner, the names of its attributes)
WATCHED = (
    ("time", time, "perf_counter perf_counter_ns monotonic monotonic_ns time time_ns process_time sleep"),
    ("torch", torch, "equal allclose isclose randn randint randperm empty zeros Generator"),
    ("torch.testing", torch.testing, "assert_close"),
    ("torch.Tensor", torch.Tensor, "copy_ clone fill_ mul_ to view set_ data_ptr cpu sum __eq__"),
    ("torch.cuda", torch.cuda, "Event Stream CUDAGraph graph stream current_stream synchronize set_stream"),
    ("torch.cuda.Event", torch.cuda.Event, "record elapsed_time synchronize query"),
    ("torch.cuda.CUDAGraph", torch.cuda.CUDAGraph, "replay capture_begin capture_end"),
    ("torch.profiler", torch.profiler, "profile"),
    ("lab.worker", lab.worker, "call answer main write_all shared_memory"),
    ("lab.arena", lab.arena, "Arena guard_pattern unpack unpack_from at map_file"),
    ("lab.contract.Rand", lab.contract.Rand, "__init__ __call__ integers permutation"),
)

_before = {
    f"{title}.{name}": (owner, name, getattr(owner, name))
    for title, owner, names in WATCHED
    for name in names.split()
    if hasattr(owner, name)
}
keep = SimpleNamespace(
    perf_counter=time.perf_counter,
    equal=torch.equal,
    Event=torch.cuda.Event,
    synchronize=torch.cuda.synchronize,
)


def patched() -> list[str]:
    """The names of what is no longer the object that it was when this module was imported."""
    found = [
        name for name, (owner, attribute, was) in _before.items() if getattr(owner, attribute) is not was
    ]
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        found.append("a mode of torch that intercepts every operation")
    return found
