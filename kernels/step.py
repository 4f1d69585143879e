"""The one kernel: read a tile of parameters, gradients and state, step it, write it back.

One launch serves every tensor of a (device, dtype set, row class): a program takes one tile of the list.
"""

from .language import jit, tl
from .observed import leave_observed, nothing_observed, with_observed
from .rows import (
    HINTS,
    hinted,
    known_of_row,
    known_of_tile,
    leave_total,
    project_row,
    row_total,
    square_total,
)
from .stages import averaged, projected, rounded, stepped
from .table import load_tile, noise_tile, rounding_tile, row_of, store_tile


@jit
def step_kernel(
    table,  # int64 [slots, FIELDS]
    grads,  # int64 [slots], addresses
    tiles,  # int32 [programs, 3]
    scalars,  # COMPUTE [rows, COUNT]; where COUNT is 0 the one row, a tuple of fp32
    sums,  # COMPUTE [2, programs], of pieces: what row means are of; squares of the new parameters;
    # `Observing`, where the step is measured
    SPEC: tl.constexpr,  # Spec
):
    """Steps the rows or the tile of this program."""
    row = row_of(table, grads, tiles, scalars, SPEC)
    if SPEC.FLAGS.skips:  # noqa: SIM102 (the one is known when compiled)
        if row.h.skip != 0:
            return
    if SPEC.REDUCTION == "loop" or SPEC.REDUCTION == "ranks":
        step_rows(row, sums, SPEC)
    else:
        step_tile(row, sums, SPEC)


@jit
def step_rows(row, sums, SPEC: tl.constexpr):
    """Steps a row [1] piece by piece, C columns at a time."""
    C: tl.constexpr = SPEC.C
    FLAGS: tl.constexpr = SPEC.FLAGS
    DONE: tl.constexpr = hinted("evict_first", SPEC, HINTS)
    WRITTEN: tl.constexpr = "" if FLAGS.project else DONE  # projection may walk the row once more
    known = known_of_row(row, SPEC)
    squares = tl.zeros([1, C], SPEC.COMPUTE)
    if FLAGS.statistics:
        seen = nothing_observed(C, SPEC)
    for start in range(0, row.columns, C):
        cells, values = load_tile(row, start, SPEC, DONE)
        p, state = stepped(values, row.h, noise_tile(row, start, SPEC), known, SPEC)
        if FLAGS.project:
            squares += tl.where(cells.mask, p * p, 0)
        bits = rounding_tile(row, start, SPEC)
        p = rounded(p, bits, SPEC)
        if FLAGS.statistics:
            seen = with_observed(seen, values, p, cells.mask, SPEC)
        if not FLAGS.project:
            state = averaged(p, state, row.h, SPEC)
        store_tile(row, cells, (p,) + state, bits, SPEC, WRITTEN)
    if FLAGS.statistics:
        leave_observed(sums, seen, SPEC)
    if FLAGS.project:
        total = tl.sum(tl.sum(squares, axis=1), axis=0)
        if SPEC.REDUCTION == "ranks":
            leave_total(row, total, SPEC)
        else:
            project_row(row, total, SPEC)


@jit
def step_tile(row, sums, SPEC: tl.constexpr):
    """Steps a tile [R, C]: whole rows, or pieces of rows of which `sums` has what is left of them all."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    start = row.piece * SPEC.C
    pieces = sums
    if FLAGS.statistics:
        pieces = sums.pieces
    cells, values = load_tile(row, start, SPEC, "")
    z = noise_tile(row, start, SPEC)
    known = known_of_tile(row, (values, cells.mask), z, pieces, SPEC)
    p, state = stepped(values, row.h, z, known, SPEC)
    if FLAGS.project:
        if SPEC.REDUCTION == "tile":
            p = projected(p, row_total(p * p, cells.mask), row.h)
        else:
            square_total(pieces, p, cells.mask)
    bits = rounding_tile(row, start, SPEC)
    p = rounded(p, bits, SPEC)
    if FLAGS.statistics:
        leave_observed(sums, with_observed(nothing_observed(1, SPEC), values, p, cells.mask, SPEC), SPEC)
    if not FLAGS.project or SPEC.REDUCTION == "tile":
        state = averaged(p, state, row.h, SPEC)
    store_tile(row, cells, (p,) + state, bits, SPEC, "")
