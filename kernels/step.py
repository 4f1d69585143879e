"""The one kernel: read a tile of parameters, gradients and state, step it, write it back.

One launch serves every tensor of a (device, dtype set, row class): a program takes one tile of the list.
"""

from .language import jit, tl
from .ops import divide
from .rows import HINTS, mean_of_pieces, mean_of_ranks, project_row, row_total, square_total, sum_of_loop
from .stages import averaged, measured, projected, rounded, stepped
from .table import (
    columns_of,
    load_tile,
    noise_tile,
    rounding_tile,
    scalars_of,
    store_tile,
    tile_of,
    totals_of,
)


@jit
def step_kernel(
    table,  # int64 [slots, FIELDS]
    grads,  # int64 [slots], addresses
    tiles,  # int32 [programs, 3]
    scalars,  # COMPUTE [rows, COUNT]; where COUNT is 0 the one row, a tuple of fp32
    sums,  # COMPUTE [2, programs], of pieces: what row means are of; squares of the new parameters
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    REDUCTION: tl.constexpr,  # how rows are added up: "none", "tile", "loop", "pieces", "ranks"
    DTYPES: tl.constexpr,  # of parameter, gradient, state...
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,  # inner dimensions of a strided slot, 0 where dense
    QUADS: tl.constexpr,  # rows are multiples of four elements, or there is one
    VECTOR: tl.constexpr,  # addresses are 16-byte aligned, rows multiples of VECTOR elements; else 1
    FACTORED: tl.constexpr,  # rows of the gradient have factors
    R: tl.constexpr,
    C: tl.constexpr,
):
    slot, row_block, column_block = tile_of(tiles, tl.program_id(0))
    row, grad = table + slot * FIELDS, tl.load(grads + slot)
    columns = columns_of(row, len(DTYPES), VECTOR)
    h = scalars_of(row, scalars, len(DTYPES), COUNT)
    if FLAGS.skips:  # noqa: SIM102 (the one is known when compiled)
        if h[8] != 0:
            return
    r = row_block * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    mean = 0.0
    if REDUCTION == "loop" or REDUCTION == "ranks":
        # Not where strides take the registers that a hint needs.
        HINTED: tl.constexpr = HINTS and REDUCTION == "loop" and FLAGS.centralize != "none" and D == 0
        KEEP: tl.constexpr = "evict_last" if HINTED else ""
        DONE: tl.constexpr = "evict_first" if HINTED else ""
        WRITTEN: tl.constexpr = "" if FLAGS.project else DONE  # projection may walk the row once more
        if FLAGS.centralize != "none":
            if REDUCTION == "ranks":
                mean = mean_of_ranks(row, r, COMPUTE, len(DTYPES))
            else:
                total = sum_of_loop(
                    *(row, grad, r, lane, columns, h, RULE, FLAGS, DTYPES, COMPUTE),
                    *(D, QUADS, VECTOR, FACTORED, C, KEEP),
                )
                mean = divide(total, columns.to(COMPUTE))
        squares = tl.zeros([1, C], COMPUTE)
        for start in range(0, columns, C):
            c = start + lane
            mask, values = load_tile(row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, DONE)
            z = noise_tile(row, r, start, h, FLAGS, DTYPES, COMPUTE, C, QUADS)
            p, state = stepped(values[0], values[1], values[2:], h, z, mean, RULE, FLAGS)
            if FLAGS.project:
                squares += tl.where(mask, p * p, 0)
            p = rounded(p, rounding_tile(row, r, start, h, FLAGS, DTYPES, C, QUADS), FLAGS, DTYPES[0])
            if not FLAGS.project:
                state = averaged(p, state, h, FLAGS, DTYPES[0])
            store_tile(row, r, c, mask, columns, p, state, DTYPES, D, VECTOR, WRITTEN)
        if FLAGS.project:
            total = tl.sum(tl.sum(squares, axis=1), axis=0)
            if REDUCTION == "ranks":
                tl.store(totals_of(row, r, len(DTYPES)), total.to(tl.float64) + tl.zeros([R], tl.float64))
            else:
                project_row(
                    row, grad, r, lane, columns, total, h, FLAGS, DTYPES, COMPUTE, D, QUADS, VECTOR, C
                )
    else:
        c = column_block * C + lane
        mask, values = load_tile(row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, "")
        z = noise_tile(row, r, column_block * C, h, FLAGS, DTYPES, COMPUTE, C, QUADS)
        if FLAGS.centralize != "none":
            if REDUCTION == "tile":
                x = measured(values[0], values[1], values[2:], h, z, RULE, FLAGS)
                mean = divide(row_total(x, mask), columns.to(COMPUTE))
            else:
                mean = mean_of_pieces(sums, column_block, columns, COMPUTE, C)
        p, state = stepped(values[0], values[1], values[2:], h, z, mean, RULE, FLAGS)
        if FLAGS.project:
            if REDUCTION == "tile":
                p = projected(p, row_total(p * p, mask), h)
            else:
                square_total(sums, p, mask)
        bits = rounding_tile(row, r, column_block * C, h, FLAGS, DTYPES, C, QUADS)
        p = rounded(p, bits, FLAGS, DTYPES[0])
        if not FLAGS.project or REDUCTION == "tile":
            state = averaged(p, state, h, FLAGS, DTYPES[0])
        store_tile(row, r, c, mask, columns, p, state, DTYPES, D, VECTOR, "")
