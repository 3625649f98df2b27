"""The ways to run an op. `load(name, device)` gives a backend object, or says what to install.

A language is a class that follows the protocol below, and a launcher for each op that it has. Those of this
repository are modules of this package, with their launchers in the contracts; any other module calls
`register`, and the lab imports it where the environment's LAB_LANGUAGES names it.
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
    """What the dispatcher asks of a backend. `__init__(device)` raises Unavailable where this machine cannot
    run it."""

    name: str

    def launcher(self, op: Op) -> Callable:
        """A callable that takes the op's arguments and `out=`, launches its kernels and returns None."""

    def set_trace(self, on: bool) -> None:
        """Begins or ends the recording of the names of the kernels that are launched."""

    def take_trace(self) -> list[str]:
        """The names of the kernels launched since the last call, in their order."""


class Tunable(Backend, Protocol):
    """What `lab tune` asks besides."""

    compiler: str  # what compiled the kernels, with its version

    def forced(self, op: str, settings: dict) -> AbstractContextManager:
        """Within it every launch of `op` takes these settings; {}: those written by hand."""

    def use(self, entries: list[dict] | None) -> None:
        """Launches take these entries in the place of the table's."""

    def forget(self) -> None:
        """The table of settings is read again at the next launch."""


_registered: dict[str, type] = {}  # language -> its class, of those that are no module of this package


def register(name: str, backend: type, launchers: Mapping[str, Callable]) -> None:
    """Makes a language known to every verb of the lab.

    backend: a class that follows the protocol Backend. launchers: {an op's name: what `backend.launcher`
    looks up as op.launchers[name]}. The language may lack ops: it is then checked and measured at those that
    it has, and runs a model beside another (`lab run --override OP=NAME`). Raises LabError for a name that is
    taken and for an unknown op.
    """
    if name in BACKENDS:
        raise LabError(f"there is a language {name!r} already: call this one something else")
    ops = {op: find(op) for op in launchers}
    for op, launcher in launchers.items():
        ops[op].launchers[name] = launcher
    BACKENDS.append(name)
    _registered[name] = backend


@cache
def load(name: str, device: torch.device) -> Backend:
    """The backend `name` on `device`; raises Unavailable where this machine cannot run it."""
    backend = _registered.get(name) or importlib.import_module(f"lab.backends.{name}").Backend
    return backend(device)


def import_languages() -> None:
    """Imports the modules that LAB_LANGUAGES names, with commas between; they call register()."""
    for module in filter(None, os.environ.get("LAB_LANGUAGES", "").split(",")):
        try:
            importlib.import_module(module.strip())
        except ImportError as error:
            raise LabError(f"LAB_LANGUAGES={os.environ['LAB_LANGUAGES']}: {error}") from None


import_languages()
