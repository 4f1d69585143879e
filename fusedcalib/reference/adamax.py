"""Adamax: Kingma and Ba 2015, algorithm 2 (lecture, "Adam Extensions"), torch.optim.Adamax."""

import torch
from torch import Tensor

from .pipeline import oracle, steps_taken
from .stages import Betas, Oracle, State


@oracle(lr=2e-3)
def adamax(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, State]:
    r"""Take one step of Adamax: Adam with the infinity norm in place of the root mean square.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad
        n_t = \max(\beta_2 n_{t-1}, |g| + \epsilon), \qquad
        u = \frac{m_t}{(1 - \beta_1^t) n_t}

    No element of u exceeds :math:`(1 - \beta_1) / (1 - \beta_1 / \beta_2)` in magnitude, 1.009 with
    the default betas.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``exp_avg`` (m) and ``exp_inf`` (n), of the weights' shape.
        betas: decay per step of the average and of the norm.
        eps: keeps the norm from 0, which the paper's has where no gradient came yet.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 2; eps as in torch.optim.Adamax.

    >>> import torch
    >>> w, state = adamax(torch.zeros(2), torch.tensor([3.0, -0.5]), {}, lr=0.5)
    >>> w, state["exp_inf"]
    (tensor([-0.5000,  0.5000]), tensor([3.0000, 0.5000]))
    """
    beta1, beta2 = betas
    t = steps_taken(state)
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    norm = torch.maximum(beta2 * state.get("exp_inf", torch.zeros_like(g)), g.abs() + eps)
    return m / (1 - beta1**t) / norm, {"step": t, "exp_avg": m, "exp_inf": norm}


ORACLES: dict[str, Oracle] = {"Adamax": adamax}
