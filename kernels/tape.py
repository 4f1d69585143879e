"""Scalars computed on the device: a recorded tape of operations in fp64, unrolled when compiled."""

from .language import jit, tl

_NAMES = "add subtract multiply divide power sqrt where equal greater fp32 log2"
CODES = {name: code for code, name in enumerate(_NAMES.split())}
_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _POWER = (tl.constexpr(CODES[n]) for n in list(CODES)[:5])
_SQRT, _WHERE, _EQUAL, _GREATER, _FP32 = (tl.constexpr(CODES[n]) for n in list(CODES)[5:10])


@jit
def operation(x, y, z, CODE: tl.constexpr):
    """One operation on fp64 numbers [...]. A condition is 0 or 1."""
    if CODE == _ADD:
        return x + y
    elif CODE == _SUBTRACT:
        return x - y
    elif CODE == _MULTIPLY:
        return x * y
    elif CODE == _DIVIDE:
        return x / y
    elif CODE == _POWER:
        return tl.where(y == 0, 1.0, tl.exp2(y * tl.log2(x)))  # within some 1e-13 of the host's
    elif CODE == _SQRT:
        return tl.sqrt(x)
    elif CODE == _WHERE:
        return tl.where(x != 0, y, z)
    elif CODE == _EQUAL:
        return (x == y).to(tl.float64)
    elif CODE == _GREATER:
        return (x > y).to(tl.float64)
    elif CODE == _FP32:
        return x.to(tl.float32).to(tl.float64)
    else:
        return tl.log2(x)


@jit
def played(values, CODE: tl.constexpr):
    """A tuple of fp64 numbers [...] and, behind them, the results of the tape's operations."""
    for i in tl.static_range(0, len(CODE), 4):
        result = operation(values[CODE[i + 1]], values[CODE[i + 2]], values[CODE[i + 3]], CODE[i])
        values = values + (result,)
    return values
