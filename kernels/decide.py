"""The launch before the step: the norm of all gradients, and with it the scalars of the step.

`norm_kernel` leaves sums of squares, one a program, and counts the programs that are done. The last one of
all launches adds them up in a fixed order and writes the scalars, so nothing has to come back to the host:
not the norm, not whether a step is left out, not how many were taken. Where no norm is asked for, or it is
added up over ranks, `control_kernel` writes the scalars alone.

Squares are added up in fp64. They are exact there and cannot overflow for numbers of fp32 and less, so the
norm is finite just where every gradient is; and however gradients are cut into tiles it comes out the same
but for the last bits of 53, of which the fp32 factor keeps 24.
"""

from typing import Any, NamedTuple

from .language import jit, tl
from .table import Row, columns_of, load_tile, tile_of
from .tape import played

LANES = 128  # rows of scalars, or slots, at a time
GRID = 1024  # programs of a launch at most: each takes every GRID-th tile
_LANES = tl.constexpr(LANES)
TOTALS = tl.constexpr(1024)  # partial sums at a time: each time waits for the memory once
BACKWARDS = tl.constexpr(True)  # tiles from the last to the first


class Sums(NamedTuple):
    """Where the launches of norm_kernel leave what they have measured."""

    share: Any  # int32 [2]: how many tiles the launch has, where its sums begin
    partials: Any  # fp64 [programs of all launches]
    done: Any  # int32 [1]: programs that are done; 0 between steps


class Control(NamedTuple):
    """What `decide` reads and writes. Addresses are int64."""

    sizes: Any  # int32 [3]: how many rows of scalars there are, slots, programs of norm_kernel
    numbers: Any  # fp64 [LEAVES, rows]: the leaves of the tape; a line more where there are products
    sources: Any  # int64 [LEAVES, rows]: where a leaf is that is on the device, odd if it is fp64; else 0
    example: Any  # int32 [rows]: a slot that uses the row
    used: Any  # int32 [slots]: the row that a slot uses
    steps: Any  # int64 [slots]: the address of each slot's count of steps taken so far, fp32
    most: Any  # fp32 [slots]: where counting ends
    products: Any  # int64 [slots], addresses as `steps`, of a rule that keeps one; else None
    grad_scale: Any  # fp32 [1] or None: gradients are this much too large
    found_inf: Any  # fp32 [1] or None: whether one of them was found not to be finite
    report: Any  # fp64 [2]: takes the norm, and counts the steps left out
    singles: Any  # the scalars in fp32 [rows, outputs - 1] where they are used; else None
    doubles: Any  # the same in fp64


@jit
def norm_kernel(table, grads, tiles, sums, control, SPEC: tl.constexpr):
    """Sums of squares of the gradients of one list of tiles; the last program goes on to `decide`.

    The tiles that the step reads first come last, so that the L2 cache still has them then.
    table, grads, tiles: as of step_kernel; sums: `Sums`; control: `Control`; SPEC: a `NormSpec` of spec.py.
    """
    TALL: tl.constexpr = SPEC.BLOCK.R
    WIDE: tl.constexpr = SPEC.BLOCK.C
    AT_ONCE: tl.constexpr = SPEC.AT_ONCE
    LOOP: tl.constexpr = SPEC.SLOTS.REDUCTION == "loop"
    squares = tl.zeros([TALL, WIDE], tl.float64)
    count, programs = tl.load(sums.share), tl.num_programs(0)
    for first in range(tl.program_id(0), count, programs if LOOP else programs * AT_ONCE):
        if LOOP:
            row = row_at(table, grads, tiles, first, count, SPEC)
            for start in range(0, row.columns, AT_ONCE * SPEC.SLOTS.C):
                values = ()
                for i in tl.static_range(AT_ONCE):
                    values = values + gradients_of(row, start + i * SPEC.SLOTS.C, SPEC)
                squares = with_squares(squares, values)
        else:
            values = ()
            for i in tl.static_range(AT_ONCE):
                row = row_at(table, grads, tiles, first + i * programs, count, SPEC)
                values = values + gradients_of(row, row.piece * SPEC.SLOTS.C, SPEC)
            squares = with_squares(squares, values)
    place = sums.partials + tl.load(sums.share + 1) + tl.program_id(0)
    tl.store(place, tl.sum(tl.sum(squares, axis=1), axis=0))
    if SPEC.DECIDER is not None:
        decide_last(sums, control, SPEC)


@jit
def decide_last(sums, control, SPEC: tl.constexpr):
    """Decides, if this program is the last of all launches to finish."""
    DECIDER: tl.constexpr = SPEC.DECIDER
    tl.debug_barrier()  # what this program wrote comes before its count
    programs = tl.load(control.sizes + 2)  # of all launches
    if tl.atomic_add(sums.done, 1, sem="acq_rel") == programs - 1:
        tl.store(sums.done, 0)
        total = tl.zeros([TOTALS], tl.float64)
        for start in range(0, programs, TOTALS):
            lane = start + tl.arange(0, TOTALS)
            total += tl.load(sums.partials + lane, lane < programs, other=0, cache_modifier=".cg")
        decide(tl.sqrt(tl.sum(total, axis=0)), control, DECIDER)


