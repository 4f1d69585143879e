"""The multi-tensor table, device side: from a tile of the list to pointers, offsets and masks.

Row of the table (int64), K tensors per slot (parameter, gradient, state...), D inner dimensions:

    [0, K)             addresses in bytes; that of the gradient only for the CPU loop: gradients move, so
                       a GPU has their addresses in an array of their own, `grads`
    K, K + 1           rows, columns of the slot
    K + 2              its row in the table of scalars
    K + 3, K + 4       rows, columns of its tiles (the CPU loop reads them; a GPU tile is a constant)
    K + 5 ... K + 7    its words of randomness: stream, key (two)
    K + 8, K + 9       the index of its first element there, and from one row to the next
    K + 10             where its rows lie on several ranks: the address of fp64 [rows], sums over those
    K + 11             where its rows have factors: the address of COMPUTE [rows]
    K + 12 ...         only where D > 0: D sizes, K row strides, then K strides for each inner dimension

A slot with D == 0 is dense: all its tensors lie in one storage order and element (row, column) is at
row * columns + column in each. Otherwise a column is an index over the inner dimensions.
A tile is int32 (slot, row block, column block).
"""

from .language import jit, tl
from .philox import ON_ROUNDING, ON_WEIGHTS, bit_tile, normal_tile, word

GEOMETRY = 12
_GEOMETRY = tl.constexpr(GEOMETRY)


@jit
def tile_of(tiles, index):
    """Slot, row block and column block of a tile. Offsets are 64-bit: tensors pass 2^31 elements."""
    tile = tiles + index * tl.full([], 3, tl.int64)
    slot = tl.load(tile).to(tl.int64)
    return slot, tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)


@jit
def columns_of(row, K: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of the slot."""
    columns = tl.load(row + K + 1)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    return columns


@jit
def scalars_of(row, scalars, K: tl.constexpr, COUNT: tl.constexpr):
    """The slot's scalars, a tuple of COUNT values; with COUNT 0 `scalars` is that tuple, in fp32."""
    values = ()
    if COUNT == 0:
        for i in tl.static_range(len(scalars)):
            values = values + (tl.full([], scalars[i], tl.float32),)  # the interpreter's are Python's
    else:
        base = scalars + tl.load(row + K + 2) * COUNT
        for i in tl.static_range(COUNT):
            values = values + (tl.load(base + i),)
    return values


@jit
def offsets_of(row, i: tl.constexpr, r, c, columns, K: tl.constexpr, D: tl.constexpr):
    """Element offsets [R, C] of rows r [R] and columns c [C] in tensor i of the slot."""
    if D == 0:
        return r[:, None] * columns + c[None, :]
    else:
        strides = row + K + _GEOMETRY + D
        inner = c * 0
        rest = c
        for d in tl.static_range(D - 1, -1, -1):
            size = tl.load(row + K + _GEOMETRY + d)
            inner = inner + (rest % size) * tl.load(strides + (d + 1) * K + i)
            rest = rest // size
        return r[:, None] * tl.load(strides + i) + inner[None, :]


@jit
def pointer_of(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """An address as a pointer. Alignment is said here: unknown of a loaded one, loads would stay scalar."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def load_tile(
    row,
    grad,
    r,
    c,
    columns,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    FACTORED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Mask [R, C] of rows r and columns c, and the slot's K tensors there: blocks [R, C], 0 outside.

    `grad` is the address of the gradient (tensor 1), whose rows come multiplied by their factors, where they
    have such. EVICT: when caches let go of what is read, as of tl.load.
    """
    inside = r < tl.load(row + len(DTYPES))
    mask = inside[:, None] & (c < columns)[None, :]
    values = ()
    for i in tl.static_range(len(DTYPES)):
        offsets = offsets_of(row, i, r, c, columns, len(DTYPES), D)
        address = grad if i == 1 else tl.load(row + i)
        pointer = pointer_of(address, DTYPES[i], VECTOR)
        value = tl.load(pointer + offsets, mask, other=0, eviction_policy=EVICT).to(COMPUTE)
        if FACTORED and i == 1:
            factors = tl.load(row + len(DTYPES) + 11).to(tl.pointer_type(COMPUTE))
            value = value * tl.load(factors + r, inside, other=0)[:, None]
        values = values + (value,)
    return mask, values


@jit
def totals_of(row, r, K: tl.constexpr):
    """Addresses [R] of the sums over ranks, fp64, of rows r [R]."""
    return tl.load(row + K + 10).to(tl.pointer_type(tl.float64)) + r


@jit
def store_tile(
    row,
    r,
    c,
    mask,
    columns,
    p,
    state,
    DTYPES: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Writes parameter and state [R, C] back, rounded to nearest; the gradient (tensor 1) never.

    With no state only the parameter is written.
    """
    values = (p, p) + state
    for i in tl.static_range(len(values)):
        if i != 1:
            offsets = offsets_of(row, i, r, c, columns, len(DTYPES), D)
            pointer = pointer_of(tl.load(row + i), DTYPES[i], VECTOR)
            tl.store(pointer + offsets, values[i].to(DTYPES[i]), mask, eviction_policy=EVICT)


@jit
def noise_tile(
    row,
    r,
    start,
    h,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Noise [R, C] for rows r [R] and C columns from `start`, 0 where there is no noise."""
    if FLAGS.noise == "none":
        return 0.0
    else:
        stream, key0, key1, step = words_of(row, h, len(DTYPES))
        if FLAGS.noise == "weights":
            step = step | word(ON_WEIGHTS)
        sigma = h[4].to(tl.float32)
        first = indices_of(row, r, start, len(DTYPES))
        z = normal_tile(first, sigma, stream, step, key0, key1, r.shape[0], C, QUADS)
        return z.to(COMPUTE)


@jit
def rounding_tile(
    row,
    r,
    start,
    h,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    C: tl.constexpr,
    QUADS: tl.constexpr,
):
    """Sixteen random bits [R, C] for rows r [R] and C columns from `start`; 0 for rounding to nearest."""
    if FLAGS.rounding == "stochastic":
        stream, key0, key1, step = words_of(row, h, len(DTYPES))
        step = step | word(ON_ROUNDING)
        first = indices_of(row, r, start, len(DTYPES))
        return bit_tile(first, stream, step, key0, key1, r.shape[0], C, QUADS)
    else:
        return 0


@jit
def indices_of(row, r, start, K: tl.constexpr):
    """Index [R, 1] in the whole parameter of column `start` of rows r [R]."""
    place = row + K + 8
    return tl.load(place) + r[:, None] * tl.load(place + 1) + start


@jit
def words_of(row, h, K: tl.constexpr):
    """The slot's stream, key (two words) and step."""
    words = row + K + 5
    stream, step = tl.load(words).to(tl.uint32), h[5].to(tl.int32).to(tl.uint32)
    return stream, tl.load(words + 1).to(tl.uint32), tl.load(words + 2).to(tl.uint32), step
