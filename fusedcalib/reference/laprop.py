"""LaProp: Ziyin et al. 2020."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Betas, Oracle, State


@oracle(lr=4e-4, decay="decoupled")
def laprop(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-15
) -> tuple[Tensor, State]:
    r"""Take one step of LaProp: the average of what RMSprop would do, both without their bias.

    .. math::
        n_t = \nu n_{t-1} + (1 - \nu) g^2, \qquad
        m_t = \mu m_{t-1} + (1 - \mu) \frac{g}{\sqrt{n_t / (1 - \nu^t)} + \epsilon}, \qquad
        u = \frac{m_t}{1 - \mu^t}

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg`` (m) and ``exp_avg_sq`` (n), of the
            weights' shape.
        betas: :math:`(\mu, \nu)`, decay per step of the two averages.
        eps: added to the root, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Ziyin, Wang, Ueda, LaProp: Separating Momentum and Adaptivity in Adam, 2020, algorithm 1;
    defaults of the authors' code, decay as in `adamw`.

    >>> import torch
    >>> w, state = laprop(torch.zeros(1), torch.tensor([2.0]), {}, lr=0.5, betas=(0.5, 0.75))
    >>> w, state["exp_avg"], state["exp_avg_sq"]
    (tensor([-0.5000]), tensor([0.5000]), tensor([1.]))
    """
    t, (mu, nu) = steps_taken(state), betas
    n = nu * state.get("exp_avg_sq", 0.0) + (1 - nu) * g**2
    quotient = g / root(n / (1 - nu**t), eps, inside=False)
    m = mu * state.get("exp_avg", 0.0) + (1 - mu) * quotient
    return m / (1 - mu**t), {"step": t, "exp_avg": m, "exp_avg_sq": n}


ORACLES: dict[str, Oracle] = {"LaProp": laprop}
