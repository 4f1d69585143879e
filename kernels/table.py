"""The multi-tensor table, device side: from a tile of the list to pointers, offsets and masks.

Row of the table (int64), K tensors per slot (parameter, gradient, state...), D inner dimensions:

    [0, K)             addresses in bytes; that of the gradient only for the CPU loop: gradients move, so
                       a GPU has their addresses in an array of their own, `grads`
    K ... K + 2        rows, columns of the slot; its row in the table of scalars
    K + 3, K + 4       rows, columns of its tiles (the CPU loop reads them; a GPU tile is a constant)
    K + 5 ... K + 7    its words of randomness: stream, key (two)
    K + 8, K + 9       the index of its first element there, and from one row to the next
    K + 10             where its rows lie on several ranks: the address of fp64 [rows], sums over those
    K + 11             where its rows have factors, or states: the address of COMPUTE [rows]
    K + 12 ...         only where D > 0: D sizes, K row strides, then K strides for each inner dimension
    ...                only where a rule wants norms of the whole tensor: the address of sums, see totals.py
    ...                addresses of fp32 scales [rows, blocks] of the states that have such, see storage.py

A slot with D == 0 is dense: all its tensors lie in one storage order, element (row, column) at row * columns
+ column in each. Otherwise a column is an index over the inner dimensions. A tile is int32 (slot, row block,
column block). SPEC is a `Spec` of spec.py throughout.
"""

from typing import Any, NamedTuple

from .language import jit, tl
from .philox import ON_ROUNDING, ON_WEIGHTS, Words, normal_tile, word, word_tile
from .stages import SHARED, Numbers
from .storage import (
    BLOCK,
    coded,
    decode,
    decoded,
    encode,
    joined,
    kind_of,
    scales_at,
    scales_of,
    split,
    stochastic,
    values_of,
)

GEOMETRY = 12
_GEOMETRY = tl.constexpr(GEOMETRY)
_BLOCK = tl.constexpr(BLOCK)
_SHARED = tl.constexpr(SHARED)


class Row(NamedTuple):
    """What a program works on: some rows of a slot."""

    base: Any  # the slot's row of the table
    grad: Any  # address of its gradient
    first: Any  # row
    piece: Any  # column block of the tile
    columns: Any  # of the slot
    h: Any  # Numbers


class Cells(NamedTuple):
    """Where in its rows a program reads and writes."""

    r: Any  # rows [R]
    c: Any  # columns [C]
    mask: Any  # [R, C], which of them there are
    start: Any  # the first column


@jit
def row_of(table, grads, tiles, scalars, SPEC: tl.constexpr):
    """What this program works on. Arguments as step_kernel's."""
    slot, row_block, piece = tile_of(tiles, tl.program_id(0))
    base, grad = table + slot * SPEC.FIELDS, tl.load(grads + slot)
    columns = columns_of(base, SPEC)
    h = numbers_of(base, scalars, SPEC)
    return Row(base, grad, row_block * SPEC.R, piece, columns, h)


@jit
def rows_of(row, SPEC: tl.constexpr):
    """The rows [R]."""
    return row.first + tl.arange(0, SPEC.R)


@jit
def tile_of(tiles, index):
    """Slot, row block and column block of a tile. Offsets are 64-bit: tensors pass 2^31 elements."""
    tile = tiles + index * tl.full([], 3, tl.int64)
    slot = tl.load(tile).to(tl.int64)
    return slot, tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)


@jit
def columns_of(base, SPEC: tl.constexpr):
    """Columns of a slot."""
    VECTOR: tl.constexpr = SPEC.VECTOR
    columns = tl.load(base + len(SPEC.DTYPES) + 1)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    return columns


@jit
def numbers_of(base, scalars, SPEC: tl.constexpr):
    """The Numbers of a slot: COUNT of the table; with COUNT 0 `scalars` is their tuple, in fp32."""
    COUNT: tl.constexpr = SPEC.COUNT
    values = ()
    if COUNT == 0:
        for i in tl.static_range(len(scalars)):
            values = values + (tl.full([], scalars[i], tl.float32),)  # the interpreter's are Python's
    else:
        first = scalars + tl.load(base + len(SPEC.DTYPES) + 2) * COUNT
        for i in tl.static_range(COUNT):
            values = values + (tl.load(first + i),)
    return Numbers(*values[:_SHARED], values[_SHARED:])


