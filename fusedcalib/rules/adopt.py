"""ADOPT (Taniguchi et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, maximum, minimum, sqrt, where
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule, decay_of


@jit
def adopt(p, g, state, h, VARIANT: tl.constexpr):
    beta1_rest, beta2, beta2_rest, eps, bound, first = h
    m, v = state
    scaled = divide(g, maximum(sqrt(v), eps))
    clipped = maximum(minimum(scaled, bound), -bound)
    new_m = where(first != 0, m, m + beta1_rest * (clipped - m))
    new_v = where(first != 0, g * g, beta2 * v + beta2_rest * g * g)
    return new_m, (new_m, new_v)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    exponent = group["clip_exponent"]
    bound = hostmath.where(exponent == math.inf, math.inf, (step - 1) ** exponent)
    # The first gradient is only measured: no step is taken.
    first = hostmath.where(step == 1, 1.0, 0.0)
    step_size = hostmath.where(first, 0.0, group["lr"])
    return step_size, 1 - beta1, beta2, 1 - beta2, group["eps"], bound, first


class ADOPT(FusedOptimizer, Options):
    r"""ADOPT: Adam that divides by the past second moment first and averages then; converges for any beta2.

    .. math::
        c_t &= \mathrm{clip}\Bigl(\frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)},\,
            \pm (t - 1)^\kappa \Bigr), \quad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) c_t \\
        \theta_t &= \theta_{t-1} - \gamma m_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    The first gradient takes no step and decays nothing: :math:`v_1 = g_1^2, m_1 = 0`.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.9999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-6.
        weight_decay: decay, added to the gradient. Default 0.
        decoupled_weight_decay: decay the parameter, not the gradient. Default False.
        clip_exponent: :math:`\kappa`; None does not clip. Default 0.25.

    State: `step` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter.

    Use it: in place of Adam where it is unstable, or where the batch is small and the noise large.

    Source: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate",
    NeurIPS 2024, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.ADOPT([w], lr=0.5, betas=(0.5, 0.9999))
    >>> opt.step()
    >>> w.tolist()
    [0.0, 0.0]
    >>> opt.step()
    >>> w.tolist()
    [-0.25, 0.25]
    """

    rule = Rule(
        update=adopt,
        scalars=_scalars,
        states={"plain": ("exp_avg", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        decay=decay_of,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip_exponent: float | None = 0.25,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"decoupled_weight_decay": decoupled_weight_decay, "clip_exponent": clip_exponent}
        super().__init__(params, own, **options)
