"""kernels/storage.py in numba loops: what rules see of the tensors of a slot, and how that is kept.

The functions of elements are the same source, compiled for single numbers. States in bytes are coded by
blocks: new values of a block are left in a scratch of floats, which is turned into bytes when all are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit

from ...kernels.storage import BLOCK, CODED, COMPANIONS
from ..source import Function
from .elements import (
    CODE,
    INLINE,
    TOP,
    joined,
    magnitude,
    nonnegative_level,
    scale_of,
    scratch,
    set_byte,
    set_single,
    signed_level,
    single_at,
    split,
    whole_at,
)


class Storage(NamedTuple):
    """What loops do with the tensors of a slot; `places` are addresses of the scales of a row.

    Attributes:
        load: `(addresses, strides, i, units)`: parameter, gradient, states of element i.
        store: `(addresses, strides, i, p, state, bits)`: keeps those that are not in bytes.
        store_states: the same but for the parameter.
        places: `(row, fields, offset)`: addresses of the scales, so many scales on.
        units: `(places, block)`: by what the levels of a block are multiplied.
        room: `()`: the scratch.
        keep: `(space, j, state)`: leaves the others there, of element j of a block.
        encode: `(space, addresses, first, count, places, block)`: makes bytes of a block.
    """

    load: Function
    store: Function
    store_states: Function
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
        "load": load,
        "store": store,
        "stochastic": stochastic,
        "joined": joined,
        "split": split,
        "signed_level": signed_level,
        "nonnegative_level": nonnegative_level,
        "single_at": single_at,
        "set_single": set_single,
        "whole_at": whole_at,
        "scratch": scratch,
    }
    coded = [i for i, kind in enumerate(kinds) if kind in CODED]
    units = {i: f"units[{n}]" for n, i in enumerate(coded)}
    values = [_value(kind, i, count - 1, units.get(i, "")) for i, kind in enumerate(kinds)]
    addresses = [f"whole_at(last, {n}) + 4 * offset" for n in range(len(coded))]
    scales = [f"single_at(places[{n}], block)" for n in range(len(coded))]
    kept_back = [f"set_single(space, {BLOCK * n} + j, state[{i - 2}])" for n, i in enumerate(coded)]

    def made(arguments: str, *lines: str) -> Function:
        return _function(arguments, lines, names)

    return Storage(
        made("addresses, strides, i, units", "v = load(addresses, strides, i)", f"return {_tuple(values)}"),
        made("addresses, strides, i, p, state, bits", *_storing(kinds, beside)),
        made("addresses, strides, i, p, state, bits", *_storing(kinds, beside, still=True)),
        made(
            "row, fields, offset", f"last = row + 8 * (fields - {len(coded)})", f"return {_tuple(addresses)}"
        ),
        made("places, block", f"return {_tuple(scales)}"),
        made("", f"return {'scratch()' if coded else 0}"),
        made("space, j, state", *kept_back, "return"),
        _encoding(kinds, coded),
    )


def _value(kind: str, i: int, beside: int, unit: str) -> str:
    """The expression for what rules see of tensor i, of the tensors `v` of an element."""
    return {
        "signed": f"signed_level(v[{i}]) * {unit}",
        "nonnegative": f"nonnegative_level(v[{i}]) * {unit}",
        "split16": f"joined(v[{i}], v[{beside}])",
        "split8": f"joined(v[{i}], v[{beside}] * 256)",
        "float32": f"v[{beside}]",
    }.get(kind, f"v[{i}]")


def _storing(kinds: Sequence[str], beside: str, still: bool = False) -> list[str]:
    """The lines that keep new values which are not in bytes; None stands for what is not written."""
    lines, kept, more = [], ["p", "None"], ["p"] if beside else []
    if still:
        kept, more = ["None", "None"], ["None"] if beside else []
    elif beside.startswith("split"):
        lines = ["high, low = split(p)"]
        kept[0], more = "high", ["low" if beside == "split16" else "low >> 8"]
    for n, kind in enumerate(kinds[2:]):
        value = "None" if kind in CODED else f"state[{n}]"
        kept.append(f"stochastic({value}, bits >> 16)" if kind == "stochastic" else value)
    return [*lines, f"store(addresses, strides, i, {_tuple([*kept, *more])})"]


def _encoding(kinds: Sequence[str], coded: Sequence[int]) -> Function:
    """What makes bytes of the scratch of a block, of one state after another."""
    calls = [
        f"e{n}(space + {4 * BLOCK * n}, addresses[{i}] + first, count, places[{n}], block)"
        for n, i in enumerate(coded)
    ]
    encoders = {f"e{n}": _encoder(kinds[i]) for n, i in enumerate(coded)}
    return _function("space, addresses, first, count, places, block", [*calls, "return"], encoders)


def _encoder(kind: str) -> Function:
    code, top, zero = CODE[kind], TOP[kind], np.float32(0)

    @njit(**INLINE)
    def encode(space, codes, count, place, block):
        largest = np.int32(0)
        for j in range(count):
            bits = magnitude(single_at(space, j))
            largest = bits if bits > largest else largest
        scale = scale_of(largest)
        inverse = top / scale if scale > zero else zero
        for j in range(count):
            set_byte(codes, j, code(single_at(space, j), inverse))
        set_single(place, block, scale)

    return cast(Function, encode)


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _function(arguments: str, lines: Sequence[str], names: dict[str, Any]) -> Function:
    """A function of some lines over names, compiled."""
    space: dict[str, Any] = {}
    exec("\n    ".join([f"def made({arguments}):", *lines]), dict(names), space)
    compiled: Function = njit(**INLINE)(space["made"])
    return compiled
