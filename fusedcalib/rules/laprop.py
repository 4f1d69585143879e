"""LaProp (Ziyin et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule


@jit
def laprop(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, correction, eps = h
    v = beta2 * state[1] + beta2_rest * g * g
    scaled = divide(g, sqrt(v) * correction + eps)
    m = beta1 * state[0] + beta1_rest * scaled
    return m, (m, v)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    step_size = group["lr"] / (1 - beta1**step)
    averages = beta1, 1 - beta1, beta2, 1 - beta2
    return step_size, *averages, 1 / hostmath.sqrt(1 - beta2**step), group["eps"]


class LaProp(FusedOptimizer, Options):
    r"""LaProp: Adam that divides each gradient first and averages the quotients.

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma \frac{m_t}{1 - \beta_1^t}

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 4e-4.
        betas: decay rates :math:`(\beta_1, \beta_2)`; the second may be the smaller. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-15.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.

    State: `step` (0-dim), `exp_avg` (of the quotients), `exp_avg_sq` like the parameter.

    Use it: in place of AdamW where :math:`\beta_2` is to be small, or gradients are noisy.

    Raises:
        ValueError: an argument is out of range.

    Source: Ziyin, Wang, Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", arXiv 2002.04839, 2020,
    Algorithm 1. The authors' code has the learning rate within the average, which is another step where the
    rate changes, and decays after the step, by :math:`\lambda` whatever the rate; here it is as in AdamW.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.LaProp([w], lr=0.25)
    >>> opt.step()  # the first step is lr times the sign of the gradient
    >>> [round(x, 4) for x in w.tolist()]
    [-0.25, 0.25]
    """

    rule = Rule(
        update=laprop,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=lambda group: "decoupled",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, **options)
