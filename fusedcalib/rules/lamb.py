"""LAMB (You et al. 2020)."""

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
def lamb(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, unbias, correction, eps, _ = h
    m = beta1 * state[0] + beta1_rest * g
    v = beta2 * state[1] + beta2_rest * g * g
    return divide(unbias * m, sqrt(v) * correction + eps), (m, v)


@jit
def weights_and_direction(p, g, direction, state, h, VARIANT: tl.constexpr):
    return p, direction


@jit
def trust_ratio(sums, count, h, VARIANT: tl.constexpr):
    both = (sums[0] > 0) & (sums[1] > 0)
    ratio = where(both, divide(sqrt(sums[0]), sqrt(where(both, sums[1], 1.0))), 1.0)
    return where(ratio > h[7], h[7], ratio)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    correction = 1 / hostmath.sqrt(1 - beta2**step)
    most = hostmath.where(group["trust_clip"], 1.0, math.inf)
    averages = beta1, 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step)
    return group["lr"], *averages, correction, group["eps"], most


_READ = ("param", "grad", "exp_avg", "exp_avg_sq")
_RULE = Rule(
    update=lamb,
    scalars=_scalars,
    states={"plain": ("exp_avg", "exp_avg_sq")},
    nonnegative=frozenset({"exp_avg_sq"}),
    decay=lambda group: "trusted",
    trust=Trust(weights_and_direction, trust_ratio, 2, _READ, adapts=decays_or_always),
)


class LAMB(FusedOptimizer, Options):
    r"""LAMB: AdamW whose step is as long as the tensor it moves, for batches of tens of thousands.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_{t-1},
        \quad
        \theta_t = \theta_{t-1} - \gamma \frac{\|\theta_{t-1}\|}{\|u_t\|} u_t

    The norms are Euclidean, of the whole tensor. Where one of them is 0, their ratio is taken as 1.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-6.
        weight_decay: :math:`\lambda`. Default 0.01.
        trust_clip: whether the ratio of the norms is 1 at most (LAMBC). Default False.
        always_adapt: whether groups without weight decay, as those of biases and norms, take the ratio, too;
            they take Adam's step otherwise. Default False.

    State: `step` (0-dim), `exp_avg`, `exp_avg_sq` like the parameter.

    Memory: the norms have to be known before the step. Two launches more, of which one reads all that the
    step reads: 44 bytes a parameter in fp32, where AdamW reads and writes 28.

    Use it: for very large batches, with the learning rate growing as the root of the batch.

    Raises:
        ValueError: an argument is out of range.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
    Algorithm 2, its :math:`\phi` the identity; `trust_clip` and `always_adapt` as in timm. The authors clip
    the norm of all gradients to 1, as timm's and apex's classes do by default: here `max_grad_norm=1.0`.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.tensor([0.1, 2.0])
    >>> opt = fusedcalib.LAMB([w], lr=0.5, weight_decay=0.0, eps=0.0, always_adapt=True)
    >>> opt.step()  # half of its length, 5, along (1, 1)
    >>> [round(x, 4) for x in w.tolist()]
    [1.2322, 2.2322]
    """

    rule = _RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **options: Any,
    ) -> None:
        ratio: dict[str, Any] = {"trust_clip": trust_clip, "always_adapt": always_adapt}
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | ratio
        super().__init__(params, own, **options)
