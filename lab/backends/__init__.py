"""The ways to run an op. `load(name, device)` gives a backend object, or says what to install.

A language is a module of this package with a class `Backend`, which follows the protocol below, and a launcher in the
contract of every op. The names are in lab.contract.BACKENDS.
"""
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Protocol

import torch

from lab.contract import Op


class Backend(Protocol):
    """What the dispatcher asks of a backend. `__init__(device)` raises Unavailable where this machine cannot run it."""

    name: str

    def launcher(self, op: Op) -> Callable:
        """A callable that takes the op's arguments and `out=`, launches its kernels and returns None."""

    def set_trace(self, on: bool) -> None:
        """Begins or ends the recording of the names of the kernels that are launched."""

    def take_trace(self) -> list[str]:
        """The names of the kernels launched since the last call, in their order."""


class Tunable(Backend, Protocol):
    """What `lab tune` asks besides."""

    compiler: str                       # what compiled the kernels, with its version

    def forced(self, op: str, settings: dict) -> AbstractContextManager:
        """Within it every launch of `op` takes these settings; {}: those written by hand."""

    def use(self, entries: list[dict] | None) -> None:
        """Launches take these entries in the place of the table's."""

    def forget(self) -> None:
        """The table of settings is read again at the next launch."""


@cache
def load(name: str, device: torch.device) -> Backend:
    """The backend `name` on `device`; raises Unavailable where this machine cannot run it."""
    return importlib.import_module(f"lab.backends.{name}").Backend(device)
