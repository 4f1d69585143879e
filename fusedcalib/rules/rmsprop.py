"""RMSprop (Tieleman and Hinton 2012), centred as by Graves (2013)."""

from __future__ import annotations

import torch

from ..hostmath import Group, epsilons, is_on
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer
from ..rule import Rule


@jit
def rmsprop(p, g, state, h, VARIANT: tl.constexpr):
    alpha, alpha_rest, momentum, inside, outside = h
    square = alpha * state[0] + alpha_rest * g * g
    spread = square
    averages = (square,)
    if VARIANT == "centered" or VARIANT == "centered momentum":
        mean = state[1] + alpha_rest * (g - state[1])
        spread = square - mean * mean
        averages = (square, mean)
    scaled = divide(g, sqrt(spread + inside) + outside)
    if VARIANT == "momentum" or VARIANT == "centered momentum":
        buffer = momentum * state[-1] + scaled
        return buffer, averages + (buffer,)
    else:
        return scaled, averages


def _variant(group: Group) -> str:
    words = ["centered"] * group["centered"] + ["momentum"] * is_on(group["momentum"])
    return " ".join(words) or "plain"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    alpha = group["alpha"]
    return group["lr"], alpha, 1 - alpha, group["momentum"], *epsilons(group)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop, as `torch.optim.RMSprop`: the gradient over its root mean square, with momentum.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \quad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    Where `centered`, :math:`v_t - \bar g_t^2` with the average :math:`\bar g_t` of the gradient takes the
    place of :math:`v_t` under the root: an estimate of the variance.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-2.
        alpha: decay rate :math:`\alpha`. Default 0.99.
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: L2 penalty, added to the gradient. Default 0.
        momentum: :math:`\mu`. Default 0; then no buffer is kept.
        centered: divide by the standard deviation. Not `centralize`. Default False.
        eps_inside_sqrt: :math:`\sqrt{v_t + \epsilon}` instead, as the lecture, :math:`\epsilon` in units of
            the gradient squared. Default False.

    State: `step` (0-dim), `square_avg`; `grad_avg` where centered, `momentum_buffer` where momentum is not
    0; like the parameter.

    Use it: for recurrent networks and reinforcement learning, or to follow a recipe that names it.

    Source: Tieleman, Hinton, "Lecture 6.5: RMSProp", Coursera 2012; centered: Graves, "Generating Sequences
    with Recurrent Neural Networks", 2013, eq. 38-45.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> w.grad = torch.tensor([8.0])
    >>> opt = fusedcalib.RMSprop([w], lr=0.5, alpha=0.75, eps=0)
    >>> opt.step()
    >>> w.tolist()
    [-1.0]
    """

    rule = Rule(
        update=rmsprop,
        scalars=_scalars,
        states={
            "plain": ("square_avg",),
            "momentum": ("square_avg", "momentum_buffer"),
            "centered": ("square_avg", "grad_avg"),
            "centered momentum": ("square_avg", "grad_avg", "momentum_buffer"),
        },
        nonnegative=frozenset({"square_avg"}),
        wide=frozenset({"grad_avg"}),  # its square is subtracted from square_avg, to nothing less than zero
        variant=_variant,
        extras={"eps_inside_sqrt": False},
    )
