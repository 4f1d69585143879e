"""Row sums: in a tile, and for rows that a tile cannot hold.

`sum_of_loop`, `project_row`: one program walks its row again; the other walk finds it in the L2 cache.
`row_sums_kernel`, `mean_of_pieces`, `project_kernel`: rows too long, or too few, for that. A launch leaves
the sum of every tile in a place of its own, the next one adds those of its row in a fixed order.
The same kernels where a row lies on several ranks: a program walks what is here of it and leaves its sum,
which the host adds up over ranks before the next launch.

No atomics: a result never depends on which program ran first. Only what the mean is taken of is read
twice: the gradient (with coupled decay the parameter too; with `centralize="update"` also the state).
What `measured` does not use is never loaded: the compiler drops loads without a user.
SPEC is a `Spec` of spec.py throughout.
"""

from .language import constexpr_function, jit, tl
from .ops import divide, sqrt
from .stages import averaged, measured, measured_next, projected, rounded, row_averaged
from .storage import norms_at
from .table import load_tile, noise_tile, rounding_tile, row_of, rows_of, store_tile, totals_of

# Of a row that one program walks twice, the caches keep what the second walk reads again, and let go first
# of what it reads and writes for the last time: else parameters and states would push the gradients out.
HINTS = tl.constexpr(True)


@constexpr_function
def hinted(evict, spec, hints):
    """A hint for the caches, where a row is walked twice; not where strides take the registers it needs."""
    walked_twice = spec.REDUCTION == "loop" and spec.FLAGS.means
    return evict if hints and walked_twice and spec.D == 0 else ""


@jit
def sums_at(base, SPEC: tl.constexpr):
    """Where the sums of a slot lie, fp64 [SUMS + 1]: the last is the number of its elements."""
    AT: tl.constexpr = norms_at(SPEC)
    return tl.load(base + AT).to(tl.pointer_type(tl.float64))


@jit
def trust_of(row, SPEC: tl.constexpr):
    """The factor of a slot: 1 where its rule wants no norms."""
    FACTOR: tl.constexpr = SPEC.FACTOR
    SUMS: tl.constexpr = SPEC.SUMS
    FLAGS: tl.constexpr = SPEC.FLAGS
    VARIANT: tl.constexpr = FLAGS.variant
    if FLAGS.trust == "none":
        return 1.0
    else:
        place = sums_at(row.base, SPEC)
        sums = ()
        for i in tl.static_range(SUMS):
            sums = sums + (tl.load(place + i),)
        return FACTOR(sums, tl.load(place + SUMS), row.h.own, VARIANT).to(SPEC.COMPUTE)


@jit
def row_total(x, mask):
    """Sums [R, 1] of the rows of a tile [R, C]."""
    return tl.sum(tl.where(mask, x, 0), axis=1)[:, None]


@jit
def sum_of_loop(row, first, SPEC: tl.constexpr, NEXT: tl.constexpr):
    """Sum of the measured quantity over a row [1], C columns at a time: a scalar.

    `NEXT`: of what is measured once `first` is known.
    """
    C: tl.constexpr = SPEC.C
    KEEP: tl.constexpr = hinted("evict_last", SPEC, HINTS)
    totals = tl.zeros([1, C], SPEC.COMPUTE)
    for start in range(0, row.columns, C):
        cells, values = load_tile(row, start, SPEC, KEEP)
        z = noise_tile(row, start, SPEC)
        if NEXT:
            x = measured_next(values, row.h, z, first, SPEC)
        else:
            x = measured(values, row.h, z, trust_of(row, SPEC), SPEC)
        totals += tl.where(cells.mask, x, 0)
    return tl.sum(tl.sum(totals, axis=1), axis=0)


