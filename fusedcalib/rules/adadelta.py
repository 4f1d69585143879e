"""Adadelta (Zeiler 2012)."""

from __future__ import annotations

import torch

from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer
from ..rule import Rule


@jit
def adadelta(p, g, state, h, VARIANT: tl.constexpr):
    rho, rho_rest, eps = h
    square = rho * state[0] + rho_rest * g * g
    delta = divide(sqrt(state[1] + eps), sqrt(square + eps)) * g
    return delta, (square, rho * state[1] + rho_rest * delta * delta)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    rho = group["rho"]
    return group["lr"], rho, 1 - rho, group["eps"]


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""Adadelta, as `torch.optim.Adadelta`: steps in the units of the parameter, from its own past steps.

    .. math::
        v_t &= \rho v_{t-1} + (1 - \rho) g_t^2, \quad
        \Delta_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t \\
        u_t &= \rho u_{t-1} + (1 - \rho) \Delta_t^2, \quad
        \theta_t = \theta_{t-1} - \gamma \Delta_t

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor; 1 is the paper's form. Default 1.
        rho: decay rate :math:`\rho` of both averages. Default 0.9.
        eps: :math:`\epsilon`, in units of the gradient squared; it also sets the size of the first
            steps. Default 1e-6.
        weight_decay: L2 penalty, added to the gradient. Default 0.

    State: `step` (0-dim), `square_avg`, `acc_delta` like the parameter.

    Use it: where no learning rate is to be tuned; it starts slowly.

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, Algorithm 1.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> w.grad = torch.tensor([4.0])
    >>> opt = fusedcalib.Adadelta([w], eps=1.0, rho=0.5)
    >>> opt.step()
    >>> round(-w.item() / 4, 4)  # 1 / sqrt(8 + 1)
    0.3333
    """

    rule = Rule(
        update=adadelta,
        scalars=_scalars,
        states={"plain": ("square_avg", "acc_delta")},
        nonnegative=frozenset({"square_avg", "acc_delta"}),
    )
