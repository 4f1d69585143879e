"""Values of tensors in LLVM's terms: how they are stored, and how that becomes a number and back.

numba has no bf16 and no fp16; both are converted in the loop (bf16 by its bits, rounded to nearest even).
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir

# Of functions that only compiled loops call: division follows IEEE instead of raising.
INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
STORED = {
    torch.float32: F32,
    torch.float64: F64,
    torch.float16: ir.HalfType(),
    torch.bfloat16: I16,
    torch.uint8: I8,
    torch.int8: I8,
    torch.int16: I16,
}
SIGNED = (torch.int8, torch.int16)


def decode(builder: Any, value: Any, target: Any) -> Any:
    """A stored value as the type of the arithmetic."""
    if value.type == I16:
        value = builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
    return cast(builder, value, target)


def encode(builder: Any, value: Any, stored: Any) -> Any:
    """A value of the arithmetic as it is stored, rounded to nearest even."""
    if stored != I16:
        return cast(builder, value, stored)
    value = cast(builder, value, F32)
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.lshr(builder.select(nan, I32(0x7FC00000), rounded), I32(16)), I16)


def cast(builder: Any, value: Any, target: Any) -> Any:
    width = {ir.HalfType(): 16, F32: 32, F64: 64}
    if width[value.type] < width[target]:
        return builder.fpext(value, target)
    if width[value.type] > width[target]:
        return builder.fptrunc(value, target)
    return value


def wide(builder: Any) -> None:
    """Has the function vectorized in 512 bits where the CPU has them: half the instructions in flight.

    LLVM prefers 256 for the sake of older CPUs' clocks. llvmlite knows no such attribute, hence set.add.
    """
    set.add(builder.function.attributes, '"prefer-vector-width"="512"')


def place_of(builder: Any, stored: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])
