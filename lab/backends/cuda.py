"""The CUDA kernels: lab._cuda (nvcc) for tensors on a GPU, lab._host (g++) for tensors on the CPU.

The extension takes raw addresses, sizes and a stream as integers, so it depends on no torch ABI.
"""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch

from lab.errors import LabError
from lab.extension import load
from lab.tune import tuned


class Backend:
    name = "cuda"

    def __init__(self, device: torch.device, extension=None):
        """extension: another build to use instead of the installed one; its sources are not compared with the
        files."""
        self.extension = extension or load("_cuda" if device.type == "cuda" else "_host")
        self.device = device
        self.forget()
        launchers = {
            name: getattr(self.extension, name) for name in dir(self.extension) if not name.startswith("_")
        }
        launchers["stream"] = stream_of(device)
        self.kernels = SimpleNamespace(**launchers)

    @property
    def compiler(self):
        return self.extension.build_info()["compiler"]

    def forget(self):
        self.extension.set_settings(measured_settings(architecture(self.device)))

    def use(self, entries):
        self.extension.set_settings(settings_of(entries))

    @contextmanager
    def forced(self, op, settings):
        self.extension.force_settings(op, settings)
        try:
            yield
        finally:
            self.extension.force_settings(op, None)

    def launcher(self, op):
        return partial(op.launchers[self.name], self.kernels)

    def set_trace(self, on: bool) -> None:
        self.extension.set_trace(on)

    def take_trace(self) -> list[str]:
        return self.extension.take_trace()


def architecture(device):
    """ "sm_90" for an H100; None for a CPU."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def measured_settings(arch):
    """The settings that `lab tune` measured on an architecture, as the extension's set_settings() takes them;
    [] for None."""
    return settings_of(tuned.read(tuned.path_of("cuda", arch)) if arch else [])


def settings_of(entries):
    """Those for plain weights: launchers of packed ones have no settings to choose."""
    return [
        (e["op"], e["itemsize"], e["rows"], list(e["shape"].values()), e["settings"])
        for e in entries
        if "format" not in e
    ]


def stream_of(device: torch.device):
    """A function that returns the address of the device's current CUDA stream. torch's raw getter takes 0.1
    us, torch.cuda.current_stream() 1 us."""
    if device.type != "cuda":
        return lambda: 0
    index = torch.cuda.current_device() if device.index is None else device.index
    current, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def stream_of_current():
        if current() != index:  # a kernel runs on the current GPU, whatever the stream
            raise LabError(
                f"the current GPU is cuda:{current()}, and these ops run on {device}: call them within "
                f"torch.cuda.device({index})"
            )
        return stream(index)

    return stream_of_current
