"""RAdam: Liu et al. 2020, torch.optim.RAdam."""

import math

from torch import Tensor

from .adam import averages
from .pipeline import oracle, root
from .stages import Betas, Oracle, State


@oracle(lr=1e-3)
def radam(g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> tuple[Tensor, State]:
    r"""Take one step of rectified Adam, which does not divide while v rests on few gradients.

    .. math::
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
        {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

    .. math::
        u = r_t \hat m \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon}
        \text{ where } \rho_t > 5, \text{ else } \hat m

    with m and v as in `adam`.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``exp_avg`` (m) and ``exp_avg_sq`` (v), of the weights' shape.
        betas: decay per step of the two averages.
        eps: added to the root of v before its bias correction, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, ICLR 2020,
    algorithm 2, with the threshold 5 and the place of eps of torch.optim.RAdam (paper: 4, none).

    >>> import torch
    >>> w, state = radam(torch.zeros(2), torch.tensor([3.0, -0.5]), {}, lr=0.5)
    >>> w
    tensor([-1.5000,  0.2500])
    """
    beta1, beta2 = betas
    t, m, v = averages(g, state, betas)
    new_state: State = {"step": t, "exp_avg": m, "exp_avg_sq": v}

    m_hat, correction = m / (1 - beta1**t), 1 - beta2**t
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / correction
    if length <= 5:
        return m_hat, new_state
    rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return m_hat * math.sqrt(rectified * correction) / root(v, eps, inside=False), new_state


ORACLES: dict[str, Oracle] = {"RAdam": radam}
