"""The stages around an update rule, in their one order. Pure functions of loaded values.

`p, g` and the items of `state` are blocks of one shape (or single elements, on the CPU); `h` is the tuple
of scalars of the parameter's group: h[0] the weight decay (coupled) or what it leaves of a parameter
(decoupled, 1 - lr * weight_decay), h[1] the step size, h[2:] the rule's own.

A row mean is taken of `measured(...)` and handed to `stepped(...)`. How it is taken is the kernel's
business: in registers, over two launches, or by a loop.
"""

from .language import jit, tl
from .ops import where


@jit
def prepared(p, g, h, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr):
    """The gradient before centring: sign, then coupled decay, hence P(g + lam p) (Yong et al. 2020, 3.4)."""
    if MAXIMIZE:
        g = -g
    if DECAY == "coupled":
        # Not g + 0 * p: a group without decay beside one with it must not turn inf into NaN.
        g = where(h[0] != 0, g + h[0] * p, g)
    return g


@jit
def measured(
    p,
    g,
    state,
    h,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
):
    """What the row mean is taken of: the prepared gradient, or the update direction."""
    g = prepared(p, g, h, MAXIMIZE, DECAY)
    if CENTRALIZE == "update":
        g, state = RULE(p, g, state, h[2:], VARIANT)
    return g


@jit
def stepped(
    p,
    g,
    state,
    h,
    mean,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAY: tl.constexpr,
    CENTRALIZE: tl.constexpr,
):
    """The whole step of one block: the new parameter and state. `mean` broadcasts over its row."""
    g = prepared(p, g, h, MAXIMIZE, DECAY)
    if CENTRALIZE == "gradient":
        g = g - mean
    direction, state = RULE(p, g, state, h[2:], VARIANT)
    if CENTRALIZE == "update":
        direction = direction - mean
    if DECAY == "decoupled":
        p = h[0] * p
    p = p - h[1] * direction
    return p, state
