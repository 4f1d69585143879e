"""Adam and AdamW: Kingma and Ba 2015 (lecture eq. 13-15, GC algorithm 2); Loshchilov and Hutter."""

from typing import Any

import torch
from torch import Tensor

from .pipeline import direction_of, oracle, root, steps_taken
from .stages import Betas, Oracle, State


def averages(g: Tensor, state: State, betas: Betas) -> tuple[int, Tensor, Tensor]:
    r"""Take the averages of the gradient and of its square one step on, from zero.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2

    Returns:
        t, counted from 1, m and v.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, that is Yao, lecture, eq. 13.
    """
    beta1, beta2 = betas
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    return steps_taken(state), m, v


@oracle(lr=1e-3)
def adam(
    g: Tensor,
    state: State,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    eps_inside_sqrt: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of Adam.

    .. math::
        \hat m = m_t / (1 - \beta_1^t), \qquad \hat v = v_t / (1 - \beta_2^t), \qquad
        u = \hat m / (\sqrt{\hat v} + \epsilon)

    with m and v from `averages`.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far: int or 0-dim tensor), ``exp_avg`` (m),
            ``exp_avg_sq`` (v) and, for AMSGrad, ``max_exp_avg_sq``, of the weights' shape.
        betas: decay per step of the two averages.
        eps: added to the root, outside of it, in units of the gradient.
        amsgrad: divide by the largest v so far in place of v, both uncorrected, as torch does.
        eps_inside_sqrt: divide by :math:`\sqrt{\hat v + \epsilon}`, the lecture's table.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, that is Yao, lecture, eq. 13-15;
    Yong et al. 2020, algorithm 2 and section 3.4; AMSGrad: Reddi et al., ICLR 2018.

    >>> import torch
    >>> w, state = adam(torch.zeros(2), torch.tensor([3.0, -0.1]), {}, lr=0.5)
    >>> w, state["step"]
    (tensor([-0.5000,  0.5000]), 1)
    """
    t, m, v = averages(g, state, betas)
    new_state: State = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(v)), v)
        new_state["max_exp_avg_sq"] = v
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return m_hat / root(v_hat, eps, eps_inside_sqrt), new_state


@oracle(lr=1e-3, weight_decay=1e-2, decay="decoupled")
def adamw(g: Tensor, state: State, **options: Any) -> tuple[Tensor | None, State]:
    r"""Take one step of AdamW: Adam whose decay acts on the weights, not on the gradient.

    .. math:: w \leftarrow (1 - \eta \lambda) w - \eta u, \qquad u \text{ as in } adam(g)

    Args:
        g, state, options: as in `adam`.

    Returns:
        New weights and new state, as `adam`.

    Source: Loshchilov and Hutter, ICLR 2019, algorithm 2, in the form of torch.optim.AdamW.

    >>> import torch
    >>> w, state = adamw(torch.ones(1), torch.ones(1), {}, lr=0.5, weight_decay=0.5)
    >>> w
    tensor([0.2500])
    """
    return direction_of(adam)(g, state, **options)


ORACLES: dict[str, Oracle] = {"Adam": adam, "AdamW": adamw}
