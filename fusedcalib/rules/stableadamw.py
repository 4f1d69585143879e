"""StableAdamW (Wortsman et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, maximum, sqrt
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule, Trust


@jit
def stableadamw(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, unbias, correction, eps = h
    m = beta1 * state[0] + beta1_rest * g
    v = beta2 * state[1] + beta2_rest * g * g
    return divide(unbias * m, sqrt(v) * correction + eps), (m, v)


@jit
def by_second_moment(p, g, direction, state, h, VARIANT: tl.constexpr):
    return (divide(g, maximum(sqrt(state[1]) * h[5], h[6])),)


@jit
def slowed(sums, count, h, VARIANT: tl.constexpr):
    return divide(count, maximum(sqrt(count * sums[0]), count))


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    averages = beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step)
    return group["lr"], *averages, 1 / hostmath.sqrt(1 - beta2**step), group["eps"]


class StableAdamW(FusedOptimizer, Options):
    r"""StableAdamW: AdamW that slows down where the second moment of a tensor lags behind its gradient.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad \hat v_t = v_t / (1 - \beta_2^t) \\
        \gamma_t &= \gamma / \max\Bigl(1, \sqrt{\mathrm{mean}\bigl(g_t^2 / \max(\hat v_t, \epsilon^2)\bigr)}
            \Bigr) \\
        \theta_t &= (1 - \gamma_t \lambda) \theta_{t-1}
            - \gamma_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t} + \epsilon}

    The mean is over the whole tensor.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.99).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-6.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.01.

    State: `step` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter, as those of AdamW.

    Memory: the mean has to be known before the step. Two launches more, of which one reads the gradient and
    the second moment (and the parameter, where something is added to the gradient): 36 bytes a parameter in
    fp32, where AdamW reads and writes 28.

    Use it: where AdamW's loss has spikes; it makes clipping of gradients superfluous, its authors say.

    Raises:
        ValueError: an argument is out of range.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
    NeurIPS 2023, Algorithm 2; defaults of optimi, whose averages are kept without their bias.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> opt = fusedcalib.StableAdamW([w], lr=0.25, weight_decay=0.0, eps=0.0)
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt.step()  # the first gradient is its own second moment: the step is AdamW's
    >>> [round(x, 4) for x in w.tolist()]
    [-0.25, 0.25]
    """

    rule = Rule(
        update=stableadamw,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=lambda group: "trusted",
        trust=Trust(by_second_moment, slowed, sums=1, reads=("grad", "exp_avg_sq")),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, **options)