@jit
def row_at(table, grads, tiles, index, count, SPEC: tl.constexpr):
    """The Row of a tile. Past `count` it has no columns."""
    SLOTS: tl.constexpr = SPEC.SLOTS
    VECTOR: tl.constexpr = SLOTS.VECTOR
    at = tl.minimum(index, count - 1)
    if BACKWARDS:
        at = count - 1 - at
    slot, row_block, piece = tile_of(tiles, at)
    base, grad = table + slot * SLOTS.FIELDS, tl.load(grads + slot)
    columns = tl.where(index < count, columns_of(base, SLOTS), 0)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    return Row(base, grad, row_block * SLOTS.R, piece, columns, ())


@jit
def gradients_of(row, start, SPEC: tl.constexpr):
    """The gradient's tile from the row's and column `start` on, 0 outside: a tuple of blocks."""
    SLOTS: tl.constexpr = SPEC.SLOTS
    BLOCK: tl.constexpr = SPEC.BLOCK
    COUNT: tl.constexpr = SLOTS.R * SLOTS.C // (BLOCK.R * BLOCK.C)
    DOWN: tl.constexpr = BLOCK.R if SLOTS.R > 1 else 0  # to the next block
    RIGHT: tl.constexpr = 0 if SLOTS.R > 1 else BLOCK.C
    found = ()
    for i in tl.static_range(COUNT):
        block = Row(row.base, row.grad, row.first + i * DOWN, row.piece, row.columns, ())
        _cells, values = load_tile(block, start + i * RIGHT, BLOCK, "")
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
def control_kernel(squares, control, SPEC: tl.constexpr):
    """The scalars of a step: one program. squares: fp64 [1], of all gradients, or None where not measured."""
    norm = tl.full([], 0, tl.float64)
    if squares is not None:
        norm = tl.sqrt(tl.load(squares))
    decide(norm, control, SPEC)


@jit
def decide(norm, control, SPEC: tl.constexpr):
    """Writes the scalars of a step and counts it, unless it is left out. SPEC: a `DeciderSpec` of spec.py."""
    rows, slots = tl.load(control.sizes), tl.load(control.sizes + 1)
    scale = tl.full([], 1, tl.float64)
    if control.grad_scale is not None:
        scale = tl.load(control.grad_scale).to(tl.float64)
    skip = tl.full([], 0, tl.float64)
    if control.found_inf is not None:
        skip = (tl.load(control.found_inf) != 0).to(tl.float64)
    norm = norm / scale
    if SPEC.CHECK:
        skip = tl.where(norm < float("inf"), skip, 1.0)
    tl.store(control.report, norm)
    tl.store(control.report + 1, tl.load(control.report + 1) + skip)
    for start in range(0, rows, _LANES):
        write_rows(start, rows, (norm, scale, skip), control, SPEC)
    tl.debug_barrier()  # the rows are written before the slots' counts change
    if skip == 0:
        for start in range(0, slots, _LANES):
            count_step(start, rows, slots, control, SPEC)


@jit
def write_rows(start, rows, known, control, SPEC: tl.constexpr):
    """Writes LANES rows of scalars from `start` on. known: norm, scale, whether the step is left out."""
    CODE: tl.constexpr = SPEC.CODE
    LEAVES: tl.constexpr = SPEC.LEAVES
    WIDTH: tl.constexpr = len(SPEC.OUTPUTS) - 1
    lane = start + tl.arange(0, _LANES)
    mask = lane < rows
    slot = tl.load(control.example + lane, mask, other=0)
    step = tl.load(counter_of(control.steps + slot, mask), mask, other=0).to(tl.float64) + 1
    product = step * 0 + 1
    if control.products is not None:
        product = tl.load(counter_of(control.products + slot, mask), mask, other=0).to(tl.float64)
    values = (step, product, step * 0 + known[0], step * 0 + known[1], step * 0 + known[2])
    for i in tl.static_range(LEAVES):
        number, source = control.numbers + i * rows + lane, control.sources + i * rows + lane
        values = values + (leaf(number, source, mask),)
    values = played(values, CODE)
    for i in tl.static_range(WIDTH):
        place = lane * WIDTH + i
        if control.singles is not None:
            tl.store(control.singles + place, values[SPEC.OUTPUTS[i]].to(tl.float32), mask)
        if control.doubles is not None:
            tl.store(control.doubles + place, values[SPEC.OUTPUTS[i]], mask)
    if control.products is not None:
        tl.store(control.numbers + LEAVES * rows + lane, values[SPEC.OUTPUTS[WIDTH]], mask)


@jit
def count_step(start, rows, slots, control, SPEC: tl.constexpr):
    """Counts the step for LANES slots from `start` on, and takes over their new products."""
    lane = start + tl.arange(0, _LANES)
    mask = lane < slots
    count = counter_of(control.steps + lane, mask)
    taken = tl.load(count, mask) + 1
    tl.store(count, tl.minimum(taken, tl.load(control.most + lane, mask)), mask)
    if control.products is not None:
        row = tl.load(control.used + lane, mask, other=0)
        product = tl.load(control.numbers + SPEC.LEAVES * rows + row, mask).to(tl.float32)
        tl.store(counter_of(control.products + lane, mask), product, mask)


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
