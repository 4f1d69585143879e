"""Row sums: in a tile, and for rows that a tile cannot hold.

`mean_of_loop`, `project_row`: one program walks its row again; the other walk finds it in the L2 cache.
`row_sums_kernel`, `mean_of_pieces`, `project_kernel`: rows too long, or too few, for that. A launch leaves
the sum of every tile in a place of its own, the next one adds those of its row in a fixed order.
The same kernels where a row lies on several ranks: a program walks what is here of it and leaves its sum,
which the host adds up over ranks before the next launch.

No atomics: a result never depends on which program ran first. Only what the mean is taken of is read
twice: the gradient (with coupled decay the parameter too; with `centralize="update"` also the state).
What `measured` does not use is never loaded: the compiler drops loads without a user.
"""

from .language import jit, tl
from .ops import divide, sqrt
from .stages import averaged, measured, projected, rounded
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

# Of a row that one program walks twice, the caches keep what the second walk reads again, and let go first
# of what it reads and writes for the last time: else parameters and states would push the gradients out.
HINTS = tl.constexpr(True)


@jit
def row_total(x, mask):
    """Sums [R, 1] of the rows of a tile [R, C]."""
    return tl.sum(tl.where(mask, x, 0), axis=1)[:, None]


@jit
def sum_of_loop(
    row,
    grad,
    r,
    lane,
    columns,
    h,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    FACTORED: tl.constexpr,
    C: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Sum of the measured quantity over row r [1], C columns (lane [C]) at a time: a scalar."""
    totals = tl.zeros([1, C], COMPUTE)
    for start in range(0, columns, C):
        c = start + lane
        mask, values = load_tile(row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, EVICT)
        z = noise_tile(row, r, start, h, FLAGS, DTYPES, COMPUTE, C, QUADS)
        x = measured(values[0], values[1], values[2:], h, z, RULE, FLAGS)
        totals += tl.where(mask, x, 0)
    return tl.sum(tl.sum(totals, axis=1), axis=0)


@jit
def mean_of_ranks(row, r, COMPUTE: tl.constexpr, K: tl.constexpr):
    """Mean of row r [1], of which the sum over ranks is known: a scalar. The whole row is K + 9 long."""
    total = tl.sum(tl.load(totals_of(row, r, K)), axis=0).to(COMPUTE)
    return divide(total, tl.load(row + K + 9).to(COMPUTE))


@jit
def project_row(
    row,
    grad,
    r,
    lane,
    columns,
    squares,
    h,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    C: tl.constexpr,
):
    """Finishes row r [1], just written by this program: scaled down to its largest norm, if it must be."""
    if must_finish(squares, h, FLAGS):
        tl.debug_barrier()  # what other threads wrote is read
        for start in range(0, columns, C):
            finish_tile(
                row, grad, r, start, lane, columns, squares, h, FLAGS, DTYPES, COMPUTE, D, QUADS, VECTOR, C
            )


@jit
def must_finish(squares, h, FLAGS: tl.constexpr):
    """Whether a row is walked again: most need not, but an average is of finished parameters."""
    if FLAGS.ema:
        return True
    else:
        return sqrt(squares) > h[3]


@jit
def finish_tile(
    row,
    grad,
    r,
    start,
    lane,
    columns,
    squares,
    h,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    C: tl.constexpr,
):
    """Projects and finishes a tile [1, C] of a row of which the norm had to be known first."""
    c = start + lane
    mask, values = load_tile(row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, False, "")
    bits = rounding_tile(row, r, start, h, FLAGS, DTYPES, C, QUADS)
    p = rounded(projected(values[0], squares, h), bits, FLAGS, DTYPES[0])
    if FLAGS.ema:
        state = averaged(p, values[2:3], h, FLAGS, DTYPES[0])
        store_tile(row, r, c, mask, columns, p, state, DTYPES, D, VECTOR, "")
    else:
        store_tile(row, r, c, mask, columns, p, (), DTYPES, D, VECTOR, "")


@jit
def row_sums_kernel(
    table,
    grads,
    tiles,
    scalars,
    sums,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    REDUCTION: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    FACTORED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Sums of the measured quantity. Arguments as step_kernel's.

    sums[0, program] = that over its tile [1, C]; over its row, where ranks share that, in the row's place.
    """
    slot, row_block, column_block = tile_of(tiles, tl.program_id(0))
    row, grad = table + slot * FIELDS, tl.load(grads + slot)
    columns = columns_of(row, len(DTYPES), VECTOR)
    h = scalars_of(row, scalars, len(DTYPES), COUNT)
    r = row_block * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    if REDUCTION == "ranks":
        total = sum_of_loop(
            row, grad, r, lane, columns, h, RULE, FLAGS, DTYPES, COMPUTE, D, QUADS, VECTOR, FACTORED, C, ""
        )
        tl.store(totals_of(row, r, len(DTYPES)), total.to(tl.float64) + tl.zeros([R], tl.float64))
    else:
        c = column_block * C + lane
        mask, values = load_tile(row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, "")
        z = noise_tile(row, r, column_block * C, h, FLAGS, DTYPES, COMPUTE, C, QUADS)
        x = measured(values[0], values[1], values[2:], h, z, RULE, FLAGS)
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.where(mask, x, 0), axis=1), axis=0))


@jit
def square_total(sums, p, mask):
    """sums[1, program] = sum of squares over its tile p [1, C]."""
    total = tl.sum(tl.sum(tl.where(mask, p * p, 0), axis=1), axis=0)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), total)


@jit
def project_kernel(
    table,
    grads,
    tiles,
    scalars,
    sums,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    REDUCTION: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    QUADS: tl.constexpr,
    VECTOR: tl.constexpr,
    FACTORED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Finishes rows, or their pieces, of which step_kernel has left the norms. Arguments as there."""
    slot, row_block, column_block = tile_of(tiles, tl.program_id(0))
    row, grad = table + slot * FIELDS, tl.load(grads + slot)
    columns = columns_of(row, len(DTYPES), VECTOR)
    h = scalars_of(row, scalars, len(DTYPES), COUNT)
    if FLAGS.skips:  # noqa: SIM102 (the one is known when compiled)
        if h[8] != 0:
            return
    r = row_block * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    if REDUCTION == "ranks":
        squares = tl.sum(tl.load(totals_of(row, r, len(DTYPES))), axis=0).to(COMPUTE)
        project_row(row, grad, r, lane, columns, squares, h, FLAGS, DTYPES, COMPUTE, D, QUADS, VECTOR, C)
    else:
        squares = total_of_pieces(sums + tl.num_programs(0), column_block, columns, COMPUTE, C)
        if must_finish(squares, h, FLAGS):
            start = column_block * C
            finish_tile(
                row, grad, r, start, lane, columns, squares, h, FLAGS, DTYPES, COMPUTE, D, QUADS, VECTOR, C
            )


@jit
def total_of_pieces(sums, column_block, columns, COMPUTE: tl.constexpr, C: tl.constexpr):
    """Sum over this program's row: the pieces of a row lie side by side in `sums`."""
    first = sums + tl.program_id(0) - column_block
    pieces = tl.cdiv(columns, C)
    lane = tl.arange(0, 128)
    total = tl.zeros([128], COMPUTE)
    for start in range(0, pieces, 128):
        total += tl.load(first + start + lane, start + lane < pieces, other=0)
    return tl.sum(total, axis=0)


@jit
def mean_of_pieces(sums, column_block, columns, COMPUTE: tl.constexpr, C: tl.constexpr):
    """Mean over this program's row."""
    return divide(total_of_pieces(sums, column_block, columns, COMPUTE, C), columns.to(COMPUTE))
