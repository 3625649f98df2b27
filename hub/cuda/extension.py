"""The compiled kernels of this package, with the functions that lab/backends/cuda.py asks for."""

from .._ops import ops
from .launchers import FIELDS


class Extension:
    """A method for each launcher, which takes the fields of its struct by name; a group is a tuple."""

    def __init__(self):
        for name, fields in FIELDS.items():
            setattr(self, name, launcher(getattr(ops, name).default, fields))

    def set_settings(self, entries):
        ops.clear_settings()
        for op, itemsize, rows, shape, settings in entries:
            ops.add_setting(op, itemsize, rows, list(shape), list(settings), list(settings.values()))

    def set_trace(self, on):
        ops.set_trace(on)

    def take_trace(self):
        return ops.take_trace()


def launcher(launch, fields):
    def call(**values):
        if values.keys() != set(fields):
            raise TypeError(f"pass the arguments by name: {', '.join(fields)}")
        flat = []
        for field in fields:
            value = values[field]
            flat.extend(value) if isinstance(value, tuple) else flat.append(value)
        # An int of torch has 64 bits and a sign; addresses and seeds have none.
        launch([v - (1 << 64) if isinstance(v, int) and v >= 1 << 63 else v for v in flat])

    return call


def load(name):
    """name: the build for a GPU or for the host; a package has one."""
    return Extension()
