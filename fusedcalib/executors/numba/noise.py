"""The noise of kernels/philox.py in numba loops: one counter an iteration, vectorized over them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels import philox as device
from .values import INNER as _INNER

BLOCK = 512  # elements filled at once
KEPT = (
    4096  # elements at most of a row whose noise is kept for the second walk over it: half of a first cache
)
ROOM = KEPT + 8  # whole counters, at either end
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_INLINE: dict[str, Any] = {**_INNER, "forceinline": True}  # a loop with a call in it is not vectorized
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_M0, _M1 = (np.uint64(m) for m in device.MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in device.WEYL)


@intrinsic
def fma(typing, x, y, z):
    """x y + z, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def as_float(typing, bits):
    """The float of these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.uint64), codegen


@intrinsic
def as_bits(typing, x):
    """The bits of a float, sign-extended."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), codegen


@intrinsic
def scratch(typing):
    """The address of ROOM floats on the stack."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(cgutils.alloca_once(builder, _F32, size=ROOM), _I64)

    return types.int64(), codegen


@intrinsic
def float_at(typing, address, i):
    """The i-th float from an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_float(typing, address, i, x):
    """Sets the i-th float from an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@njit(**_INLINE)
def philox(c0, c1, c2, c3, k0, k1):
    """Four words (uint64 below 2^32) of a counter of four words and a key of two."""
    for _ in range(device.ROUNDS):
        first, second = c0 * _M0, c2 * _M1
        c0, c2 = (second >> _HIGH) ^ c1 ^ k0, (first >> _HIGH) ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _series(coefficients: tuple[float, ...]) -> Any:
    """A polynomial, lowest power first, written out: each step rounded once."""
    lines = ["def series(x):", f"    y = c{len(coefficients) - 1}"]
    lines += [f"    y = fma(x, y, c{i})" for i in range(len(coefficients) - 2, -1, -1)]
    space: dict[str, Any] = {f"c{i}": np.float32(c) for i, c in enumerate(coefficients)}
    exec("\n".join([*lines, "    return y"]), {**space, "fma": fma}, space)
    return njit(**_INLINE)(space["series"])


_log, _sin, _cos = _series(device.LOG), _series(device.SIN), _series(device.COS)
_UNIT, _HALF_UNIT = np.float32(2.0**-32), np.float32(2.0**-33)
_ONE, _THREE, _MINUS_TWO_LN2 = np.float32(1), np.float32(3), np.float32(device.MINUS_TWO_LN2)
_FRACTION, _TWO_TO_FOUR = np.uint64(0x7FFFFF), np.uint64(0x40000000)


@njit(**_INLINE)
def normals(a, b, sigma):
    """Two normals of two words: radius from a, angle from b."""
    bits = as_bits(fma(np.float32(a), _UNIT, _HALF_UNIT)) - device.SQRT_HALF
    s = as_float(np.uint64((bits & 0x7FFFFF) + device.SQRT_HALF)) - _ONE
    exponent = np.float32(bits >> 23)
    radius = np.sqrt(fma(exponent, _MINUS_TWO_LN2, _log(s) * s)) * sigma
    f = as_float((b & _FRACTION) | _TWO_TO_FOUR) - _THREE
    z = f * f
    sine = radius * (_sin(z) * f)
    cosine = radius * _cos(z)
    return sine, (-cosine if (b >> np.uint64(31)) != 0 else cosine)


@njit(**_INNER)
def fill(address, first, count, sigma, step, stream, key0, key1):
    """Normals of elements `first` and on; returns where in the scratch the first of them lies."""
    quads = (first + count + 3) // 4 - first // 4
    for q in range(quads):
        index = np.uint64(first // 4 + q)
        words = philox(index & _LOW, index >> _HIGH, stream, step, key0, key1)
        x0, x1 = normals(words[0], words[1], sigma)
        x2, x3 = normals(words[2], words[3], sigma)
        set_float(address, 4 * q, x0)
        set_float(address, 4 * q + 1, x1)
        set_float(address, 4 * q + 2, x2)
        set_float(address, 4 * q + 3, x3)
    return first % 4


@njit(**_INNER)
def fill_bits(address, first, count, step, stream, key0, key1):
    """As `fill`, the random word of each element, as the float of those bits."""
    quads = (first + count + 3) // 4 - first // 4
    for q in range(quads):
        index = np.uint64(first // 4 + q)
        words = philox(index & _LOW, index >> _HIGH, stream, step, key0, key1)
        for k in range(4):
            set_float(address, 4 * q + k, as_float(words[k]))
    return first % 4


@cache
def bits_maker(rounds: bool) -> tuple[Any, Any, Any]:
    """As `noise_maker`, of the random words of stochastic rounding, as int64."""
    if not rounds:
        return _nothing(np.int64(0))
    purpose = np.uint64(device.PURPOSES["rounding"] << 30)

    @njit(**_INNER)
    def filled(place, at, count, h, words):
        return place + 4 * fill_bits(place, at, count, np.uint64(h.step) | purpose, *words)

    @njit(**_INLINE)
    def bits(place, i):
        return as_bits(float_at(place, i)) & np.int64(0xFFFFFFFF)

    return scratch, filled, bits


def _nothing(value: Any) -> tuple[Any, Any, Any]:
    return (
        njit(**_INLINE)(lambda: 0),
        njit(**_INLINE)(lambda place, at, count, h, words: 0),
        njit(**_INLINE)(lambda place, i: value),
    )


@cache
def noise_maker(stage: str, real: Any) -> tuple[Any, Any, Any]:
    """Room for the noise of a block on the stack, and how it is filled and read (as 0 without noise).

    `room()`, `filled(place, at, count, h, words)` -> where the noise of element `at` lies, `noise(place, i)`.
    """
    if stage == "none":
        return _nothing(real(0))
    purpose = np.uint64(device.PURPOSES[stage] << 30)

    @njit(**_INNER)
    def filled(place, at, count, h, words):
        return place + 4 * fill(place, at, count, np.float32(h.sigma), np.uint64(h.step) | purpose, *words)

    @njit(**_INLINE)
    def noise(place, i):
        return real(float_at(place, i))

    return scratch, filled, noise
