"""Stochastic gradient descent with momentum (Sutskever et al. 2013, in torch.optim's form)."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..optimizer import FusedOptimizer
from ..rule import Rule


@jit
def sgd(p, g, state, h, VARIANT: tl.constexpr):
    if VARIANT == "plain":
        return g, state
    else:
        momentum, gain = h
        buffer = momentum * state[0] + gain * g
        if VARIANT == "nesterov":
            return g + momentum * buffer, (buffer,)
        else:
            return buffer, (buffer,)


def _variant(group: Group) -> str:
    if not hostmath.is_on(group["momentum"]):
        return "plain"
    return "nesterov" if group["nesterov"] else "momentum"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    gain = hostmath.where(step == 1, 1.0, 1 - group["dampening"])  # torch: the first step is not dampened
    return group["lr"], group["momentum"], gain


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""SGD with momentum, dampening and Nesterov momentum, as `torch.optim.SGD`.

    .. math::
        g_t = P(\nabla f(\theta_{t-1}) + \lambda \theta_{t-1}), \quad
        b_t = \mu b_{t-1} + (1 - \tau) g_t \;(b_1 = g_1), \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    with Nesterov momentum :math:`\theta_t = \theta_{t-1} - \gamma (g_t + \mu b_t)`.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        momentum: :math:`\mu`. Default 0; then no state is kept.
        dampening: :math:`\tau`. Default 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient. Default 0.
        nesterov: Nesterov momentum; needs momentum and no dampening. Default False.

    State: `momentum_buffer`, like the parameter, where momentum is not 0.

    Use it: for convolutional networks, and wherever memory is scarce; it wants a tuned learning rate and
    schedule.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML
    2013; centring: Yong et al., "Gradient Centralization", ECCV 2020, Algorithm 1.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.ones(2, 3))
    >>> opt = fusedcalib.SGD([w], lr=0.1, momentum=0.9, centralize=True)
    >>> (w * torch.arange(3.0)).sum().backward()
    >>> opt.step()
    >>> w.sum(dim=1).tolist()
    [3.0, 3.0]
    """

    rule = Rule(
        update=sgd,
        states={"plain": (), "momentum": ("momentum_buffer",), "nesterov": ("momentum_buffer",)},
        variant=_variant,
        scalars=_scalars,
        counts=False,
    )


class SGDW(SGD):
    r"""SGDW: SGD with weight decay taken off the parameter first.

    .. math::
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma b_t

    with :math:`b_t` of the gradient alone, as in `SGD`: decay is neither averaged nor centred.

    Args:
        lr, momentum, dampening, nesterov: as `SGD`.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.

    State: as `SGD`.

    Use it: as `SGD`, where learning rate and decay are to be tuned apart.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 1; the
    learning rate multiplies the decay as in torch.optim.AdamW.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.zeros(2)
    >>> opt = fusedcalib.SGDW([w], lr=0.5, momentum=0.9, weight_decay=0.5)
    >>> opt.step()
    >>> w.tolist()
    [0.75, 0.75]
    """

    rule = replace(SGD.rule, decay=lambda group: "decoupled")
