"""The functions that the judge relies on in a kernel's process, as they were before the kernel's file was
loaded.

A file can replace any function of any module: time.perf_counter by one that stands still, torch.cuda.Event
by one that reports half the time. So whoever measures in that process imports this module first, uses
`keep`, and asks patched() afterwards. What that process runs of the lab itself is noted by watch(), which is
called just before the file is loaded. The verdict itself is formed in another process, which never loads the
file.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import pickle
import sys
import time
from types import SimpleNamespace

import torch
import torch.profiler

from lab.contract import Op

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
    ("hashlib", hashlib, "blake2b"),
    ("functools", functools, "partial"),
    ("json", json, "dumps"),
    ("pickle", pickle, "loads Unpickler"),
)
# Modules of the lab that make the contents, call the kernel, time it and answer; lab.worker runs as __main__.
OWN = (
    "__main__ lab.arena lab.check lab.contract lab.harness.shapes lab.harness.timing "
    "lab.judge.child lab.judge.originals lab.judge.replay lab.worker"
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


_own: dict = {}  # name -> (owner, attribute, the object, its code)


def watch(op: Op) -> None:
    """Notes the functions and classes of the lab's own modules, and those of the op that is judged, as they
    are now."""
    fields = {name: value for name, value in vars(op).items() if callable(value)}
    for name, value in fields.items():
        _own[f"{op.name}.{name}"] = op, name, value, code_of(value)
    of_op = {value.__module__ for value in fields.values() if value.__module__.startswith("lab.")}
    for name in [*OWN.split(), *sorted(of_op)]:
        module = sys.modules[name]
        for attribute, value in vars(module).items():
            if not callable(value) or attribute.startswith("__"):
                continue
            _own[f"{name}.{attribute}"] = module, attribute, value, code_of(value)
            if inspect.isclass(value) and value.__module__ == name:
                for member, own in vars(value).items():
                    if callable(own):
                        _own[f"{name}.{attribute}.{member}"] = value, member, own, code_of(own)


def code_of(function):
    return getattr(function, "__code__", None)


def patched() -> list[str]:
    """The names of what is no longer the object that it was when this module was imported, or when watch()
    was called."""
    found = [
        name for name, (owner, attribute, was) in _before.items() if getattr(owner, attribute) is not was
    ]
    for name, (owner, attribute, was, code) in _own.items():
        now = vars(owner).get(attribute)
        if now is not was or code_of(now) is not code:
            found.append(name)
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        found.append("a mode of torch that intercepts every operation")
    return found
