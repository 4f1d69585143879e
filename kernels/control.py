"""The launch before the step: the norm of all gradients, and with it the scalars of the step.

`norm_kernel` leaves sums of squares, one a program, and counts the programs that are done. The last one of
all launches adds them up in a fixed order and writes the scalars, so nothing has to come back to the host:
not the norm, not whether a step is left out, not how many were taken. Where no norm is asked for, or it is
added up over ranks, `control_kernel` writes the scalars alone.

Squares are added up in fp64. They are exact there and cannot overflow for numbers of fp32 and less, so the
norm is finite just where every gradient is; and however gradients are cut into tiles it comes out the same
but for the last bits of 53, of which the fp32 factor keeps 24.
"""

from .language import constexpr_function, jit, tl
from .table import columns_of, load_tile, tile_of
from .tape import played

LANES = 128  # rows of scalars, or slots, at a time
GRID = 1024  # programs of a launch at most: each takes every GRID-th tile
_LANES = tl.constexpr(LANES)
TOTALS = tl.constexpr(1024)  # partial sums at a time: each time waits for the memory once
# What keeps the memory busy are bytes that are asked for before any is waited for: of several tiles at once
# where elements are small. Sums of fp64 take registers, so that blocks of a tile share them.
BYTES = tl.constexpr(16384)  # of gradients that a program reads at a time, 128 a thread
BLOCK = tl.constexpr(1024)  # elements of a tile with sums of their own
BACKWARDS = tl.constexpr(True)  # tiles from the last to the first


@constexpr_function
def tiles_at_once(size, elements, bits, vector):
    """How many tiles of so many elements are read before any is added up: as many bytes as asked for."""
    return max(1, 8 * size // (elements * bits)) if vector > 1 else 1


@jit
def norm_kernel(
    table,
    grads,
    tiles,
    share,  # int32 [2]: how many tiles there are, where the sums of this launch begin
    partials,  # fp64 [programs of all launches]
    done,  # int32 [1]: programs that are done; 0 between steps
    control,  # see `decide`
    REDUCTION: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    FACTORED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CODE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LEAVES: tl.constexpr,
    CHECK: tl.constexpr,
    DECIDE: tl.constexpr,  # else the sums are added up elsewhere
):
    """Sums of squares of the gradients of one list of tiles; the last program goes on to `decide`.

    The tiles that the step reads first come last, so that the L2 cache still has them then.
    """
    # Blocks are some rows of a tile, or columns of its one.
    BLOCKS: tl.constexpr = R * C // BLOCK if R * C > BLOCK else 1
    TALL: tl.constexpr = R // BLOCKS if R > 1 else R
    WIDE: tl.constexpr = C if R > 1 else C // BLOCKS
    AT_ONCE: tl.constexpr = tiles_at_once(BYTES, R * C, DTYPES[1].primitive_bitwidth, VECTOR)
    squares = tl.zeros([TALL, WIDE], tl.float64)
    count, programs = tl.load(share), tl.num_programs(0)
    for first in range(tl.program_id(0), count, programs if REDUCTION == "loop" else programs * AT_ONCE):
        if REDUCTION == "loop":
            row, grad, columns, r, _ = place_of(
                table, grads, tiles, first, count, DTYPES, FIELDS, VECTOR, R, C
            )
            for start in range(0, columns, AT_ONCE * C):
                values = ()
                for i in tl.static_range(AT_ONCE):
                    c = start + i * C
                    values = values + gradients_of(
                        row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, R, C, TALL, WIDE
                    )
                squares = with_squares(squares, values)
        else:
            values = ()
            for i in tl.static_range(AT_ONCE):
                row, grad, columns, r, c = place_of(
                    table, grads, tiles, first + i * programs, count, DTYPES, FIELDS, VECTOR, R, C
                )
                values = values + gradients_of(
                    row, grad, r, c, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, R, C, TALL, WIDE
                )
            squares = with_squares(squares, values)
    tl.store(partials + tl.load(share + 1) + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))
    if DECIDE:
        tl.debug_barrier()  # what this program wrote comes before its count
        programs = tl.load(control[0] + 2)  # of all launches
        if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
            tl.store(done, 0)
            total = tl.zeros([TOTALS], tl.float64)
            for start in range(0, programs, TOTALS):
                lane = start + tl.arange(0, TOTALS)
                total += tl.load(partials + lane, lane < programs, other=0, cache_modifier=".cg")
            decide(tl.sqrt(tl.sum(total, axis=0)), control, CODE, OUTPUTS, LEAVES, CHECK)


