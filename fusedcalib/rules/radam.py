"""RAdam (Liu et al. 2020)."""

from __future__ import annotations

import torch

from .. import hostmath
from ..hostmath import Group, Number
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt, where
from ..optimizer import FusedOptimizer
from ..rule import Rule, decay_of


@jit
def radam(p, g, state, h, VARIANT: tl.constexpr):
    beta1_rest, beta2, beta2_rest, rectification, eps = h
    v = beta2 * state[1] + beta2_rest * g * g
    m = state[0] + beta1_rest * (g - state[0])
    return where(rectification > 0, divide(rectification * m, sqrt(v) + eps), m), (m, v)


def _rectification(beta2: Number, step: Number) -> Number:
    """The correction of v's bias and variance; 0 while the variance cannot be estimated."""
    longest = 2 / (1 - beta2) - 1
    unbias = 1 - beta2**step
    length = longest - 2 * step * beta2**step / unbias
    known = length > 5
    least = hostmath.where(known, (longest - 4) * (longest - 2) * length, 1.0)
    return hostmath.where(known, hostmath.sqrt((length - 4) * (length - 2) * longest / least * unbias), 0.0)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    step_size = group["lr"] / (1 - beta1**step)
    return step_size, 1 - beta1, beta2, 1 - beta2, _rectification(beta2, step), group["eps"]


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam, as `torch.optim.RAdam`: Adam that waits until its second moment can be trusted.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_t &= \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \quad
            \rho_\infty = \frac{2}{1 - \beta_2} - 1, \quad
            r_t^2 = \frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t} \\
        \theta_t &= \theta_{t-1} - \frac{\gamma\, m_t}{1 - \beta_1^t} \cdot
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
            1 & \text{else} \end{cases}

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: decay, added to the gradient. Default 0.
        decoupled_weight_decay: decay the parameter, not the gradient. Default False.

    State: `step` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter.

    Use it: as Adam, in place of a warm-up of the learning rate. Its first steps (5 with the default betas)
    are plain momentum: of the size of the gradient.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> w.grad = torch.tensor([3.0])
    >>> opt = fusedcalib.RAdam([w], lr=0.5)
    >>> opt.step()  # not yet rectified
    >>> round(w.item(), 4)
    -1.5
    """

    rule = Rule(
        update=radam,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=decay_of,
    )
