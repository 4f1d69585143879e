"""The one kernel: read a tile of parameters, gradients and state, step it, write it back.

One launch serves every tensor of a (device, dtype set, row class): a program takes one tile of the list.
"""

from .language import jit, tl
from .ops import divide
from .rows import mean_of_pieces
from .stages import measured, stepped
from .table import load_tile, scalars_of, store_tile, tile_of


@jit
def step_kernel(
    table,  # int64 [slots, FIELDS]
    tiles,  # int32 [programs, 3]
    scalars,  # COMPUTE [rows, COUNT]
    sums,  # COMPUTE [programs], row sums of pieces; read where PIECES only
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
    DTYPES: tl.constexpr,  # of parameter, gradient, state...
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,  # inner dimensions of a strided slot, 0 where dense
    VECTOR: tl.constexpr,  # every address is 16-byte aligned, every row a multiple of VECTOR elements
    R: tl.constexpr,
    C: tl.constexpr,
    PIECES: tl.constexpr,  # rows are longer than a tile: their sums come from row_sums_kernel
):
    slot, row_block, column_block = tile_of(tiles)
    row = table + slot * FIELDS
    K: tl.constexpr = len(DTYPES)
    columns = tl.load(row + K + 1)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    h = scalars_of(row, scalars, K, COUNT)
    r = row_block * R + tl.arange(0, R)
    c = column_block * C + tl.arange(0, C)
    mask = (r < tl.load(row + K))[:, None] & (c < columns)[None, :]
    values = load_tile(row, r, c, mask, columns, DTYPES, COMPUTE, D, VECTOR)
    p = values[0]
    g = values[1]
    mean = 0.0
    if CENTRALIZE != "none":
        if PIECES:
            mean = mean_of_pieces(sums, column_block, columns, COMPUTE, C)
        else:
            x = measured(p, g, values[2:], h, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE)
            total = tl.sum(tl.where(mask, x, 0), axis=1)
            mean = divide(total, columns.to(COMPUTE))[:, None]
    p, state = stepped(p, g, values[2:], h, mean, RULE, VARIANT, MAXIMIZE, DECAY, CENTRALIZE)
    store_tile(row, r, c, mask, columns, (p, g) + state, DTYPES, D, VECTOR)
