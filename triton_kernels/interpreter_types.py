"""Types, shapes and constants of the interpreter, each made once.

Triton makes a new block type, two new shapes and a new type of these shapes for every operation of a
kernel, and a new tensor for every number in its source. Its compiler does this once for a kernel; the
interpreter does it in each program, where it took more time than the arithmetic. What is made is the same
each time and never changed, so it is kept.
"""

import functools
from typing import NamedTuple

import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic

core = tl.core
_unwrap_any = core._unwrap_if_constexpr


class _Shape(NamedTuple):
    sizes: core.tuple  # a type's shape has numbers
    numel: int
    of_tensor: core.tuple  # a tensor's shape has constexpr
    numel_of_tensor: core.constexpr
    text: str


@functools.lru_cache(maxsize=4096, typed=True)  # 16.0 is not 16: Triton refuses it
def _shape(*sizes) -> _Shape:
    shape = core.tuple(sizes)
    numel = validate_block_shape(shape)
    of_tensor = core.tuple([core.constexpr(size) for size in sizes])
    return _Shape(shape, numel, of_tensor, core.constexpr(numel), str(shape))


_SCALAR = _shape()


def _init_block_type(self, element_ty, shape):
    found = _shape(*[size.value if type(size) is core.constexpr else size for size in shape])
    if found is _SCALAR:
        raise TypeError("0d block_type is forbidden")  # as Triton's own
    self.element_ty, self.shape, self.numel = element_ty, found.sizes, found.numel
    self.name = f"<{found.text}, {element_ty}>"


def _init_tensor(self, handle, type):
    found = _shape(*type.shape.values) if type.is_block() else _SCALAR
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = found.of_tensor, found.numel_of_tensor


def _unwrap_if_constexpr(value):
    return value if type(value) is core.tensor else _unwrap_any(value)


# What stands in the place of Triton's own during a launch: (owner, name, value).
PATCHES = [
    (core.block_type, "__init__", _init_block_type),
    (core.tensor, "__init__", _init_tensor),
    (core, "_unwrap_if_constexpr", _unwrap_if_constexpr),
]


class Semantic(TritonSemantic):
    """Triton's rules for the operands of an operation, with short ways for the common cases."""

    def __init__(self, builder):
        super().__init__(builder)
        self._constant = functools.lru_cache(maxsize=4096, typed=True)(super().scalar_constant)

    def scalar_constant(self, value, dtype):
        if type(value) in (int, float, bool) and type(dtype) is tl.dtype:
            return self._constant(value, dtype)
        return super().scalar_constant(value, dtype)

    def binary_op_type_checking_impl(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        if type(lhs) is type(rhs) is core.tensor and not div_or_mod:
            a, b = lhs.dtype, rhs.dtype
            address = allow_lhs_ptr and a.is_ptr() and b.is_int()
            if address or (a is b and type(a) is tl.dtype):  # nothing to convert
                return self.broadcast_impl_value(lhs, rhs)
        return super().binary_op_type_checking_impl(
            lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        )

    def cast(self, input, dst_ty, fp_downcast_rounding=None):
        if input.dtype is dst_ty.scalar:
            return input
        return super().cast(input, dst_ty, fp_downcast_rounding)

    def _splat_like(self, scalar, block):
        type = block.type.with_element_ty(scalar.dtype)
        return self.tensor(self.builder.create_splat(type, scalar.handle), type)

    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type.is_block(), rhs.type.is_block()
        if left and right:  # equal shapes are one
            return (lhs, rhs) if lhs.shape is rhs.shape else super().broadcast_impl_value(lhs, rhs)
        if left:
            return lhs, self._splat_like(rhs, lhs)
        return (self._splat_like(lhs, rhs) if right else lhs), rhs
