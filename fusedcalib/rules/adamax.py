"""Adamax (Kingma and Ba 2015, section 7.1)."""

from __future__ import annotations

import torch

from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import absolute, divide, maximum
from ..optimizer import FusedOptimizer
from ..rule import Rule


@jit
def adamax(p, g, state, h, VARIANT: tl.constexpr):
    beta1_rest, beta2, eps = h
    m = state[0] + beta1_rest * (g - state[0])
    largest = maximum(beta2 * state[1], absolute(g) + eps)
    return divide(m, largest), (m, largest)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), 1 - beta1, beta2, group["eps"]


class Adamax(FusedOptimizer, torch.optim.Adamax):
    r"""Adamax, as `torch.optim.Adamax`: Adam with a decaying maximum in place of the second moment.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon), \quad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 2e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: L2 penalty, added to the gradient. Default 0.

    State: `step` (0-dim), `exp_avg`, `exp_inf` like the parameter.

    Use it: where gradients are rare or have heavy tails, as for embeddings.

    Source: Kingma and Ba, "Adam", ICLR 2015, Algorithm 2; :math:`\epsilon`, without which an element
    never touched is 0 / 0, as in torch.optim.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.Adamax([w], lr=0.25, eps=0)
    >>> opt.step()  # the first step is lr times the sign of the gradient
    >>> [round(x, 4) for x in w.tolist()]
    [-0.25, 0.25]
    """

    rule = Rule(
        update=adamax,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_inf")},
        nonnegative=frozenset({"exp_inf"}),
    )
