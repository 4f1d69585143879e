"""The stages around an update rule, in their one order. Pure functions of loaded values.

`values` are the blocks of a slot's tensors: parameter p, gradient g, state..., all of one shape (or single
elements, on the CPU); `h` are the `Numbers` of the parameter's group. `z` is the noise of the block, where
there is noise. Where an average of the parameter is kept it is the first item of the state.

A row mean is taken of `measured(...)` and handed to `stepped(...)`; the norm of a row is that of what
`stepped` returns. How they are taken is the kernel's business: in registers, by a loop, over launches.
`rounded(...)` and `averaged(...)` come last: the average is of parameters as they are stored.
"""

from typing import Any, NamedTuple

from .language import jit, tl
from .ops import divide, negative, only_where, sign, sqrt, where
from .storage import stochastic, stored, trimmed


class Flags(NamedTuple):
    """What is compiled of the stages, and the rule's variant. A stage that is off leaves no instruction."""

    variant: str
    maximize: bool
    decay: str  # "none" | "coupled" | "decoupled" | "proximal" | "trusted"
    l1: bool
    centralize: str  # "none" | "gradient" | "update"
    project: bool  # onto rows of a largest norm
    noise: str  # "none" | "gradient" | "weights"
    scaled: bool = False  # the gradient, by a factor
    skips: bool = False  # whether a step may turn out to be left out
    ema: bool = False  # an average of the parameter is kept
    rounding: str = "nearest"  # "nearest" | "stochastic", of the parameter
    master: str = "none"  # "none" | "split16" | "split8" | "float32", what a parameter has beside it
    dithered: bool = False  # states are rounded at random
    trust: str = "none"  # "none" | "gradient" | "step", what a factor by norms of the whole tensor multiplies
    statistics: bool = False  # the step is measured, see observed.py
    row_state: bool = False  # the rule keeps a number for each row, an average of the mean of its squares
    still: bool = False  # the parameter is read at most: a second step of another rule moves it
    cautious: bool = False  # elements whose update has another sign than the gradient stay
    cautious_decay: bool = False  # elements whose update points away from zero do not decay

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn."""
        return self.noise != "none" or self.rounds

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded at random."""
        return self.rounding != "nearest" or self.dithered

    @property
    def by_rows(self) -> bool:
        """Whether a row is more than its elements."""
        return self.means or self.project

    @property
    def means(self) -> bool:
        """Whether something of a row has a mean."""
        return self.centralize != "none" or self.row_state

    @property
    def centres_trusted(self) -> bool:
        """Whether row means are of what norms of the whole tensor have been multiplied into."""
        return self.trust == "gradient" and self.centralize == "update"

    def needs(self, part: str) -> bool:
        """Whether a step has this part, of those of launch.py."""
        norms = self.trust != "none"
        needed = {
            "sums": self.means,
            "finish": self.project,
            "squares": norms,
            "totals": norms,
            "statistics": self.statistics,
        }
        return needed.get(part, True)


class Numbers(NamedTuple):
    """The numbers of a step by name, in the order in which a row of the table of scalars has them.

    Triton, numba and plain torch read them so, layout/scalars.py writes them.
    """

    decay: Any  # weight decay (coupled), or what it leaves of a parameter in a step
    step_size: Any
    l1: Any  # penalty
    longest: Any  # norm of a row, at most
    sigma: Any  # standard deviation of the noise
    step: Any  # its number, from 1
    factor: Any  # of the gradient: unscales and clips it
    share: Any  # weight of the new parameter in its average
    skip: Any  # not 0 if the step is left out (read where the host cannot know: kernels/step.py)
    own: Any  # a tuple: the rule's own

    @classmethod
    def of_row(cls, row: Any) -> "Numbers":
        """A row of the table by name."""
        return cls(*row[:SHARED], tuple(row[SHARED:]))


SHARED = len(Numbers._fields) - 1  # numbers that every rule has


@jit
def prepared(p, g, h, z, SPEC: tl.constexpr):
    """The gradient [R, C] before centring: sign, penalties, noise: P(g + lam p) (Yong et al. 2020, 3.4)."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    if FLAGS.scaled:
        g = h.factor * g
    if FLAGS.maximize:
        g = negative(g)
    if FLAGS.decay == "coupled":
        # Not g + 0 * p: a group without decay beside one with it must not turn inf into NaN.
        g = where(h.decay != 0, g + h.decay * p, g)
    if FLAGS.l1:
        g = where(h.l1 != 0, g + h.l1 * sign(p), g)
    if FLAGS.noise == "gradient":
        g = g + z
    return g


@jit
def trusted(p, g, h, trust, SPEC: tl.constexpr):
    """The gradient [R, C] times its factor by norms of the whole tensor, decay with it."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    if FLAGS.trust == "gradient":
        if FLAGS.decay == "trusted":
            g = where(h.decay != 0, g + h.decay * p, g)
        g = trust * g
    return g


@jit
def measured(values, h, z, trust, SPEC: tl.constexpr):
    """What the row mean is taken of [R, C]: the prepared gradient, or the update direction.

    Its square, where the rule keeps a state of rows that does not wait for their means. `trust` is the factor
    by norms of the whole tensor.
    """
    RULE: tl.constexpr = SPEC.RULE
    FLAGS: tl.constexpr = SPEC.FLAGS
    VARIANT: tl.constexpr = FLAGS.variant  # a field of a tuple cannot be passed on as it is
    p, state = values[0], values[2:]
    g = prepared(p, values[1], h, z, SPEC)
    if FLAGS.row_state:
        if FLAGS.centralize != "gradient":
            g = g * g
    elif FLAGS.centralize == "update":
        g = trusted(p, g, h, trust, SPEC)
        if FLAGS.ema:
            g, _ = RULE(p, g, state[1:], h.own, VARIANT)
        else:
            g, _ = RULE(p, g, state, h.own, VARIANT)
    return g


