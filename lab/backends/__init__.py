"""The three ways to run an op. `load(name, device)` gives a backend object, or says what to install.

A backend has `name`, `launcher(op)` (a callable that takes the op's arguments and `out=`), and `set_trace(on)` and
`take_trace()`, the names of the kernels launched since the last call. Where it can be tuned (`lab tune`) it has
`compiler`, a version, `forced(op, settings)`, under which every launch of the op takes these settings ({}: those by
hand), `use(entries)`, after which launches take these entries in the place of the table's, and `forget()`, after which
it reads its table of settings again.
"""
import importlib
from functools import cache

import torch


@cache
def load(name: str, device: torch.device):
    """The backend `name` on `device`; raises Unavailable where this machine cannot run it."""
    return importlib.import_module(f"lab.backends.{name}").Backend(device)
