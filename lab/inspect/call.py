"""The call that is inspected: an op's arguments of given sizes and dtype. Nobody reads their values."""

import inspect

import torch

from lab.contract import DTYPES, Rand
from lab.errors import LabError
from lab.formats import FORMATS, PackedMatrix
from lab.names import known
from lab.numbers import integer, number


class Blank(Rand):
    """Makes tensors of the right shape that take no time to fill and, until something is written, no
    memory."""

    def __init__(self, dtype):
        self.device, self.dtype = torch.device("cpu"), dtype

    def __call__(self, *shape, dtype=None, scale=1.0):
        return torch.empty(shape, dtype=dtype or self.dtype)

    def integers(self, low, high, *shape):
        return torch.full(shape, low, dtype=torch.int32)

    def permutation(self, n):
        return torch.arange(n, dtype=torch.int32)


def arguments(op, dtype, sizes):
    """The op's public arguments. Raises LabError for a dtype, a name of a size or a shape that the op does
    not accept."""
    names = [name for name, value in DTYPES.items() if value in op.dtypes]
    known(dtype, names, f"dtype of {op.name}")
    takes = list(inspect.signature(op.inputs).parameters.values())[1:]
    for name in sizes:
        known(name, [p.name for p in takes], f"size of {op.name}")
    missing = [p.name for p in takes if p.default is p.empty and p.name not in sizes]
    if missing:
        raise LabError(
            f"{op.name} needs {', '.join(missing)} too, as in --sizes "
            + " ".join(f"{k}={_shown(v)}" for k, v in op.cases[0].sizes.items())
        )
    plain = {name: value for name, value in sizes.items() if name != "format"}
    try:
        args = op.inputs(Blank(DTYPES[dtype]), **plain)
    except (TypeError, RuntimeError) as error:
        raise LabError(f"{op.name} cannot be called with these sizes: {str(error).splitlines()[0]}") from None
    if sizes.get("format") is not None:
        args = packed(op, args, sizes["format"], DTYPES[dtype])
    op.validate(*args)
    if any(isinstance(value, torch.Tensor) and value.numel() == 0 for value in args):
        raise LabError(f"{op.name} has nothing to do at these sizes: a tensor has no elements")
    return args


def packed(op, args, format, dtype):
    """The arguments with the op's matrix in a weight format, in memory that nothing is written to."""
    f, values = FORMATS[known(format, list(FORMATS), "weight format")], op.bound(*args)
    name = op.cold[0]
    rows, k = getattr(values, name).shape
    codes = torch.empty(f.codes_shape(rows, k), dtype=torch.uint8)
    scales = torch.empty(f.scales_shape(rows, k), dtype=f.scale_dtype)
    setattr(values, name, PackedMatrix(format, rows, k, codes, scales))
    if "dtype" in op.names:  # a packed matrix has none of its own
        values.dtype = dtype
    return tuple(vars(values).values())


def parse(words):
    """Converts ["batch=16", "lengths=1024,2048"] to {"batch": 16, "lengths": (1024, 2048)}; dtypes are given
    by name."""
    sizes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise LabError(f"size {word!r}: write NAME=NUMBER, as in batch=16 or lengths=1024,2048")
        try:
            sizes[name] = _value(value)
        except ValueError:
            raise LabError(f"size {word!r}: {value!r} is neither a number, True, False nor a dtype") from None
        if name in ("lengths", "positions") and isinstance(sizes[name], int):
            sizes[name] = (sizes[name],)
    return sizes


def _value(text):
    words = {**DTYPES, "True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    items = [
        integer(item) if "." not in item and "e" not in item else number(item) for item in text.split(",")
    ]
    return tuple(items) if len(items) > 1 else items[0]


def as_json(sizes):
    """Sizes as JSON can hold them: dtypes by name, tuples as lists."""
    names = {value: name for name, value in DTYPES.items()}

    def plain(value):
        if isinstance(value, torch.dtype):
            return names[value]
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in sizes.items()}


def _shown(value):
    value = as_json({"": value})[""]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def words(sizes):
    """Sizes as they are written on the command line."""
    return " ".join(f"{name}={_shown(value)}" for name, value in sizes.items())
