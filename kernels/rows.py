"""Row means for rows that a tile cannot hold.

`mean_of_loop`: one program walks its row twice; the second walk finds the gradient in the L2 cache.
`row_sums_kernel` and `mean_of_pieces`: rows too long, or too few, for that. A first launch leaves the sum
of every tile in a place of its own, the step kernel adds those of its row in a fixed order.

No atomics: a result never depends on which program ran first. Only what the mean is taken of is read
twice: the gradient (with coupled decay the parameter too; with `centralize="update"` also the state).
What `measured` does not use is never loaded: the compiler drops loads without a user.
"""

from .language import jit, tl
from .ops import divide
from .stages import measured
from .table import load_tile, scalars_of, tile_of


@jit
def mean_of_loop(
    row,
    r,
    lane,
    columns,
    h,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    C: tl.constexpr,
):
    """Mean of the measured quantity over row r [1], C columns (lane [C]) at a time: a scalar."""
    totals = tl.zeros([1, C], COMPUTE)
    for start in range(0, columns, C):
        mask, values = load_tile(row, r, start + lane, columns, DTYPES, COMPUTE, D, VECTOR)
        x = measured(values[0], values[1], values[2:], h, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE)
        totals += tl.where(mask, x, 0)
    return divide(tl.sum(tl.sum(totals, axis=1), axis=0), columns.to(COMPUTE))


@jit
def row_sums_kernel(
    table,
    tiles,
    scalars,
    sums,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
    MEAN: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """sums[program] = sum over its tile [1, C] of the measured quantity. Arguments as step_kernel's."""
    slot, row_block, column_block = tile_of(tiles)
    row = table + slot * FIELDS
    columns = tl.load(row + len(DTYPES) + 1)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    h = scalars_of(row, scalars, len(DTYPES), COUNT)
    r = row_block * R + tl.arange(0, R)
    c = column_block * C + tl.arange(0, C)
    mask, values = load_tile(row, r, c, columns, DTYPES, COMPUTE, D, VECTOR)
    x = measured(values[0], values[1], values[2:], h, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE)
    total = tl.sum(tl.sum(tl.where(mask, x, 0), axis=1), axis=0)
    tl.store(sums + tl.program_id(0), total)


@jit
def mean_of_pieces(sums, column_block, columns, COMPUTE: tl.constexpr, C: tl.constexpr):
    """Mean of this program's row: the pieces of a row lie side by side in `sums`."""
    first = sums + tl.program_id(0) - column_block
    pieces = tl.cdiv(columns, C)
    lane = tl.arange(0, 128)
    total = tl.zeros([128], COMPUTE)
    for start in range(0, pieces, 128):
        total += tl.load(first + start + lane, start + lane < pieces, other=0)
    return divide(tl.sum(total, axis=0), columns.to(COMPUTE))
