"""Stochastic gradient descent with momentum (Sutskever et al. 2013, in torch.optim's form)."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.language import jit, tl
from ..optimizer import FusedOptimizer, ParamsT
from ..recipe import Group, Rule


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
    if group["momentum"] == 0:
        return "plain"
    return "nesterov" if group["nesterov"] else "momentum"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    if group["momentum"] == 0:
        return (group["lr"],)
    gain = 1.0 if step == 1 else 1 - group["dampening"]  # torch: the first step is not dampened
    return group["lr"], group["momentum"], gain


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""SGD with momentum, dampening and Nesterov momentum, as `torch.optim.SGD`.

    .. math::
        g_t = P(\nabla f(\theta_{t-1}) + \lambda \theta_{t-1}), \quad
        b_t = \mu b_{t-1} + (1 - \tau) g_t \;(b_1 = g_1), \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    with Nesterov :math:`\theta_t = \theta_{t-1} - \gamma (g_t + \mu b_t)`. :math:`P` removes the row mean
    where `centralize` is set, and is the identity elsewhere.

    Args:
        params: parameters, named parameters or param groups, as torch.optim takes them.
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        momentum: :math:`\mu`. Default 0; then no state is kept.
        dampening: :math:`\tau`. Default 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient. Default 0.
        nesterov: Nesterov momentum; needs momentum and no dampening. Default False.
        maximize: ascend instead of descend. Default False.
        foreach, fused: accepted for compatibility; the step is always one fused pass.
        differentiable: must be False.
        centralize: remove the mean of each row (dim 0) from the gradient ("gradient" or True) or from
            the update ("update"). Default False.
        centralize_min_ndim: centre tensors of at least this many dimensions; 4 means convolutions
            only. Default 2.
        backend: "auto", "triton", "numba" or "eager".

    State: `momentum_buffer`, like the parameter, where momentum is not 0.

    Raises:
        ValueError: an argument out of range, as torch.optim.SGD.

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

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **extras,
        )
