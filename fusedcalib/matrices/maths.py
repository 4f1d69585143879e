"""The maths of both halves of a step, of loaded values: the executors compile it."""

from __future__ import annotations

from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt


@jit
def momentum_or_adamw(p, g, state, h, VARIANT: tl.constexpr):
    momentum_rest, beta1_rest, beta2, beta2_rest, correction, eps = h
    if VARIANT == "adamw":
        v = beta2 * state[1] + beta2_rest * g * g
        m = state[0] + beta1_rest * (g - state[0])
        return divide(m, sqrt(v) * correction + eps), (m, v)
    else:
        buffer = state[0] + momentum_rest * (g - state[0])
        if VARIANT == "nesterov":
            return g, (buffer, buffer + momentum_rest * (g - buffer))
        else:
            return g, (buffer, buffer)


@jit
def along_update(p, g, state, h, VARIANT: tl.constexpr):
    return state[0], state
