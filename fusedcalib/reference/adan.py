"""Adan: Xie et al. 2022, in the form of the authors' code (sail-sg/Adan)."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Oracle, State


@oracle(lr=1e-3, decay="proximal")
def adan(
    g: Tensor,
    state: State,
    *,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
) -> tuple[Tensor, State]:
    r"""Take one step of Adan: Nesterov's momentum from differences of gradients.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        d_t = \beta_2 d_{t-1} + (1 - \beta_2) (g_t - g_{t-1}), \qquad
        n_t = \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 (g_t - g_{t-1}))^2

    .. math::
        u = \Bigl( \frac{m_t}{1 - \beta_1^t} + \beta_2 \frac{d_t}{1 - \beta_2^t} \Bigr)
        / \Bigl( \sqrt{n_t / (1 - \beta_3^t)} + \epsilon \Bigr)

    The first difference is 0. The decay divides the weights after the move, see ``no_prox`` of
    `pipeline.oracle`.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``exp_avg`` (m), ``exp_avg_diff`` (d), ``exp_avg_sq`` (n) and
            ``previous_grad``, the last g that the rule saw, of the weights' shape.
        betas: decay per step of the three averages, as in the code: one minus the paper's.
        eps: added to the root, outside of it, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Xie et al., Adan: Adaptive Nesterov Momentum Algorithm, arXiv 2208.06677, algorithm 1;
    bias corrections, the place of eps and the first step as in the authors' code.

    >>> import torch
    >>> w, state = adan(torch.zeros(2), torch.tensor([3.0, -0.1]), {}, lr=0.5)
    >>> w, state["previous_grad"]
    (tensor([-0.5000,  0.5000]), tensor([ 3.0000, -0.1000]))
    """
    beta1, beta2, beta3 = betas
    t = steps_taken(state)
    change = g - state.get("previous_grad", g)
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    d = beta2 * state.get("exp_avg_diff", 0.0) + (1 - beta2) * change
    n = beta3 * state.get("exp_avg_sq", 0.0) + (1 - beta3) * (g + beta2 * change) ** 2
    ahead = m / (1 - beta1**t) + beta2 * d / (1 - beta2**t)
    update = ahead / root(n / (1 - beta3**t), eps, inside=False)
    averages = {"exp_avg": m, "exp_avg_diff": d, "exp_avg_sq": n}
    return update, {"step": t, **averages, "previous_grad": g.clone()}


ORACLES: dict[str, Oracle] = {"Adan": adan}
