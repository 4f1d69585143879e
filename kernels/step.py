"""The one kernel: read a tile of parameters, gradients and state, step it, write it back.

One launch serves every tensor of a (device, dtype set, row class): a program takes one tile of the list.
"""

from .language import jit, tl
from .ops import divide
from .rows import mean_of_loop, mean_of_pieces
from .stages import measured, stepped
from .table import load_tile, scalars_of, store_tile, tile_of


@jit
def step_kernel(
    table,  # int64 [slots, FIELDS]
    tiles,  # int32 [programs, 3]
    scalars,  # COMPUTE [rows, COUNT]
    sums,  # COMPUTE [programs], row sums of pieces; read where MEAN == "pieces" only
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
    MEAN: tl.constexpr,  # where row means come from: "none", "tile", "loop", "pieces"
    DTYPES: tl.constexpr,  # of parameter, gradient, state...
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,  # inner dimensions of a strided slot, 0 where dense
    VECTOR: tl.constexpr,  # addresses are 16-byte aligned, rows multiples of VECTOR elements; else 1
    R: tl.constexpr,
    C: tl.constexpr,
):
    slot, row_block, column_block = tile_of(tiles)
    row = table + slot * FIELDS
    columns = tl.load(row + len(DTYPES) + 1)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    h = scalars_of(row, scalars, len(DTYPES), COUNT)
    r = row_block * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    mean = 0.0
    if MEAN == "loop":
        mean = mean_of_loop(
            row,
            r,
            lane,
            columns,
            h,
            RULE,
            VARIANT,
            MAXIMIZE,
            DECAY,
            CENTRALIZE,
            DTYPES,
            COMPUTE,
            D,
            VECTOR,
            C,
        )
        for start in range(0, columns, C):
            c = start + lane
            mask, values = load_tile(row, r, c, columns, DTYPES, COMPUTE, D, VECTOR)
            p, state = stepped(
                values[0],
                values[1],
                values[2:],
                h,
                mean,
                RULE,
                VARIANT,
                MAXIMIZE,
                DECAY,
                CENTRALIZE,
            )
            store_tile(row, r, c, mask, columns, p, state, DTYPES, D, VECTOR)
    else:
        c = column_block * C + lane
        mask, values = load_tile(row, r, c, columns, DTYPES, COMPUTE, D, VECTOR)
        if MEAN == "tile":
            x = measured(values[0], values[1], values[2:], h, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE)
            total = tl.sum(tl.where(mask, x, 0), axis=1)
            mean = divide(total, columns.to(COMPUTE))[:, None]
        elif MEAN == "pieces":
            mean = mean_of_pieces(sums, column_block, columns, COMPUTE, C)
        p, state = stepped(
            values[0], values[1], values[2:], h, mean, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE
        )
        store_tile(row, r, c, mask, columns, p, state, DTYPES, D, VECTOR)
