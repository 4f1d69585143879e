"""Norms of whole tensors: a launch leaves sums of squares, one adds them up, the step takes a factor of them.

`squares_kernel` computes what the step will, writes nothing of it, and leaves the squares of what a rule's
`squares` names, a place a program. `totals_kernel` adds up those of each slot in a fixed order, so that a
slot's sums lie together, and can be added up over ranks; where they lie is the last number of its geometry.
Every program of the step then takes the rule's `factor` of them.

Squares are taken and added up in fp64, in which those of fp32 are exact: however a tensor is cut into tiles,
its sums are the same but for the last bits of 53, of which the fp32 factor keeps 24.
SPEC is a `Spec` of spec.py throughout; it has SUMS sums a slot.
"""

from typing import Any, NamedTuple

from .language import jit, tl
from .rows import known_of_row, known_of_tile, sums_at
from .stages import normed
from .table import load_tile, noise_tile, row_of

_LANES = tl.constexpr(256)  # partial sums at a time


class Partials(NamedTuple):
    """What squares_kernel and totals_kernel share."""

    pieces: Any  # `sums` of step_kernel
    squares: Any  # fp64 [programs, SUMS]


@jit
def squares_kernel(table, grads, tiles, scalars, sums, SPEC: tl.constexpr):
    """Leaves sums of squares, SUMS a program. Arguments as step_kernel's, but for sums: `Partials`."""
    SUMS: tl.constexpr = SPEC.SUMS
    row = row_of(table, grads, tiles, scalars, SPEC)
    place = sums.squares + tl.program_id(0).to(tl.int64) * SUMS
    if SPEC.REDUCTION == "loop" or SPEC.REDUCTION == "ranks":
        C: tl.constexpr = SPEC.C
        known = known_of_row(row, SPEC)
        totals = nothing(SUMS, C)
        for start in range(0, row.columns, C):
            cells, values = load_tile(row, start, SPEC, "")
            found = normed(values, row.h, noise_tile(row, start, SPEC), known, SPEC)
            totals = with_squares(totals, found, cells.mask)
        leave(place, totals)
    else:
        start = row.piece * SPEC.C
        cells, values = load_tile(row, start, SPEC, "")
        z = noise_tile(row, start, SPEC)
        known = known_of_tile(row, (values, cells.mask), z, sums.pieces, SPEC)
        found = normed(values, row.h, z, known, SPEC)
        leave(place, with_squares(nothing(SUMS, 1), found, cells.mask))


@jit
def nothing(COUNT: tl.constexpr, C: tl.constexpr):
    """COUNT blocks [1, C] of zeros, fp64."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros([1, C], tl.float64),)
    return blocks


@jit
def with_squares(totals, values, mask):
    """Blocks with the squares of others added where the mask is."""
    sums = ()
    for i in tl.static_range(len(values)):
        x = tl.where(mask, values[i], 0).to(tl.float64)
        sums = sums + (totals[i] + x * x,)
    return sums


@jit
def leave(place, totals):
    """Leaves the sum of each block, side by side."""
    for i in tl.static_range(len(totals)):
        tl.store(place + i, tl.sum(tl.sum(totals[i], axis=1), axis=0))


@jit
def totals_kernel(table, grads, firsts, scalars, sums, SPEC: tl.constexpr):
    """Adds up the sums of a slot, and beside them its number of elements: one program.

    Arguments as squares_kernel's, but for firsts: int32 [slots + 1], where the programs of each slot begin.
    """
    SUMS: tl.constexpr = SPEC.SUMS
    slot = tl.program_id(0).to(tl.int64)
    base = table + slot * SPEC.FIELDS
    begin, end = tl.load(firsts + slot), tl.load(firsts + slot + 1)
    place = sums_at(base, SPEC)
    for i in tl.static_range(SUMS):
        total = tl.zeros([_LANES], tl.float64)
        for start in range(begin, end, _LANES):
            lane = start + tl.arange(0, _LANES)
            here = sums.squares + lane.to(tl.int64) * SUMS + i
            total += tl.load(here, lane < end, other=0)
        tl.store(place + i, tl.sum(total, axis=0))
    count = tl.load(base + len(SPEC.DTYPES)) * tl.load(base + len(SPEC.DTYPES) + 1)
    tl.store(place + SUMS, count.to(tl.float64))
