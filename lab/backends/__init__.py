"""The backends: the ways to run an op. `load(name, device)` returns a backend object, or says what to
install.

A language is a class that follows the protocol Backend below, and a launcher for each op that the language
has. The languages of this repository are modules of this package, and the contracts hold their launchers. Any
other module adds its language by `register`; the environment variable LAB_LANGUAGES names the modules to
import.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Protocol

import torch

from lab.contract import BACKENDS, Op
from lab.errors import LabError
from lab.ops import find


class Backend(Protocol):
    """What the dispatcher needs of a backend. `__init__(device)` raises Unavailable if this machine cannot
    run it."""

    name: str

    def launcher(self, op: Op) -> Callable:
        """A callable that takes the op's arguments and `out=`, launches its kernels and returns None."""

    def set_trace(self, on: bool) -> None:
        """Starts or stops recording the names of the kernels that are launched."""

    def take_trace(self) -> list[str]:
        """The names of the kernels launched since the last call, in their order."""


class Tunable(Backend, Protocol):
    """What `lab tune` needs of a backend, in addition."""

    compiler: str  # what compiled the kernels, with its version

    def forced(self, op: str, settings: dict) -> AbstractContextManager:
        """A context in which every launch of `op` uses these settings; {} means those written by hand."""

    def use(self, entries: list[dict] | None) -> None:
        """Makes launches use these entries instead of the tuned table; None means the table again."""

    def forget(self) -> None:
        """Forgets the table of settings, so that the next launch reads it again."""


_registered: dict[str, type] = {}  # language -> its class, for those added by register()


def register(name: str, backend: type, launchers: Mapping[str, Callable]) -> None:
    """Makes a language known to every verb of the lab.

    backend: a class that follows the protocol Backend. launchers: {op's name: launcher}; they are added to
    `Op.launchers` of each op, where `backend.launcher` finds them. The language need not have every op: it is
    checked and measured at those that it has, and can run a model together with another language (`lab run
    --override OP=NAME`). Raises LabError if the name is taken, or for an unknown op.
    """
    if name in BACKENDS:
        raise LabError(f"there is a language {name!r} already: choose another name")
    ops = {op: find(op) for op in launchers}
    for op, launcher in launchers.items():
        ops[op].launchers[name] = launcher
    BACKENDS.append(name)
    _registered[name] = backend


@cache
def load(name: str, device: torch.device) -> Backend:
    """The backend `name` on `device`; raises Unavailable where this machine cannot run it."""
    backend = _registered.get(name) or importlib.import_module(f"{__name__}.{name}").Backend
    return backend(device)


def import_languages() -> None:
    """Imports the modules that LAB_LANGUAGES names, separated by commas; each calls register()."""
    for module in filter(None, os.environ.get("LAB_LANGUAGES", "").split(",")):
        try:
            importlib.import_module(module.strip())
        except ImportError as error:
            raise LabError(f"LAB_LANGUAGES={os.environ['LAB_LANGUAGES']}: {error}") from None


import_languages()
