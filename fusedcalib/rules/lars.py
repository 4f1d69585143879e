"""LARS (You et al. 2017)."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt, where
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule, Trust, decays_or_always


@jit
def lars(p, g, state, h, VARIANT: tl.constexpr):
    if VARIANT == "plain":
        return g, state
    else:
        buffer = h[0] * state[0] + h[1] * g
        if VARIANT == "nesterov":
            return g + h[0] * buffer, (buffer,)
        else:
            return buffer, (buffer,)


@jit
def weights_and_gradient(p, g, direction, state, h, VARIANT: tl.constexpr):
    return p, g


@jit
def local_rate(sums, count, h, VARIANT: tl.constexpr):
    of_weights, of_gradient = sqrt(sums[0]), sqrt(sums[1])
    both = (of_weights > 0) & (of_gradient > 0)
    below = of_gradient + h[3] * of_weights + h[4]
    rate = h[5] * where(both, divide(h[2] * of_weights, where(both, below, 1.0)), 1.0)
    return where(rate > h[6], h[6], rate)


def _variant(group: Group) -> str:
    if not hostmath.is_on(group["momentum"]):
        return "plain"
    return "nesterov" if group["nesterov"] else "momentum"


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    lr, clipped = group["lr"], group["trust_clip"]
    gain = hostmath.where(step == 1, 1.0, 1 - group["dampening"])
    share = hostmath.where(clipped * lr > 0, 1 / hostmath.where(lr > 0, lr, 1.0), 1.0)
    most = hostmath.where(clipped * lr > 0, 1.0, math.inf)
    rate = group["trust_coeff"], group["weight_decay"], group["eps"]
    return lr, group["momentum"], gain, *rate, share, most


def _check(group: Group) -> None:
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "LARS: nesterov=True needs momentum above 0 and dampening=0, and a group has momentum "
            f"{group['momentum']} and dampening {group['dampening']}"
        )


class LARS(FusedOptimizer, Options):
    r"""LARS: SGD with momentum, with a learning rate for each tensor by its norm and that of its gradient.

    .. math::
        \rho_t &= \tau \frac{\|\theta_{t-1}\|}{\|g_t\| + \lambda \|\theta_{t-1}\| + \epsilon} \\
        b_t &= \mu b_{t-1} + (1 - d)\, \rho_t (g_t + \lambda \theta_{t-1})
            \;(b_1 = \rho_1 (g_1 + \lambda \theta_0)), \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    The norms are Euclidean, of the whole tensor, that of the gradient after centring. Where one of them is 0,
    :math:`\rho_t = 1`. With Nesterov momentum
    :math:`\theta_t = \theta_{t-1} - \gamma (\rho_t (g_t + \lambda \theta_{t-1}) + \mu b_t)`.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1.
        momentum: :math:`\mu`. Default 0; then no state is kept.
        dampening: :math:`d`. Default 0.
        weight_decay: :math:`\lambda`. Default 0.
        nesterov: Nesterov momentum; needs momentum and no dampening. Default False.
        trust_coeff: :math:`\tau`. Default 0.001.
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        trust_clip: whether :math:`\gamma \rho_t` becomes the smaller of the two (LARC). Default False.
        always_adapt: whether groups without weight decay have :math:`\rho_t`, too. Default False: then it
            is 1, and they take SGD's step.

    State: `momentum_buffer`, like the parameter, where momentum is not 0.

    Memory: the norms have to be known before the step. Two launches more, of which one reads parameter and
    gradient: 28 bytes a parameter in fp32, where SGD with momentum reads and writes 20.

    Use it: for convolutional networks with batches of many thousands.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: `centralize="update"`, where ranks share rows: their means would be of an update whose
            length is not known yet.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888, 2017,
    Algorithm 1, its momentum in torch.optim's form; arguments and defaults of timm.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.tensor([0.0, 2.0])
    >>> opt = fusedcalib.LARS([w], trust_coeff=0.5, eps=0.0, always_adapt=True)
    >>> opt.step()  # half of 5 / 2 times the gradient
    >>> w.tolist()
    [3.0, 1.5]
    """

    rule = Rule(
        update=lars,
        scalars=_scalars,
        states={"plain": (), "momentum": ("momentum_buffer",), "nesterov": ("momentum_buffer",)},
        variant=_variant,
        counts=False,
        decay=lambda group: "trusted",
        check=_check,
        trust=Trust(
            weights_and_gradient,
            local_rate,
            sums=2,
            reads=("param", "grad"),
            scales="gradient",
            adapts=decays_or_always,
        ),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        own |= {"weight_decay": weight_decay, "nesterov": nesterov, "trust_coeff": trust_coeff, "eps": eps}
        own |= {"trust_clip": trust_clip, "always_adapt": always_adapt}
        super().__init__(params, own, **options)
