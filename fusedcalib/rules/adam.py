"""Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with AMSGrad (Reddi et al. 2018)."""

from __future__ import annotations

import torch

from .. import hostmath
from ..hostmath import Group, epsilons
from ..kernels.language import jit, tl
from ..kernels.ops import divide, maximum, sqrt
from ..optimizer import FusedOptimizer
from ..rule import Rule, decay_of


@jit
def adam(p, g, state, h, VARIANT: tl.constexpr):
    beta1_rest, beta2, beta2_rest, correction, inside, outside = h
    v = beta2 * state[1] + beta2_rest * g * g  # in this order g may be as large as torch allows
    m = state[0] + beta1_rest * (g - state[0])
    if VARIANT == "amsgrad":
        largest = maximum(state[2], v)
        return divide(m, sqrt(largest + inside) * correction + outside), (m, v, largest)
    else:
        return divide(m, sqrt(v + inside) * correction + outside), (m, v)


def _variant(group: Group) -> str:
    return "amsgrad" if group["amsgrad"] else "plain"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    unbias = 1 - beta2**step
    inside, outside = epsilons(group)
    step_size = group["lr"] / (1 - beta1**step)
    return step_size, 1 - beta1, beta2, 1 - beta2, 1 / hostmath.sqrt(unbias), inside * unbias, outside


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam, as `torch.optim.Adam`; weight decay is added to the gradient.

    .. math::
        g_t &= P(\nabla f(\theta_{t-1}) + \lambda \theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    With `amsgrad` the largest :math:`v` so far takes the place of :math:`v_t` in the denominator.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda`. Default 0.
        amsgrad: keep the largest second moment. Default False.
        decoupled_weight_decay: decay the parameter, not the gradient (this is AdamW). Default False.
        eps_inside_sqrt: divide by :math:`\sqrt{\hat v_t + \epsilon}` instead, :math:`\epsilon` in units of
            the gradient squared. Default False.

    State: `step` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter; `max_exp_avg_sq` with amsgrad.

    Use it: for transformers and most else, at its default betas; prefer `AdamW` where there is decay.

    Source: Kingma and Ba, "Adam", ICLR 2015, Algorithm 1; Reddi et al., "On the Convergence of Adam and
    Beyond", ICLR 2018; centring: Yong et al., "Gradient Centralization", ECCV 2020, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> opt = fusedcalib.Adam([w], lr=0.1)
    >>> (w * torch.tensor([1.0, -2.0, 4.0])).sum().backward()
    >>> opt.step()  # the first step is lr times the sign of the gradient
    >>> [round(x, 4) for x in w.tolist()]
    [-0.1, 0.1, -0.1]
    """

    rule = Rule(
        update=adam,
        states={
            "plain": ("exp_avg", "exp_avg_sq"),
            "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        },
        nonnegative=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
        variant=_variant,
        scalars=_scalars,
        decay=decay_of,
        extras={"eps_inside_sqrt": False},
    )


class AdamW(Adam, torch.optim.AdamW):
    r"""AdamW, as `torch.optim.AdamW`: Adam with weight decay taken off the parameter first.

    .. math::
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`m, v` of the gradient alone: decay is neither averaged nor centred.

    Args:
        lr, betas, eps, amsgrad, eps_inside_sqrt: as `Adam`.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 1e-2.

    State: as `Adam`.

    Use it: as the default choice for transformers.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> w.grad = torch.zeros(2, 2)
    >>> opt = fusedcalib.AdamW([w], lr=0.5, weight_decay=0.5, centralize=True)
    >>> opt.step()
    >>> w.tolist()
    [[0.75, 0.75], [0.75, 0.75]]
    """
