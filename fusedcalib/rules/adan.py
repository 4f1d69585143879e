"""Adan (Xie et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt, where
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule


@jit
def adan(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, beta3, beta3_rest, unbias1, unbias2, unbias3, eps, first = h
    change = g - where(first != 0, g, state[3])
    ahead = g + beta2 * change
    m = beta1 * state[0] + beta1_rest * g
    d = beta2 * state[1] + beta2_rest * change
    n = beta3 * state[2] + beta3_rest * ahead * ahead
    return divide(unbias1 * m + unbias2 * d, sqrt(n) * unbias3 + eps), (m, d, n, g)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2, beta3 = group["betas"]
    averages = beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3
    unbias = 1 / (1 - beta1**step), beta2 / (1 - beta2**step), 1 / hostmath.sqrt(1 - beta3**step)
    return group["lr"], *averages, *unbias, group["eps"], hostmath.where(step == 1, 1.0, 0.0)


class Adan(FusedOptimizer, Options):
    r"""Adan: Nesterov's momentum from differences of gradients, with an adaptive step.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        d_t = \beta_2 d_{t-1} + (1 - \beta_2) (g_t - g_{t-1}) \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 (g_t - g_{t-1}))^2 \\
        \theta_t &= \frac{1}{1 + \gamma \lambda} \Bigl( \theta_{t-1} - \gamma
            \frac{m_t / (1 - \beta_1^t) + \beta_2 d_t / (1 - \beta_2^t)}
            {\sqrt{n_t / (1 - \beta_3^t)} + \epsilon} \Bigr), \quad g_0 = g_1

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2, \beta_3)`. Default (0.98, 0.92, 0.99).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.
        no_prox: decay as AdamW does, :math:`(1 - \gamma \lambda) \theta_{t-1}` before the step, instead of
            the division after it. Default False.

    State: `step` (0-dim), `exp_avg`, `exp_avg_diff`, `exp_avg_sq`, `previous_grad` (after penalties and
    centring) like the parameter.

    Use it: for vision transformers and large batches, where four states fit into memory.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", TPAMI
    2024, Algorithm 1, with betas as the averages' decay rates, 1 minus the paper's.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.Adan([w], lr=0.25)
    >>> opt.step()  # the first step is lr times the sign of the gradient
    >>> [round(x, 4) for x in w.tolist()]
    [-0.25, 0.25]
    """

    rule = Rule(
        update=adan,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")},
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=lambda group: "decoupled" if group["no_prox"] else "proximal",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, own, **options)
