"""Signum and signSGD (Bernstein et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch

from ..hostmath import Group, is_on
from ..kernels.language import jit, tl
from ..kernels.ops import sign
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule, decay_of


@jit
def signum(p, g, state, h, VARIANT: tl.constexpr):
    if VARIANT == "plain":
        return sign(g), state
    else:
        momentum, momentum_rest = h
        m = momentum * state[0] + momentum_rest * g
        return sign(m), (m,)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    momentum = group["momentum"]
    return group["lr"], momentum, 1 - momentum


class Signum(FusedOptimizer, Options):
    r"""Signum: the sign of an average of the gradient; signSGD without momentum.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \quad
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma\, \mathrm{sign}(m_t)

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor: what every element moves by. Default 1e-4.
        momentum: :math:`\beta`. Default 0.9; 0 is signSGD, which keeps no state.
        weight_decay: :math:`\lambda`. Default 0.
        decoupled_weight_decay: decay the parameter, not the gradient. Default True.

    State: `momentum_buffer` like the parameter, where momentum is not 0.

    Use it: as the simplest of the sign methods, to compare others with.

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018,
    Algorithms 1 and 2; decay as in "signSGD with Majority Vote", ICLR 2019, Algorithm 1.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> w.grad = torch.tensor([0.5, -2.0, 0.0])
    >>> opt = fusedcalib.Signum([w], lr=0.25)
    >>> opt.step()
    >>> w.tolist()
    [-0.25, 0.25, 0.0]
    """

    rule = Rule(
        update=signum,
        scalars=_scalars,
        states={"plain": (), "momentum": ("momentum_buffer",)},
        variant=lambda group: "momentum" if is_on(group["momentum"]) else "plain",
        counts=False,
        decay=decay_of,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        own["decoupled_weight_decay"] = decoupled_weight_decay
        super().__init__(params, own, **options)
