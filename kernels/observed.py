"""Statistics of a step, measured in its own pass: partial sums a program, added up a slot by one launch more.

SUMS numbers: the squares of the gradient, of the change of the parameter and of the parameter, the products
of gradient and change, all in fp64; how many weights stayed as they were; how many gradients are not finite;
last the largest magnitude of a gradient, NaN if one is. A step that is left out leaves them as they are.
SPEC is a `Spec` of spec.py throughout.
"""

from typing import Any, NamedTuple

from .language import constexpr_function, jit, tl
from .ops import absolute
from .storage import stored

OBSERVED = 7  # numbers
_SUMS = tl.constexpr(OBSERVED - 1)  # of them are added up
_LANES = tl.constexpr(256)  # partial sums at a time


class Observing(NamedTuple):
    """What step_kernel and observed_kernel share where a step is measured."""

    pieces: Any  # `sums` of a step that is not
    partials: Any  # fp64 [programs, OBSERVED]
    places: Any  # int64 [slots], addresses of fp64 [OBSERVED]


@jit
def observed(values, p, SPEC: tl.constexpr):
    """Gradient, change of the parameter, parameter, whether it is the same; p: as `rounded` gives it."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    DTYPE: tl.constexpr = SPEC.DTYPES[0]
    if FLAGS.master == "none":
        p = stored(p, DTYPE)
    return values[1], p - values[0], p, p == values[0]


@constexpr_function
def whole_of(dtype):
    """The integers that order magnitudes of a dtype as they are: NaN comes last."""
    return tl.int64 if dtype == tl.float64 else tl.int32


@constexpr_function
def infinity_of(dtype):
    """Infinity as such an integer."""
    return 0x7FF0000000000000 if dtype == tl.float64 else 0x7F800000


@jit
def nothing_observed(C: tl.constexpr, SPEC: tl.constexpr):
    """Blocks [1, C] of zeros: fp64, and last integers."""
    WHOLE: tl.constexpr = whole_of(SPEC.COMPUTE)
    blocks = ()
    for _ in tl.static_range(_SUMS):
        blocks = blocks + (tl.zeros([1, C], tl.float64),)
    return blocks + (tl.zeros([1, C], WHOLE),)


@jit
def with_observed(totals, values, p, mask, SPEC: tl.constexpr):
    """Blocks with those of a tile taken in where the mask is."""
    WHOLE: tl.constexpr = whole_of(SPEC.COMPUTE)
    INFINITY: tl.constexpr = infinity_of(SPEC.COMPUTE)
    gradient, change, weight, same = observed(values, p, SPEC)
    g = tl.where(mask, gradient, 0).to(tl.float64)
    u = tl.where(mask, change, 0).to(tl.float64)
    w = tl.where(mask, weight, 0).to(tl.float64)
    size = tl.where(mask, absolute(gradient).to(WHOLE, bitcast=True), 0)
    return (
        totals[0] + g * g,
        totals[1] + u * u,
        totals[2] + w * w,
        totals[3] + g * u,
        totals[4] + (same & mask).to(tl.float64),
        totals[5] + (size >= INFINITY).to(tl.float64),
        tl.maximum(totals[6], size),
    )


@jit
def leave_observed(sums, totals, SPEC: tl.constexpr):
    """Leaves those of a program in its place."""
    place = sums.partials + tl.program_id(0).to(tl.int64) * (_SUMS + 1)
    for i in tl.static_range(_SUMS):
        tl.store(place + i, tl.sum(tl.sum(totals[i], axis=1), axis=0))
    size = tl.max(tl.max(totals[_SUMS], axis=1), axis=0)
    tl.store(place + _SUMS, size.to(SPEC.COMPUTE, bitcast=True).to(tl.float64))


@jit
def observed_kernel(table, grads, firsts, scalars, sums, SPEC: tl.constexpr):
    """Adds up those of a slot: one program. firsts: int32 [slots + 1], where the programs of each begin."""
    slot = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(firsts + slot), tl.load(firsts + slot + 1)
    place = tl.load(sums.places + slot).to(tl.pointer_type(tl.float64))
    for i in tl.static_range(_SUMS + 1):
        total, largest = tl.zeros([_LANES], tl.float64), tl.zeros([_LANES], tl.int64)
        for start in range(begin, end, _LANES):
            lane = start + tl.arange(0, _LANES)
            here = sums.partials + lane.to(tl.int64) * (_SUMS + 1) + i
            found = tl.load(here, lane < end, other=0)
            total += found
            largest = tl.maximum(largest, found.to(tl.int64, bitcast=True))
        if i < _SUMS:
            tl.store(place + i, tl.sum(total, axis=0))
        else:
            tl.store(place + i, tl.max(largest, axis=0).to(tl.float64, bitcast=True))
