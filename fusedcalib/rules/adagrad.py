"""Adagrad (Duchi, Hazan and Singer 2011, in torch.optim's form)."""

from __future__ import annotations

import torch

from ..hostmath import Group, epsilons
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer
from ..rule import Rule


@jit
def adagrad(p, g, state, h, VARIANT: tl.constexpr):
    inside, outside = h
    total = state[0] + g * g
    return divide(g, sqrt(total + inside) + outside), (total,)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    return group["lr"] / (1 + (step - 1) * group["lr_decay"]), *epsilons(group)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad, as `torch.optim.Adagrad`: each element has a step size that only ever falls.

    .. math::
        G_t = G_{t-1} + g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{G_t} + \epsilon}

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-2.
        lr_decay: :math:`\eta`. Default 0.
        weight_decay: L2 penalty, added to the gradient. Default 0.
        initial_accumulator_value: :math:`G_0`, in units of the gradient squared. Default 0.
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-10.
        eps_inside_sqrt: divide by :math:`\sqrt{G_t + \epsilon}` instead, as the lecture, :math:`\epsilon`
            in units of the gradient squared. Default False.

    State: `step` (0-dim), `sum` like the parameter; made in the first step, not when constructed.

    Use it: for features that are seldom active, and convex problems; in long trainings its steps become
    too small.

    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 2011, Figure 1.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.Adagrad([w], lr=0.25)
    >>> opt.step()  # the first step is lr times the sign of the gradient
    >>> w.tolist()
    [-0.25, 0.25]
    """

    rule = Rule(
        update=adagrad,
        scalars=_scalars,
        states={"plain": ("sum",)},
        nonnegative=frozenset({"sum"}),
        wide=frozenset({"sum"}),
        starts={"sum": "initial_accumulator_value"},
        extras={"eps_inside_sqrt": False},
    )

    def share_memory(self) -> None:
        """Makes the state and moves its accumulators to shared memory, for training by several processes."""
        self._engine.make_states(self.param_groups, self.state)
        super().share_memory()