@jit
def offsets_of(row, r, c, i: tl.constexpr, SPEC: tl.constexpr):
    """Element offsets [R, C] of rows r [R] and columns c [C] in tensor i of the slot."""
    K: tl.constexpr = len(SPEC.DTYPES)
    D: tl.constexpr = SPEC.D
    if D == 0:
        return r[:, None] * row.columns + c[None, :]
    else:
        strides = row.base + K + _GEOMETRY + D
        inner = c * 0
        rest = c
        for d in tl.static_range(D - 1, -1, -1):
            size = tl.load(row.base + K + _GEOMETRY + d)
            inner = inner + (rest % size) * tl.load(strides + (d + 1) * K + i)
            rest = rest // size
        return r[:, None] * tl.load(strides + i) + inner[None, :]


@jit
def pointer_of(address, i: tl.constexpr, SPEC: tl.constexpr):
    """The address of tensor i as a pointer. Alignment is said here: unknown, loads would stay scalar."""
    BYTES: tl.constexpr = SPEC.DTYPES[i].primitive_bitwidth // 8
    pointer = address.to(tl.pointer_type(SPEC.DTYPES[i]))
    if SPEC.VECTOR > 1:
        # A thread that took 16 elements where they are bytes could not take as many of wider ones at once.
        pointer = tl.multiple_of(pointer, 16 if BYTES > 1 else 8)
    return pointer