@jit
def place_of(
    table,
    grads,
    tiles,
    index,
    count,
    DTYPES: tl.constexpr,
    FIELDS: tl.constexpr,
    VECTOR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Row of the table, address of the gradient, columns, where the tile begins. Past `count`: no columns."""
    at = tl.minimum(index, count - 1)
    if BACKWARDS:
        at = count - 1 - at
    slot, row_block, column_block = tile_of(tiles, at)
    row, grad = table + slot * FIELDS, tl.load(grads + slot)
    columns = tl.where(index < count, columns_of(row, len(DTYPES), VECTOR), 0)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    return row, grad, columns, row_block * R, column_block * C


@jit
def gradients_of(
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
    R: tl.constexpr,
    C: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient's tile from row r and column c on, 0 outside: a tuple of blocks [TALL, WIDE]."""
    found = ()
    DOWN: tl.constexpr = TALL if R > 1 else 0  # to the next block
    RIGHT: tl.constexpr = 0 if R > 1 else WIDE
    for i in tl.static_range(R * C // (TALL * WIDE)):
        rows, lanes = r + i * DOWN + tl.arange(0, TALL), c + i * RIGHT + tl.arange(0, WIDE)
        _mask, values = load_tile(row, grad, rows, lanes, columns, DTYPES, COMPUTE, D, VECTOR, FACTORED, "")
        found = found + (values[1],)
    return found


@jit
def with_squares(squares, values):
    """fp64 sums with the squares of some blocks, all of one shape: a multiplication and addition each."""
    for i in tl.static_range(len(values)):
        g = values[i].to(tl.float64)
        squares = tl.fma(g, g, squares)
    return squares


@jit
def control_kernel(
    squares, control, CODE: tl.constexpr, OUTPUTS: tl.constexpr, LEAVES: tl.constexpr, CHECK: tl.constexpr
):
    """The scalars of a step: one program. squares: fp64 [1], of all gradients, or None where not measured."""
    norm = tl.full([], 0, tl.float64)
    if squares is not None:
        norm = tl.sqrt(tl.load(squares))
    decide(norm, control, CODE, OUTPUTS, LEAVES, CHECK)


@jit
def decide(
    norm, control, CODE: tl.constexpr, OUTPUTS: tl.constexpr, LEAVES: tl.constexpr, CHECK: tl.constexpr
):
    """Writes the scalars of a step and counts it, unless it is left out.

    control: a tuple of
        sizes        int32 [3]: how many rows of scalars there are, slots, programs of norm_kernel
        numbers      fp64 [LEAVES, rows]: the leaves of the tape
        sources      int64 [LEAVES, rows]: where a leaf lies that is on the device, its lowest bit set if it
                     is fp64; else 0
        example      int32 [rows]: a slot that uses the row
        used         int32 [slots]: the row that a slot uses
        steps        int64 [slots]: the address of each slot's count of steps taken so far, fp32
        most         fp32 [slots]: where counting ends
        products     int64 [slots], addresses as `steps`, of a rule that keeps one; else None
        grad_scale   fp32 [1] or None: gradients are this much too large
        found_inf    fp32 [1] or None: whether one of them was found not to be finite
        report       fp64 [2]: takes the norm, and counts the steps left out
        singles, doubles   the scalars in fp32 and fp64 [rows, outputs - 1], where they are used; else None
    OUTPUTS: places on the tape of the scalars and, last, of the product.
    CHECK: a step whose norm is not finite is left out.
    """
    sizes, numbers, sources, example, used, steps, most = control[:7]
    products, grad_scale, found_inf, report, singles, doubles = control[7:]
    rows, slots = tl.load(sizes), tl.load(sizes + 1)
    scale = tl.full([], 1, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
    skip = tl.full([], 0, tl.float64)
    if found_inf is not None:
        skip = (tl.load(found_inf) != 0).to(tl.float64)
    norm = norm / scale
    if CHECK:
        skip = tl.where(norm < float("inf"), skip, 1.0)
    tl.store(report, norm)
    tl.store(report + 1, tl.load(report + 1) + skip)
    for start in range(0, rows, _LANES):
        lane = start + tl.arange(0, _LANES)
        mask = lane < rows
        slot = tl.load(example + lane, mask, other=0)
        step = tl.load(counter_of(steps + slot, mask), mask, other=0).to(tl.float64) + 1
        product = step * 0 + 1
        if products is not None:
            product = tl.load(counter_of(products + slot, mask), mask, other=0).to(tl.float64)
        values = (step, product, step * 0 + norm, step * 0 + scale, step * 0 + skip)
        for i in tl.static_range(LEAVES):
            values = values + (leaf(numbers + i * rows + lane, sources + i * rows + lane, mask),)
        values = played(values, CODE)
        for i in tl.static_range(len(OUTPUTS) - 1):
            place = lane * (len(OUTPUTS) - 1) + i
            if singles is not None:
                tl.store(singles + place, values[OUTPUTS[i]].to(tl.float32), mask)
            if doubles is not None:
                tl.store(doubles + place, values[OUTPUTS[i]], mask)
        if products is not None:
            tl.store(numbers + LEAVES * rows + lane, values[OUTPUTS[len(OUTPUTS) - 1]], mask)
    tl.debug_barrier()  # the rows are written before the slots' counts change
    if skip == 0:
        for start in range(0, slots, _LANES):
            lane = start + tl.arange(0, _LANES)
            mask = lane < slots
            count = counter_of(steps + lane, mask)
            taken = tl.load(count, mask) + 1
            tl.store(count, tl.minimum(taken, tl.load(most + lane, mask)), mask)
            if products is not None:
                row = tl.load(used + lane, mask, other=0)
                product = tl.load(numbers + LEAVES * rows + row, mask).to(tl.float32)
                tl.store(counter_of(products + lane, mask), product, mask)


@jit
def counter_of(place, mask):
    """Where the counters [lanes] lie whose addresses are at a place."""
    return tl.load(place, mask, other=0).to(tl.pointer_type(tl.float32))


@jit
def leaf(number, source, mask):
    """A leaf of the tape [lanes], fp64: the number, or what lies at its source."""
    address = tl.load(source, mask, other=0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), (address != 0) & (address & 1 == 0), other=0)
    double = tl.load((address - 1).to(tl.pointer_type(tl.float64)), address & 1 == 1, other=0)
    value = tl.load(number, mask, other=1)
    return tl.where(address == 0, value, tl.where(address & 1 == 1, double, single.to(tl.float64)))
