"""Triton's interpreter as the kernel tests need it: it rounds to bf16 as a GPU does, and is faster."""

import functools
import math
from typing import Any

import numpy
import torch
from triton import language as tl
from triton.runtime import interpreter

_convert_float, _patch_lang = interpreter._convert_float, interpreter._patch_lang


def _converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """fp32 from and to bf16, to nearest even; the interpreter drops the bits (triton-lang/triton #8322)."""
    if {source.name, target.name} != {"fp32", "bf16"}:
        return _convert_float(values, source, target, rounding)
    if target.name == "fp32":
        return values.astype("uint32") << 16
    rounded = torch.from_numpy(numpy.array(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)


def _patched(function: Any) -> Any:
    """Replaces what a function finds in tl, unless a kernel or function that is running has done so.

    The interpreter looks for what to replace at each call of a device function, among all names of tl. Only
    what it does for the kernel is taken back, and that leaves nothing replaced.
    """
    return (
        _patch_lang(function) if any(tl.core.is_builtin(module.load) for module in _seen(function)) else None
    )


@functools.cache
def _seen(function: Any) -> list[Any]:
    """What a function has of tl by any name."""
    return [module for module in function.__globals__.values() if module is tl or module is tl.core]


def improve() -> None:
    interpreter._convert_float, interpreter._patch_lang = _converted, _patched
    # On a GPU the smaller and the larger of a number and NaN are the number; the interpreter's are NaN.
    builder = interpreter.InterpreterBuilder
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, numpy.fmin)
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, numpy.fmax)
    _remembering()


# What follows does the same as the interpreter, which makes types, shapes and tables anew at each operation.


def _remembering() -> None:
    """Types of blocks, shapes and dtypes of NumPy are made once."""
    block_type, semantic = tl.core.block_type, interpreter.TritonSemantic
    blocks: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}
    scalars: dict[str, Any] = {}
    dtype_of, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value
    cast, unwrapped = semantic.cast, tl.core._unwrap_if_constexpr
    wrapping = (tl.core.constexpr, tl.core.tuple, tuple, list)

    def block_of(element: Any, shape: Any) -> Any:
        key = (element.name, *shape)
        if key not in blocks:
            blocks[key] = block_type(element, shape)
        return blocks[key]

    def numpy_dtype(of: Any) -> Any:
        scalar = of.scalar
        if scalar.name not in scalars:
            scalars[scalar.name] = dtype_of(scalar)
        return scalars[scalar.name]

    def make(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            sizes = tl.core.tuple([tl.core.constexpr(size) for size in key])
            shapes[key] = sizes, tl.core.constexpr(math.prod(key))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.shape is rhs.shape
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    def cast_value(self: Any, value: Any, to: Any, rounding: Any = None) -> Any:
        return value if value.type.scalar is to.scalar else cast(self, value, to, rounding)

    def unwrapped_value(value: Any) -> Any:
        return unwrapped(value) if isinstance(value, wrapping) else value

    block_type.with_element_ty = lambda self, scalar: block_of(scalar, self.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, element, shape: block_of(element, shape)
    interpreter._get_np_dtype, tl.core.tensor.__init__ = numpy_dtype, make
    semantic.broadcast_impl_value, semantic.cast = broadcast_values, cast_value
    tl.core._unwrap_if_constexpr = unwrapped_value
