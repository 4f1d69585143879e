"""AdaBelief (Zhuang et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule, decay_of


@jit
def adabelief(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, correction, eps = h
    m = beta1 * state[0] + beta1_rest * g
    surprise = g - m
    s = beta2 * state[1] + beta2_rest * surprise * surprise + eps
    return divide(m, sqrt(s) * correction + eps), (m, s)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    step_size = group["lr"] / (1 - beta1**step)
    averages = beta1, 1 - beta1, beta2, 1 - beta2
    return step_size, *averages, 1 / hostmath.sqrt(1 - beta2**step), group["eps"]


class AdaBelief(FusedOptimizer, Options):
    r"""AdaBelief: Adam that divides by how far gradients are from their average, not by their size.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        \theta_t &= \theta_{t-1} - \gamma
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    The one :math:`\epsilon` is added in both places, as in the paper: also to the state, where it stays.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient squared where it counts; the authors take 1e-8 for
            convolutional networks. Default 1e-16.
        weight_decay: decay, added to the gradient. Default 0.
        decoupled_weight_decay: decay the parameter, not the gradient. Default False.

    State: `step` (0-dim), `exp_avg`, `exp_avg_var` like the parameter.

    Use it: in place of Adam for convolutional and adversarial networks; its steps are long where gradients
    agree with each other.

    Raises:
        ValueError: an argument is out of range.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
    NeurIPS 2020, Algorithm 2. The authors' code also decays the parameter and rectifies as RAdam by default,
    and has AMSGrad: here decay is decoupled where asked for, and the other two are not options.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.AdaBelief([w], lr=0.25, betas=(0.5, 0.999))
    >>> opt.step()  # half of the first gradient is a surprise
    >>> [round(x, 4) for x in w.tolist()]
    [-0.5, 0.5]
    """

    rule = Rule(
        update=adabelief,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_var")},
        decay=decay_of,
        nonnegative=frozenset({"exp_avg_var"}),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own["decoupled_weight_decay"] = decoupled_weight_decay
        super().__init__(params, own, **options)
