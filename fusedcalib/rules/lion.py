"""Lion (Chen et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch

from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import sign
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule


@jit
def lion(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest = h
    (m,) = state
    return sign(beta1 * m + beta1_rest * g), (beta2 * m + beta2_rest * g,)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    return group["lr"], beta1, 1 - beta1, beta2, 1 - beta2


class Lion(FusedOptimizer, Options):
    r"""Lion: the sign of a momentum, with one state and decoupled weight decay.

    .. math::
        u_t = \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \quad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t, \quad
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma u_t

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor; 3 to 10 times less than AdamW's.
            Default 1e-4.
        betas: :math:`(\beta_1, \beta_2)`. Default (0.9, 0.99).
        weight_decay: :math:`\lambda`, per unit of learning rate; 3 to 10 times AdamW's. Default 0.

    State: `exp_avg` like the parameter.

    Use it: for large batches where memory for states is scarce.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> w.grad = torch.tensor([0.5, -2.0, 0.0])
    >>> opt = fusedcalib.Lion([w], lr=0.25)
    >>> opt.step()
    >>> w.tolist()
    [-0.25, 0.25, 0.0]
    """

    rule = Rule(
        update=lion,
        scalars=_scalars,
        states={"plain": ("exp_avg",)},
        counts=False,
        decay=lambda group: "decoupled",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)