@jit
def measured_next(values, h, z, first, SPEC: tl.constexpr):
    """What a second row mean is taken of [R, C], where rows are centred and have states.

    `first`: the mean of the gradient, of which the squares of what is left are taken; else the state of the
    row, with which the update is found.
    """
    VARIANT: tl.constexpr = SPEC.FLAGS.variant
    FLAGS: tl.constexpr = SPEC.FLAGS
    RULE: tl.constexpr = SPEC.RULE
    g = prepared(values[0], values[1], h, z, SPEC)
    if FLAGS.centralize == "gradient":
        g = (g - first) * (g - first)
    else:
        own = values[2:]
        if FLAGS.ema:
            own = values[3:]
        g, _ = RULE(values[0], g, own + (first,), h.own, VARIANT)
    return g


@jit
def row_averaged(average, mean, h):
    """The state of a row: the average of means that the rule keeps, brought up to date."""
    return h.own[0] * average + h.own[1] * mean


@jit
def centred(values, h, z, known, SPEC: tl.constexpr):
    """The gradient [R, C] that a rule is given."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    g = prepared(values[0], values[1], h, z, SPEC)
    if FLAGS.centralize == "gradient":
        g = g - known[0]
    return g


@jit
def directed(values, g, h, known, SPEC: tl.constexpr):
    """The direction [R, C] of a step, and the new state."""
    RULE: tl.constexpr = SPEC.RULE
    FLAGS: tl.constexpr = SPEC.FLAGS
    VARIANT: tl.constexpr = FLAGS.variant
    p, state = values[0], values[2:]
    own = state
    if FLAGS.ema:
        own = state[1:]
    if FLAGS.row_state:
        own = own + (known[2],)
    direction, own = RULE(p, g, own, h.own, VARIANT)
    if FLAGS.ema:
        own = state[:1] + own
    if FLAGS.centralize == "update":
        direction = direction - known[0]
    if FLAGS.cautious:
        direction = only_where(direction * g > 0, direction)
    if FLAGS.decay == "trusted" and FLAGS.trust != "gradient":
        decays = h.decay != 0
        if FLAGS.cautious_decay:
            decays = decays & (direction * p >= 0)
        direction = where(decays, direction + h.decay * p, direction)
    return direction, own


@jit
def normed(values, h, z, known, SPEC: tl.constexpr):
    """A tuple of blocks [R, C], of which the rule wants the norms over the whole tensor."""
    SQUARES: tl.constexpr = SPEC.SQUARES
    FLAGS: tl.constexpr = SPEC.FLAGS
    VARIANT: tl.constexpr = FLAGS.variant
    g = centred(values, h, z, known, SPEC)
    direction, state = directed(values, g, h, known, SPEC)
    if FLAGS.ema:
        state = state[1:]
    return SQUARES(values[0], g, direction, state, h.own, VARIANT)


@jit
def stepped(values, h, z, known, SPEC: tl.constexpr):
    """The new parameter [R, C], yet to be projected, and the new state.

    known: the mean of its rows, the factor by norms of the whole tensor, the state of its rows (the last of
    the rule's states, where it keeps one).
    """
    FLAGS: tl.constexpr = SPEC.FLAGS
    g = centred(values, h, z, known, SPEC)
    g = trusted(values[0], g, h, known[1], SPEC)
    direction, state = directed(values, g, h, known, SPEC)
    step_size = h.step_size
    if FLAGS.trust == "step":
        step_size = known[1] * step_size
    p = values[0]
    if FLAGS.decay == "decoupled":
        if FLAGS.cautious_decay:
            p = where(direction * p >= 0, h.decay * p, p)
        else:
            p = h.decay * p
    p = p - step_size * direction
    if FLAGS.decay == "proximal":
        p = h.decay * p
    if FLAGS.noise == "weights":
        p = p + z
    return p, state


@jit
def projected(p, squares, h):
    """p [R, C], scaled down where its row's sum of squares says that the row is longer than allowed."""
    norm = sqrt(squares)
    return where(norm > h.longest, p * divide(h.longest, norm), p)


@jit
def rounded(p, bits, SPEC: tl.constexpr):
    """p [R, C] as it will be kept where that is not what a store rounds to, to nearest.

    bits: random words, of which the lower half is used.
    """
    FLAGS: tl.constexpr = SPEC.FLAGS
    DTYPE: tl.constexpr = SPEC.DTYPES[0]
    if FLAGS.master == "split8":
        if FLAGS.rounding == "stochastic":
            p = trimmed(p, bits & 0xFF)
        else:
            p = trimmed(p, 128)
    elif FLAGS.rounding == "stochastic":
        p = stochastic(p, bits & 0xFFFF, DTYPE)
    return p


@jit
def averaged(p, state, h, SPEC: tl.constexpr):
    """The state with the average of the parameter brought up to date: of what is kept of it."""
    FLAGS: tl.constexpr = SPEC.FLAGS
    DTYPE: tl.constexpr = SPEC.DTYPES[0]
    if FLAGS.ema:
        average = state[0]
        if FLAGS.master == "none":
            p = stored(p, DTYPE)
        state = (average + h.share * (p - average),) + state[1:]
    return state
