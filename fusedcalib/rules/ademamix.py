"""AdEMAMix (Pagliardini et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group, Number
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule


@jit
def ademamix(p, g, state, h, VARIANT: tl.constexpr):
    beta1, beta1_rest, beta2, beta2_rest, beta3, beta3_rest, unbias1, alpha, correction, eps = h
    fast = beta1 * state[0] + beta1_rest * g
    slow = beta3 * state[1] + beta3_rest * g
    v = beta2 * state[2] + beta2_rest * g * g
    return divide(unbias1 * fast + alpha * slow, sqrt(v) * correction + eps), (fast, slow, v)


def _share(step: Number, warmup: Number) -> Number:
    """How much of a warm-up is over, up to 1; all of it where it has no steps."""
    return hostmath.where(step < warmup, step / hostmath.where(warmup > 0, warmup, 1.0), 1.0)


def _half_life(beta: Number) -> Number:
    """The steps in which an average forgets half of what it is: 0 where beta is 0."""
    return -1 / hostmath.log2(beta)


def _beta3(group: Group, step: Number) -> Number:
    """The decay rate of the slow average, whose half-life grows linearly from that of the fast one."""
    beta1, _, beta3 = group["betas"]
    share = _share(step, group["beta3_warmup"])
    half_life = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
    warm = 0.5 ** (1 / hostmath.where(half_life > 0, half_life, 1e-9))  # 0 where both are 0
    return hostmath.where(share < 1, warm, beta3)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2, _ = group["betas"]
    beta3 = _beta3(group, step)
    averages = beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3
    alpha = group["alpha"] * _share(step, group["alpha_warmup"])
    unbias = 1 / (1 - beta1**step), alpha, 1 / hostmath.sqrt(1 - beta2**step)
    return group["lr"], *averages, *unbias, group["eps"]


class AdEMAMix(FusedOptimizer, Options):
    r"""AdEMAMix: AdamW with a second, slow average, which remembers gradients for tens of thousands of steps.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        s_t = \beta_3(t) s_{t-1} + (1 - \beta_3(t)) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma
            \frac{m_t / (1 - \beta_1^t) + \alpha(t) s_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        \alpha(t) &= \min(t / T_\alpha, 1)\, \alpha, \quad
        h(t) = (1 - t / T_\beta)\, h_1 + (t / T_\beta)\, h_3, \quad
        \beta_3(t) = 2^{-1 / h(t)} \text{ for } t < T_\beta, \text{ else } \beta_3

    :math:`h_i = -1 / \log_2 \beta_i` is the half-life of an average in steps. The slow average has no bias
    correction.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2, \beta_3)`. Default (0.9, 0.999, 0.9999).
        alpha: :math:`\alpha`, the weight of the slow average; the paper takes 4 to 10. Default 2.
        beta3_warmup: :math:`T_\beta`, steps in which the slow average becomes as slow as it is meant to be.
            Default None, no warm-up.
        alpha_warmup: :math:`T_\alpha`, steps in which its weight grows from 0. Default None, no warm-up.
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.

    State: `step` (0-dim), `exp_avg_fast`, `exp_avg_slow`, `exp_avg_sq` like the parameter. A step moves the
    slow average by :math:`1 - \beta_3` of its distance to the gradient, which is less than bytes can tell:
    "8bit" is refused, and bf16 parameters want `state_dtype=torch.float32`.

    Use it: in place of AdamW for long trainings, with both warm-ups as long as the training.

    Raises:
        ValueError: an argument is out of range, or a state is asked for in bytes.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", ICLR 2025,
    Algorithm 1; arguments and defaults of the authors' code, which adds 1e-8 to the betas in half-lives.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([0.5, -2.0])
    >>> opt = fusedcalib.AdEMAMix([w], lr=0.25, betas=(0.9, 0.999, 0.75), alpha=4.0)
    >>> opt.step()  # the sign of the gradient, and alpha times a quarter of it
    >>> [round(x, 4) for x in w.tolist()]
    [-0.5, 0.5]
    """

    rule = Rule(
        update=ademamix,
        scalars=_scalars,
        states={"plain": ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")},
        nonnegative=frozenset({"exp_avg_sq"}),
        wide=frozenset({"exp_avg_slow"}),  # it moves by less than bytes can tell
        decay=lambda group: "decoupled",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "betas": betas, "alpha": alpha, "beta3_warmup": beta3_warmup}
        own |= {"alpha_warmup": alpha_warmup, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, **options)
