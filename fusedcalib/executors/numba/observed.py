"""Statistics of a step in numba loops: what an element adds, and the numbers of tiles added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from ...kernels.observed import OBSERVED
from ...layout.buckets import Bucket
from ..source import Function
from .memory import double_at, set_double
from .values import INNER

ADD_FREELY = {"reassoc", "nsz"}  # as in runs.py
SIZE = 8 * OBSERVED  # bytes


class Observer(NamedTuple):
    """`nothing()`, `taken_in(totals, values, p)` of an element, `leave(place, totals)` added to a place."""

    nothing: Function
    taken_in: Function
    leave: Function


@intrinsic
def as_other(typing, x):
    """The bits of a float as an integer, those of an integer as a float."""
    own = {32: (types.int32, types.float32), 64: (types.int64, types.float64)}[x.bitwidth]
    other = own[isinstance(x, types.Integer)]

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(other))

    return other(x), codegen


@njit(**INNER)
def _none():
    return ()


@njit(**INNER)
def _unchanged(totals, values, p):
    return totals


@njit(**INNER)
def _leave_nothing(place, totals):
    return


OFF = Observer(*cast(Any, (_none, _unchanged, _leave_nothing)))


def observer(on: bool, observed: Function, real: Any) -> Observer:
    """Of a step whose numbers are `real`; of one that is not measured, nothing."""
    if not on:
        return OFF
    whole, infinity = (np.int32, 0x7F800000) if real.bitwidth == 32 else (np.int64, 0x7FF0000000000000)
    double = np.float64

    @njit(**INNER)
    def nothing():
        return (0.0, 0.0, 0.0, 0.0, 0.0, 0.0), whole(0)

    @njit(**INNER, fastmath=ADD_FREELY)
    def added(totals, gradient, change, weight, same):
        sums, largest = totals
        squares, changes, weights, products, unmoved, nonfinite = sums
        g, u, w = double(gradient), double(change), double(weight)
        size = as_other(abs(gradient))
        sums = (
            squares + g * g,
            changes + u * u,
            weights + w * w,
            products + g * u,
            unmoved + (1.0 if same else 0.0),
            nonfinite + (1.0 if size >= infinity else 0.0),
        )
        return sums, size if size > largest else largest

    # What is added is computed without fastmath, which a function hands down to those that it calls.
    @njit(**INNER)
    def taken_in(totals, values, p):
        gradient, change, weight, same = observed(values, p)
        return added(totals, gradient, change, weight, same)

    @njit(**INNER)
    def leave(place, totals):
        sums, largest = totals
        for i in range(OBSERVED - 1):
            set_double(place, i, double_at(place + 8 * i)[0] + sums[i])
        before, now = double_at(place + SIZE - 8)[0], double(as_other(largest))
        set_double(place, OBSERVED - 1, now if before <= now or now != now else before)

    return Observer(*cast(Any, (nothing, taken_in, leave)))


class Partials:
    """Room for the numbers of each tile of a bucket, and what they come to a slot."""

    def __init__(self, bucket: Bucket) -> None:
        self._firsts = np.searchsorted(bucket.tiles[:, 0], np.arange(len(bucket.slots)))
        self._whole, self._places = as_one(bucket.statistics)
        self._values = np.zeros((len(bucket.tiles), OBSERVED))

    def cleared(self) -> int:
        """The address of the room, which has zeros now."""
        self._values.fill(0)
        return self._values.ctypes.data

    def add_up(self) -> None:
        """Leaves those of each slot."""
        values, last = self._values, OBSERVED - 1
        self._whole[self._places[:, :last]] = np.add.reduceat(values[:, :last], self._firsts)
        self._whole[self._places[:, last]] = np.maximum.reduceat(values[:, last], self._firsts)


def as_one(parts: Sequence[Tensor]) -> tuple[Any, Any]:
    """The memory in which all of them lie, and where: one assignment leaves them all."""
    whole = torch.empty(0, dtype=torch.float64).set_(parts[0].untyped_storage()).numpy()
    places = [range(t.storage_offset(), t.storage_offset() + len(t)) for t in parts]
    return whole, np.array([*map(list, places)])