@jit
def mean_of_ranks(row, SPEC: tl.constexpr):
    """Mean of a row [1], of which the sum over ranks is known: a scalar. The whole row is K + 9 long."""
    total = tl.sum(tl.load(totals_of(row, SPEC)), axis=0).to(SPEC.COMPUTE)
    return divide(total, tl.load(row.base + len(SPEC.DTYPES) + 9).to(SPEC.COMPUTE))


@jit
def known_of_row(row, SPEC: tl.constexpr):
    """What is known of a row [1] that a program walks, or walks a part of: as `stepped` takes it."""
    mean, state = 0.0, 0.0
    if SPEC.FLAGS.centralize != "none" or SPEC.FLAGS.row_state:
        if SPEC.REDUCTION == "ranks":
            mean = mean_of_ranks(row, SPEC)
        else:
            mean = divide(sum_of_loop(row, 0.0, SPEC, False), row.columns.to(SPEC.COMPUTE))
    if SPEC.FLAGS.row_state:
        mean, state = states_of_loop(row, mean, SPEC)
    return mean, trust_of(row, SPEC), state


@jit
def known_of_tile(row, tile, z, sums, SPEC: tl.constexpr):
    """The same of the rows of a tile [R, C], or of the row that it is a piece of.

    tile: loaded values and their mask.
    """
    mean, state, trust = 0.0, 0.0, trust_of(row, SPEC)
    if SPEC.FLAGS.centralize != "none" or SPEC.FLAGS.row_state:
        if SPEC.REDUCTION == "tile":
            x = measured(tile[0], row.h, z, trust, SPEC)
            mean = divide(row_total(x, tile[1]), row.columns.to(SPEC.COMPUTE))
        else:
            mean = mean_of_pieces(sums, row, SPEC)
    if SPEC.FLAGS.row_state:
        mean, state = states_of_tile(row, tile, z, mean, SPEC)
    return mean, trust, state


@jit
def row_state(row, mean, SPEC: tl.constexpr):
    """The states [R, 1] of rows, brought up to date by the means of this step, and kept."""
    r = rows_of(row, SPEC)[:, None]
    inside = r < tl.load(row.base + len(SPEC.DTYPES))
    places = tl.load(row.base + len(SPEC.DTYPES) + 11).to(tl.pointer_type(SPEC.COMPUTE)) + r
    new = row_averaged(tl.load(places, inside, other=0), mean, row.h)
    tl.store(places, new, inside)
    return new


@jit
def next_of_tile(row, tile, z, first, SPEC: tl.constexpr):
    """Mean [R, 1] over rows of what is measured next. tile: loaded values and their mask."""
    x = measured_next(tile[0], row.h, z, first, SPEC)
    return divide(row_total(x, tile[1]), row.columns.to(SPEC.COMPUTE))


@jit
def states_of_tile(row, tile, z, first, SPEC: tl.constexpr):
    """Means and new states [R, 1] of rows, of which the first mean is known."""
    if SPEC.FLAGS.centralize == "gradient":
        mean, state = first, row_state(row, next_of_tile(row, tile, z, first, SPEC), SPEC)
    else:
        mean, state = 0.0, row_state(row, first, SPEC)
        if SPEC.FLAGS.centralize == "update":
            mean = next_of_tile(row, tile, z, state, SPEC)
    return mean, state


@jit
def states_of_loop(row, first, SPEC: tl.constexpr):
    """The mean and new state of a row [1] that is walked, of which the first mean is known."""
    columns = row.columns.to(SPEC.COMPUTE)
    if SPEC.FLAGS.centralize == "gradient":
        second = divide(sum_of_loop(row, first, SPEC, True), columns)
        mean, state = first, row_state(row, second, SPEC)
    else:
        mean, state = 0.0, row_state(row, first, SPEC)
        if SPEC.FLAGS.centralize == "update":
            mean = divide(sum_of_loop(row, state, SPEC, True), columns)
    return mean, state


@jit
def leave_total(row, total, SPEC: tl.constexpr):
    """Leaves a sum over what is here of a row [1] in the row's place."""
    R: tl.constexpr = SPEC.R
    tl.store(totals_of(row, SPEC), total.to(tl.float64) + tl.zeros([R], tl.float64))


