"""kernels/storage.py in numba loops: what rules see of the tensors of a slot, and how that is kept.

The functions of elements are the same source, compiled for single numbers. States in bytes are coded by
blocks: new values of a block are left in a scratch of floats, which is turned into bytes when all are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels import storage as device
from ...kernels.storage import BLOCK, CODED, COMPANIONS
from ..source import Function, folded

INLINE: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
}
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
MOST_CODED = 4  # states of a rule


@intrinsic
def float_of(typing, bits):
    """The float of these bits."""

    def codegen(context, builder, signature, args):
        width = args[0].type.width
        return builder.bitcast(builder.trunc(args[0], _I32) if width > 32 else args[0], _F32)

    return types.float32(bits), codegen


@intrinsic
def bits_of(typing, x):
    """The bits of a float, sign-extended."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), codegen


@intrinsic
def whole_at(typing, address, i):
    """The i-th int64 from an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_place(builder, _I64, *args))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def single_at(typing, address, i):
    """The i-th float from an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_place(builder, _F32, *args))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_single(typing, address, i, x):
    """Sets the i-th float from an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _place(builder, _F32, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def set_byte(typing, address, i, x):
    """Sets the i-th byte from an address."""

    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[2], _I8), _place(builder, _I8, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _place(builder: Any, stored: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


@intrinsic
def scratch(typing):
    """The address of room for the blocks of all states of an element on the stack."""

    def codegen(context, builder, signature, args):
        room = cgutils.alloca_once(builder, ir.ArrayType(_F32, MOST_CODED * BLOCK))
        return builder.ptrtoint(room, _I64)

    return types.int64(), codegen


@njit(**INLINE)
def _where(condition, x, y):
    return x if condition else y


@njit(**INLINE)
def _at_most(x, top):
    return x if x < top else top


@njit(**INLINE)
def _at_least(x, bottom):
    return x if x > bottom else bottom


NAMES: dict[str, Any] = {
    "bits_of": bits_of,
    "float_of": float_of,
    "at_most": _at_most,
    "at_least": _at_least,
    "where": _where,
    **{name: np.float32(value) for name, value in device.SINGLES.items()},
}


def element(name: str) -> Function:
    """A function of elements of kernels/storage.py, compiled."""
    compiled: Function = njit(**INLINE)(folded(getattr(device, name), NAMES, {}))
    return compiled


trimmed, split, joined, scale_of = map(element, ("trimmed", "split", "joined", "scale_of"))
signed_code, signed_level = element("signed_code"), element("signed_level")
nonnegative_code, nonnegative_level = element("nonnegative_code"), element("nonnegative_level")
CODE = {"signed": signed_code, "nonnegative": nonnegative_code}
TOP = {"signed": np.float32(256), "nonnegative": np.float32(1)}
UNIT = {"signed": np.float32(1 / 256), "nonnegative": np.float32(1)}


class Storage(NamedTuple):
    """What loops do with the tensors of a slot; `places` are addresses of the scales of a row.

    Attributes:
        load: `(addresses, strides, i, units)`: parameter, gradient, states of element i.
        store: `(addresses, strides, i, p, state, bits)`: keeps those that are not in bytes.
        places: `(row, fields, offset)`: addresses of the scales, so many scales on.
        units: `(places, block)`: by what the levels of a block are multiplied.
        room: `()`: the scratch.
        keep: `(space, j, state)`: leaves the others there, of element j of a block.
        encode: `(space, addresses, first, count, places, block)`: makes bytes of a block.
    """

    load: Function
    store: Function
    places: Function
    units: Function
    room: Function
    keep: Function
    encode: Function


def storage_of(kept: Sequence[str], count: int, load: Any, store: Any, stochastic: Any) -> Storage:
    """How the loops of a kernel read and write.

    Args:
        kept: the kinds of parameter, gradient and states; () if all are cast.
        count: the tensors of a slot.
        load, store: every tensor of an element, integers where it keeps such.
        stochastic: as kernels/storage.py, of bf16.
    """
    beside = kept[0] if kept and kept[0] in COMPANIONS else ""
    kinds = kept or ("cast",) * count
    assert len(kinds) + bool(beside) == count
    names: dict[str, Any] = {
        "load": load, "store": store, "stochastic": stochastic, "joined": joined, "split": split,
        "signed_level": signed_level, "nonnegative_level": nonnegative_level,
        "single_at": single_at, "set_single": set_single, "whole_at": whole_at, "scratch": scratch,
    }
    coded = [i for i, kind in enumerate(kinds) if kind in CODED]
    units = {i: f"units[{n}]" for n, i in enumerate(coded)}
    values = [_value(kind, i, count - 1, units.get(i, "")) for i, kind in enumerate(kinds)]
    scales = range(len(coded))

    def made(text: str) -> Function:
        return _function(text, names)

    return Storage(
        made(
            f"def f(addresses, strides, i, units):\n v = load(addresses, strides, i)\n return {_tuple(values)}"
        ),
        made(_storing(kinds, beside)),
        made(
            "def f(row, fields, offset):\n"
            f" last = row + 8 * (fields - {len(coded)})\n"
            f" return {_tuple([f'whole_at(last, {n}) + 4 * offset' for n in scales])}"
        ),
        made(
            "def f(places, block):\n"
            f" return {_tuple([f'single_at(places[{n}], block) * unit{n}' for n in scales])}"
        )
        if not coded
        else _function(
            "def f(places, block):\n"
            f" return {_tuple([f'single_at(places[{n}], block) * unit{n}' for n in scales])}",
            {**names, **{f"unit{n}": UNIT[kinds[i]] for n, i in enumerate(coded)}},
        ),
        made("def f():\n return scratch()" if coded else "def f():\n return 0"),
        made(
            "def f(space, j, state):\n"
            + "".join(f" set_single(space, {BLOCK * n} + j, state[{i - 2}])\n" for n, i in enumerate(coded))
            + " return"
        ),
        _encoding(kinds, coded),
    )


def _value(kind: str, i: int, beside: int, unit: str) -> str:
    """The expression for what rules see of tensor i, of the tensors `v` of an element."""
    return {
        "signed": f"signed_level(v[{i}]) * {unit}",
        "nonnegative": f"nonnegative_level(v[{i}]) * {unit}",
        "split16": f"joined(v[{i}], v[{beside}])",
        "split8": f"joined(v[{i}], v[{beside}] << 8)",
        "float32": f"v[{beside}]",
    }.get(kind, f"v[{i}]")


def _storing(kinds: Sequence[str], beside: str) -> str:
    """The source of what keeps new values that are not in bytes; None stands for what is not written."""
    lines = ["def f(addresses, strides, i, p, state, bits):"]
    kept = ["p", "None"]
    if beside.startswith("split"):
        lines.append(" high, low = split(p)")
        kept[0], low = "high", "low" if beside == "split16" else "low >> 8"
    else:
        low = "p"
    for n, kind in enumerate(kinds[2:]):
        value = f"state[{n}]"
        kept.append(
            "None" if kind in CODED else f"stochastic({value}, bits >> 16)" if kind == "stochastic" else value
        )
    values = [*kept, low] if beside else kept
    # A projection hands on an average alone.
    return "\n".join([*lines, f" store(addresses, strides, i, {_tuple(values)})", " return"])


def _encoding(kinds: Sequence[str], coded: Sequence[int]) -> Function:
    """What makes bytes of the scratch of a block: its largest, its scale, its codes, for one state after another."""
    encoders = [_encoder(kinds[i]) for i in coded]
    calls = [
        f" e{n}(space + {4 * BLOCK * n}, addresses[{i}] + first, count, places[{n}], block)"
        for n, i in enumerate(coded)
    ]
    text = "\n".join(["def f(space, addresses, first, count, places, block):", *calls, " return"])
    return _function(text, {f"e{n}": encoder for n, encoder in enumerate(encoders)})


def _encoder(kind: str) -> Function:
    code, top, zero = CODE[kind], TOP[kind], np.float32(0)

    @njit(**INLINE)
    def encode(space, codes, count, place, block):
        largest = 0
        for j in range(count):
            largest = max(largest, bits_of(single_at(space, j)) & 0x7FFFFFFF)
        scale = scale_of(largest)
        inverse = top / scale if scale > zero else zero
        for j in range(count):
            set_byte(codes, j, code(single_at(space, j), inverse))
        set_single(place, block, scale)

    return encode


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _function(text: str, names: dict[str, Any]) -> Function:
    space: dict[str, Any] = {}
    exec(text, dict(names), space)
    compiled: Function = njit(**INLINE)(space["f"])
    return compiled
