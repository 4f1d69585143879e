"""The stages around an update rule, in their one order. Pure functions of loaded values.

`p, g` and the items of `state` are blocks of one shape (or single elements, on the CPU); `h` is the tuple
of scalars of the parameter's group:

    h[0]   weight decay (coupled), or what it leaves of a parameter in a step
    h[1]   step size
    h[2]   L1 penalty
    h[3]   largest norm of a row
    h[4]   standard deviation of the noise
    h[5]   number of the step, from 1
    h[6]   factor of the gradient: unscales and clips it
    h[7]   weight of the new parameter in its average
    h[8]   not 0 if the step is left out (read where the host cannot know: kernels/step.py)
    h[9:]  the rule's own

`z` is the noise of the block, where there is noise. Where an average of the parameter is kept it is the first
item of `state`.

A row mean is taken of `measured(...)` and handed to `stepped(...)`; the norm of a row is that of what
`stepped` returns. How they are taken is the kernel's business: in registers, by a loop, over launches.
`rounded(...)` and `averaged(...)` come last: the average is of parameters as they are stored.
"""

from typing import NamedTuple

from .language import jit, tl
from .ops import divide, negative, sign, sqrt, stochastic, stored, where


class Flags(NamedTuple):
    """What is compiled of the stages, and the rule's variant. A stage that is off leaves no instruction."""

    variant: str
    maximize: bool
    decay: str  # "none" | "coupled" | "decoupled" | "proximal"
    l1: bool
    centralize: str  # "none" | "gradient" | "update"
    project: bool  # onto rows of a largest norm
    noise: str  # "none" | "gradient" | "weights"
    scaled: bool = False  # the gradient, by a factor
    skips: bool = False  # whether a step may turn out to be left out
    ema: bool = False  # an average of the parameter is kept
    rounding: str = "nearest"  # "nearest" | "stochastic", of the parameter

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn."""
        return self.noise != "none" or self.rounding != "nearest"

    @property
    def by_rows(self) -> bool:
        """Whether a row is more than its elements."""
        return self.centralize != "none" or self.project

    def needs(self, part: str) -> bool:
        """Whether a step in parts has this one: "sums" before it, "finish" after it."""
        return {"sums": self.centralize != "none", "finish": self.project}.get(part, True)


@jit
def prepared(p, g, h, z, FLAGS: tl.constexpr):
    """The gradient before centring: sign, penalties, noise, hence P(g + lam p) (Yong et al. 2020, 3.4)."""
    if FLAGS.scaled:
        g = h[6] * g
    if FLAGS.maximize:
        g = negative(g)
    if FLAGS.decay == "coupled":
        # Not g + 0 * p: a group without decay beside one with it must not turn inf into NaN.
        g = where(h[0] != 0, g + h[0] * p, g)
    if FLAGS.l1:
        g = where(h[2] != 0, g + h[2] * sign(p), g)
    if FLAGS.noise == "gradient":
        g = g + z
    return g


@jit
def measured(p, g, state, h, z, RULE: tl.constexpr, FLAGS: tl.constexpr):
    """What the row mean is taken of: the prepared gradient, or the update direction."""
    VARIANT: tl.constexpr = FLAGS.variant  # as an argument Triton 3.6 takes no field of a tuple
    g = prepared(p, g, h, z, FLAGS)
    if FLAGS.centralize == "update":
        if FLAGS.ema:
            g, _ = RULE(p, g, state[1:], h[9:], VARIANT)
        else:
            g, _ = RULE(p, g, state, h[9:], VARIANT)
    return g


@jit
def stepped(p, g, state, h, z, mean, RULE: tl.constexpr, FLAGS: tl.constexpr):
    """The step of one block: the new parameter, yet to be projected, and state. `mean` is its row's."""
    VARIANT: tl.constexpr = FLAGS.variant
    g = prepared(p, g, h, z, FLAGS)
    if FLAGS.centralize == "gradient":
        g = g - mean
    if FLAGS.ema:
        direction, own = RULE(p, g, state[1:], h[9:], VARIANT)
        state = state[:1] + own
    else:
        direction, state = RULE(p, g, state, h[9:], VARIANT)
    if FLAGS.centralize == "update":
        direction = direction - mean
    if FLAGS.decay == "decoupled":
        p = h[0] * p
    p = p - h[1] * direction
    if FLAGS.decay == "proximal":
        p = h[0] * p
    if FLAGS.noise == "weights":
        p = p + z
    return p, state


@jit
def projected(p, squares, h):
    """p, scaled down where its row's sum of squares says that the row is longer than allowed."""
    norm = sqrt(squares)
    return where(norm > h[3], p * divide(h[3], norm), p)


@jit
def rounded(p, bits, FLAGS: tl.constexpr, DTYPE: tl.constexpr):
    """p as a number of DTYPE where that is chosen at random; else the store rounds, to nearest."""
    if FLAGS.rounding == "stochastic":
        p = stochastic(p, bits, DTYPE)
    return p


@jit
def averaged(p, state, h, FLAGS: tl.constexpr, DTYPE: tl.constexpr):
    """The state with the average of the parameter brought up to date: of what DTYPE holds of it."""
    if FLAGS.ema:
        average = state[0]
        state = (average + h[7] * (stored(p, DTYPE) - average),) + state[1:]
    return state