@jit
def project_row(row, squares, SPEC: tl.constexpr):
    """Finishes a row [1], just written by this program: scaled down to its largest norm, if it must be."""
    C: tl.constexpr = SPEC.C
    if must_finish(row, squares, SPEC):
        tl.debug_barrier()  # what other threads wrote is read
        for start in range(0, row.columns, C):
            finish_tile(row, start, squares, SPEC)


@jit
def must_finish(row, squares, SPEC: tl.constexpr):
    """Whether a row is walked again: most need not, but an average is of finished parameters."""
    if SPEC.FLAGS.ema:
        return True
    else:
        return sqrt(squares) > row.h.longest


@jit
def finish_tile(row, start, squares, SPEC: tl.constexpr):
    """Projects and finishes a tile [1, C] of a row of which the norm had to be known first."""
    cells, values = load_tile(row, start, SPEC, "")
    bits = rounding_tile(row, start, SPEC)
    p = rounded(projected(values[0], squares, row.h), bits, SPEC)
    state = ()
    if SPEC.FLAGS.ema:
        state = averaged(p, values[2:3], row.h, SPEC)
    store_tile(row, cells, (p,) + state, bits, SPEC, "")


@jit
def row_sums_kernel(table, grads, tiles, scalars, sums, SPEC: tl.constexpr):
    """Sums of the measured quantity. Arguments as step_kernel's.

    sums[0, program] = that over its tile [1, C]; over its row, where ranks share that, in the row's place.
    """
    row = row_of(table, grads, tiles, scalars, SPEC)
    if SPEC.REDUCTION == "ranks":
        leave_total(row, sum_of_loop(row, 0.0, SPEC, False), SPEC)
    else:
        start = row.piece * SPEC.C
        cells, values = load_tile(row, start, SPEC, "")
        x = measured(values, row.h, noise_tile(row, start, SPEC), trust_of(row, SPEC), SPEC)
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.where(cells.mask, x, 0), axis=1), axis=0))


@jit
def square_total(sums, p, mask):
    """sums[1, program] = sum of squares over its tile p [1, C]."""
    total = tl.sum(tl.sum(tl.where(mask, p * p, 0), axis=1), axis=0)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), total)


@jit
def project_kernel(table, grads, tiles, scalars, sums, SPEC: tl.constexpr):
    """Finishes rows, or their pieces, of which step_kernel has left the norms. Arguments as there."""
    row = row_of(table, grads, tiles, scalars, SPEC)
    if SPEC.FLAGS.skips:  # noqa: SIM102 (the one is known when compiled)
        if row.h.skip != 0:
            return
    if SPEC.REDUCTION == "ranks":
        project_row(row, tl.sum(tl.load(totals_of(row, SPEC)), axis=0).to(SPEC.COMPUTE), SPEC)
    else:
        squares = total_of_pieces(sums + tl.num_programs(0), row, SPEC)
        if must_finish(row, squares, SPEC):
            finish_tile(row, row.piece * SPEC.C, squares, SPEC)


@jit
def total_of_pieces(sums, row, SPEC: tl.constexpr):
    """Sum over this program's row: the pieces of a row lie side by side in `sums`."""
    first = sums + tl.program_id(0) - row.piece
    pieces = tl.cdiv(row.columns, SPEC.C)
    lane = tl.arange(0, 128)
    total = tl.zeros([128], SPEC.COMPUTE)
    for start in range(0, pieces, 128):
        total += tl.load(first + start + lane, start + lane < pieces, other=0)
    return tl.sum(total, axis=0)


@jit
def mean_of_pieces(sums, row, SPEC: tl.constexpr):
    """Mean over this program's row."""
    return divide(total_of_pieces(sums, row, SPEC), row.columns.to(SPEC.COMPUTE))
