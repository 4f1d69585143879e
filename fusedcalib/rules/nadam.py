"""NAdam (Dozat 2016)."""

from __future__ import annotations

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer
from ..rule import Rule, decay_of


@jit
def nadam(p, g, state, h, VARIANT: tl.constexpr):
    beta1_rest, beta2, beta2_rest, correction, eps, of_gradient, of_average = h
    v = beta2 * state[1] + beta2_rest * g * g
    m = state[0] + beta1_rest * (g - state[0])
    return divide(of_gradient * g + of_average * m, sqrt(v) * correction + eps), (m, v)


def _mu(group: Group, step: float) -> float:
    """Momentum at a step: Dozat's schedule from half of beta1 up to beta1."""
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))  # type: ignore[no-any-return]


def _scalars(group: Group, step: float, product: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    mu, ahead = _mu(group, step), _mu(group, step + 1)
    averages = 1 - beta1, beta2, 1 - beta2, 1 / hostmath.sqrt(1 - beta2**step), group["eps"]
    return group["lr"], *averages, (1 - mu) / (1 - product), ahead / (1 - product * ahead)


class NAdam(FusedOptimizer, torch.optim.NAdam):
    r"""NAdam, as `torch.optim.NAdam`: Adam that looks ahead along its momentum.

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac12 0.96^{t \psi}), \quad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i}
            + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^t \mu_i}, \quad
        \theta_t = \theta_{t-1} - \gamma \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 2e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: decay, added to the gradient. Default 0.
        momentum_decay: :math:`\psi`. Default 4e-3.
        decoupled_weight_decay: decay the parameter, not the gradient. Default False.

    State: `step`, `mu_product` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter.

    Use it: as Adam, where momentum helps; Ruder's simpler form is `fusedcalib.reference.ruder_nadam`.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> w.grad = torch.tensor([3.0])
    >>> opt = fusedcalib.NAdam([w], lr=0.1)
    >>> opt.step()
    >>> round(opt.state[w]["mu_product"].item(), 4)
    0.4501
    """

    rule = Rule(
        update=nadam,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        product=("mu_product", _mu),
        decay=decay_of,
    )
