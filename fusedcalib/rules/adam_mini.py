"""Adam-mini: Zhang et al. 2024."""

from __future__ import annotations

from typing import Any

import torch

from .. import hostmath
from ..hostmath import Group
from ..kernels.language import jit, tl
from ..kernels.ops import divide, sqrt
from ..optimizer import FusedOptimizer, ParamsT
from ..options import Options
from ..rule import Rule


@jit
def adam_mini(p, g, state, h, VARIANT: tl.constexpr):
    _, _, beta1, beta1_rest, correction, eps = h
    m = beta1 * state[0] + beta1_rest * g
    return divide(m, sqrt(state[1]) * correction + eps), (m,)


def _scalars(group: Group, step: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    step_size = group["lr"] / (1 - beta1**step)
    correction = 1 / hostmath.sqrt(1 - beta2**step)
    return step_size, beta2, 1 - beta2, beta1, 1 - beta1, correction, group["eps"]


class AdamMini(FusedOptimizer, Options):
    r"""Adam-mini: AdamW with one second moment for each row, so that half of the states are not there.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_{t,r} = \beta_2 v_{t-1,r} + (1 - \beta_2) \, \mathrm{mean}(g_{t,r}^2) \\
        \theta_{t,r} &= (1 - \gamma \lambda) \theta_{t-1,r} - \gamma
            \frac{m_{t,r} / (1 - \beta_1^t)}{\sqrt{v_{t,r} / (1 - \beta_2^t)} + \epsilon}

    A row :math:`r` is one index of dimension 0: an output unit of a Linear or Conv weight, a token of an
    embedding. A vector or scalar is one row; stacks of matrices have those of each matrix where `matrix_dims`
    says so. The paper divides weights of queries and keys by heads, of several rows each, and so they differ
    here; its authors' code also keeps embeddings and heads as AdamW does, and takes other parameters whole.

    Args:
        lr: learning rate :math:`\gamma`, a number or 0-dim tensor. Default 1e-3.
        betas: decay rates :math:`(\beta_1, \beta_2)`. Default (0.9, 0.999).
        eps: :math:`\epsilon`, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda`, per unit of learning rate. Default 0.

    State: `step` (0-dim), `exp_avg` like the parameter; `exp_avg_sq` in fp32 (fp64 where parameters are),
    a number for each row: of the shape of the dimensions that a row is an index of, (1,) for vectors.

    Use it: in the place of AdamW, at its learning rate, where memory is short and `state_dtype="8bit"` is not
    wanted; for transformers.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv 2406.16793),
    Algorithm 1.

    >>> import torch, fusedcalib
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    >>> opt = fusedcalib.AdamMini([w], lr=0.5)
    >>> opt.step()  # rows are scaled by their root mean squares: the root of 12.5 in both
    >>> [[round(x, 3) for x in row] for row in w.tolist()]
    [[-0.424, -0.566], [0.0, -0.707]]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, **options)

    rule = Rule(
        update=adam_mini,
        scalars=_scalars,
        states={"plain": ("exp_avg",)},
        row_state="exp_avg_sq",
        decay=lambda group: "decoupled",
    )