@jit
def load_tile(row, start, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Cells from column `start` on, and the slot's tensors there as rules see them: blocks [R, C], 0 outside.

    Rows of the gradient (tensor 1) come multiplied by their factors, where they have such. EVICT: when
    caches let go of what is read, as of tl.load.
    """
    COUNT: tl.constexpr = values_of(SPEC)
    r, c = rows_of(row, SPEC), start + tl.arange(0, SPEC.C)
    inside = r < tl.load(row.base + len(SPEC.DTYPES))
    cells = Cells(r, c, inside[:, None] & (c < row.columns)[None, :], start)
    values = ()
    for i in tl.static_range(COUNT):
        value = value_of(row, cells, i, SPEC, EVICT)
        if SPEC.FACTORED and i == 1:
            factors = tl.load(row.base + len(SPEC.DTYPES) + 11).to(tl.pointer_type(SPEC.COMPUTE))
            value = value * tl.load(factors + r, inside, other=0)[:, None]
        values = values + (value,)
    return cells, values


@jit
def value_of(row, cells, i: tl.constexpr, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Tensor i of the slot at some cells [R, C], as rules see it."""
    KIND: tl.constexpr = kind_of(i, SPEC)
    BESIDE: tl.constexpr = len(SPEC.DTYPES) - 1  # what a parameter has beside it
    if KIND == "signed" or KIND == "nonnegative":
        places, inside = scale_places(row, cells, i, SPEC)
        scales = tl.load(places, inside, other=0)
        value = decoded(read(row, cells, i, SPEC, EVICT), scales, KIND, SPEC)
    elif KIND == "split16" or KIND == "split8":
        high = read(row, cells, i, SPEC, EVICT).to(tl.int16, bitcast=True).to(tl.int32)
        low = read(row, cells, BESIDE, SPEC, EVICT).to(tl.int32)
        value = joined(high, low if KIND == "split16" else low << 8)
    elif KIND == "float32":
        value = read(row, cells, BESIDE, SPEC, EVICT)
    else:
        value = decode(read(row, cells, i, SPEC, EVICT), SPEC)
    return value


@jit
def read(row, cells, i: tl.constexpr, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Tensor i of the slot at some cells [R, C], as it is kept."""
    offsets = offsets_of(row, cells.r, cells.c, i, SPEC)
    address = row.grad if i == 1 else tl.load(row.base + i)
    return tl.load(pointer_of(address, i, SPEC) + offsets, cells.mask, other=0, eviction_policy=EVICT)


@jit
def scale_places(row, cells, i: tl.constexpr, SPEC: tl.constexpr):
    """Where the scales [R, C // 64] of tensor i lie at some cells, and which of them there are."""
    AT: tl.constexpr = scales_at(i, SPEC)
    block = cells.start // _BLOCK + tl.arange(0, SPEC.C // _BLOCK)
    blocks = (row.columns + (_BLOCK - 1)) // _BLOCK
    place = tl.load(row.base + AT).to(tl.pointer_type(tl.float32))
    inside = (cells.r < tl.load(row.base + len(SPEC.DTYPES)))[:, None] & (block < blocks)[None, :]
    return place + (cells.r[:, None] * blocks + block[None, :]), inside


@jit
def store_tile(row, cells, values, bits, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Writes a parameter and states (p, *state) [R, C] back; the gradient (tensor 1) never.

    bits: as of `rounding_tile`. With no state only the parameter is written; where it is still, only states.
    """
    for i in tl.static_range(1 if SPEC.FLAGS.still else 0, len(values)):
        keep(row, cells, 0 if i == 0 else i + 1, (values[i], bits), SPEC, EVICT)


@jit
def keep(row, cells, i: tl.constexpr, value, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Writes tensor i of the slot at some cells. value: (values [R, C], random bits)."""
    KIND: tl.constexpr = kind_of(i, SPEC)
    BESIDE: tl.constexpr = len(SPEC.DTYPES) - 1
    x = value[0]
    if KIND == "signed" or KIND == "nonnegative":
        scales = scales_of(x, cells.mask, SPEC)
        places, inside = scale_places(row, cells, i, SPEC)
        write(row, cells, i, coded(x, scales, KIND, SPEC), SPEC, EVICT)
        tl.store(places, scales, inside)
    elif KIND == "split16" or KIND == "split8":
        high, low = split(x)
        write(row, cells, i, high.to(tl.int16).to(tl.bfloat16, bitcast=True), SPEC, EVICT)
        write(row, cells, BESIDE, encode(low if KIND == "split16" else low >> 8, BESIDE, SPEC), SPEC, EVICT)
    elif KIND == "float32":
        write(row, cells, i, encode(x, i, SPEC), SPEC, EVICT)
        write(row, cells, BESIDE, x, SPEC, EVICT)
    elif KIND == "stochastic":
        write(row, cells, i, encode(stochastic(x, value[1] >> 16, tl.bfloat16), i, SPEC), SPEC, EVICT)
    else:
        write(row, cells, i, encode(x, i, SPEC), SPEC, EVICT)


@jit
def write(row, cells, i: tl.constexpr, x, SPEC: tl.constexpr, EVICT: tl.constexpr):
    """Writes tensor i of the slot at some cells, as it is kept."""
    offsets = offsets_of(row, cells.r, cells.c, i, SPEC)
    pointer = pointer_of(tl.load(row.base + i), i, SPEC)
    tl.store(pointer + offsets, x, cells.mask, eviction_policy=EVICT)


@jit
def totals_of(row, SPEC: tl.constexpr):
    """Addresses [R] of the sums over ranks, fp64, of the rows."""
    return tl.load(row.base + len(SPEC.DTYPES) + 10).to(tl.pointer_type(tl.float64)) + rows_of(row, SPEC)


@jit
def noise_tile(row, start, SPEC: tl.constexpr):
    """Noise [R, C] for C columns from `start` on, 0 where there is no noise."""
    R: tl.constexpr = SPEC.R
    C: tl.constexpr = SPEC.C
    QUADS: tl.constexpr = SPEC.QUADS
    if SPEC.FLAGS.noise == "none":
        return 0.0
    else:
        purpose = word(0)
        if SPEC.FLAGS.noise == "weights":
            purpose = word(ON_WEIGHTS)
        words = words_of(row, purpose, SPEC)
        sigma = row.h.sigma.to(tl.float32)
        z = normal_tile(indices_of(row, start, SPEC), sigma, words, R, C, QUADS)
        return z.to(SPEC.COMPUTE)


@jit
def rounding_tile(row, start, SPEC: tl.constexpr):
    """Random words [R, C], uint32, for C columns from `start` on; 0 where all is rounded to nearest.

    The lower half is for the parameter, the upper half for states.
    """
    R: tl.constexpr = SPEC.R
    C: tl.constexpr = SPEC.C
    QUADS: tl.constexpr = SPEC.QUADS
    if SPEC.FLAGS.rounding == "stochastic" or SPEC.FLAGS.dithered:
        words = words_of(row, word(ON_ROUNDING), SPEC)
        return word_tile(indices_of(row, start, SPEC), words, R, C, QUADS)
    else:
        return 0


@jit
def indices_of(row, start, SPEC: tl.constexpr):
    """Index [R, 1] in the whole parameter of column `start` of the rows."""
    place = row.base + len(SPEC.DTYPES) + 8
    return tl.load(place) + rows_of(row, SPEC)[:, None] * tl.load(place + 1) + start


@jit
def words_of(row, purpose, SPEC: tl.constexpr):
    """The slot's Words, of the step for a purpose."""
    place = row.base + len(SPEC.DTYPES) + 5
    stream, step = tl.load(place).to(tl.uint32), row.h.step.to(tl.int32).to(tl.uint32) | purpose
    return Words(stream, step, tl.load(place + 1).to(tl.uint32), tl.load(place + 2).to(tl.uint32))
