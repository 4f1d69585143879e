"""Reading and writing tensors by address in numba loops, whatever their dtype: the boundary where storage is decoded.

numba has no bf16 and no fp16; both are converted in the loop (bf16 by its bits, rounded to nearest even).
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_STORED = {
    torch.float32: _F32,
    torch.float64: _F64,
    torch.float16: ir.HalfType(),
    torch.bfloat16: _I16,
}


def _widened(builder: Any, value: Any, target: Any) -> Any:
    """A stored value as the type of the arithmetic."""
    if value.type == _I16:
        value = builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)
    return _cast(builder, value, target)


def _narrowed(builder: Any, value: Any, stored: Any) -> Any:
    """A value of the arithmetic as it is stored, rounded to nearest even."""
    if stored != _I16:
        return _cast(builder, value, stored)
    value = _cast(builder, value, _F32)
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(
        builder.lshr(builder.select(nan, _I32(0x7FC00000), rounded), _I32(16)), _I16
    )


def _cast(builder: Any, value: Any, target: Any) -> Any:
    width = {ir.HalfType(): 16, _F32: 32, _F64: 64}
    if width[value.type] < width[target]:
        return builder.fpext(value, target)
    if width[value.type] > width[target]:
        return builder.fptrunc(value, target)
    return value


def _pointer(builder: Any, stored: Any, addresses: Any, strides: Any, k: int, i: Any, dense: bool) -> Any:
    base = builder.inttoptr(builder.extract_value(addresses, k), stored.as_pointer())
    index = i if dense else builder.mul(i, builder.extract_value(strides, k))
    return builder.gep(base, [index])


def accessors(dtypes: tuple[torch.dtype, ...], compute: torch.dtype, dense: bool) -> tuple[Any, Any]:
    """`load(addresses, strides, i) -> values` and `store(addresses, strides, i, p, state)`.

    Element i of tensor k is at `addresses[k] + i * strides[k]` elements; dense: stride 1, known when
    compiled. The gradient (tensor 1) is never written.
    """
    stored = [_STORED[dtype] for dtype in dtypes]
    real = types.float64 if compute == torch.float64 else types.float32
    llvm_real = _F64 if compute == torch.float64 else _F32

    @intrinsic  # type: ignore[untyped-decorator]
    def load(typing, addresses, strides, i):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            values = [
                _widened(builder, builder.load(_pointer(builder, t, args[0], args[1], k, args[2], dense)), llvm_real)
                for k, t in enumerate(stored)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(real, len(stored))(addresses, strides, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def store(typing, addresses, strides, i, p, state):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            states = cgutils.unpack_tuple(builder, args[4]) if len(stored) > 2 else []
            written = [(0, args[3]), *enumerate(states, start=2)]
            for k, value in written:
                pointer = _pointer(builder, stored[k], args[0], args[1], k, args[2], dense)
                builder.store(_narrowed(builder, value, stored[k]), pointer)
            return context.get_dummy_value()

        return types.void(addresses, strides, types.int64, real, state), codegen

    return load, store


def shift_of(dtypes: tuple[torch.dtype, ...]) -> Any:
    """`shift(addresses, strides, n) -> addresses`: each moved on by n times its stride, in elements."""
    sizes = [dtype.itemsize for dtype in dtypes]

    @intrinsic  # type: ignore[untyped-decorator]
    def shift(typing, addresses, strides, n):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            moved = []
            for k, size in enumerate(sizes):
                stride = builder.extract_value(args[1], k)
                offset = builder.mul(builder.mul(stride, args[2]), ir.IntType(64)(size))
                moved.append(builder.add(builder.extract_value(args[0], k), offset))
            return context.make_tuple(builder, signature.return_type, moved)

        return addresses(addresses, strides, types.int64), codegen

    return shift
