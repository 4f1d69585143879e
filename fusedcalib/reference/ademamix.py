"""AdEMAMix: Pagliardini et al. 2024."""

import math

import torch
from torch import Tensor

from .pipeline import oracle, steps_taken
from .stages import Oracle, State


def half_life(beta: float) -> float:
    """Count the steps in which an average of decay beta forgets half.

    >>> half_life(0.5), round(half_life(0.9999)), half_life(0.0)
    (1.0, 6931, 0.0)
    """
    return math.log(0.5) / math.log(beta) if beta > 0 else 0.0


def slow_decay(t: int, warmup: float | None, fast: float, slow: float) -> float:
    r"""Find the decay of the slow average at step t, while it warms up from that of the fast one.

    .. math::
        \beta_3(t) = 0.5^{1/h}, \qquad
        h = (1 - t/T) h(\beta_1) + (t/T) h(\beta_3), \qquad h(\beta) = \ln 0.5 / \ln \beta

    Source: Pagliardini et al. 2024, section 3 and appendix A.1: half-lives grow linearly.

    >>> slow_decay(5, None, 0.5, 0.75), slow_decay(8, 8, 0.5, 0.75), slow_decay(4, 8, 0.5, 0.5)
    (0.75, 0.75, 0.5)
    """
    if not warmup or t >= warmup:
        return slow
    h = half_life(fast) + t / warmup * (half_life(slow) - half_life(fast))
    return math.exp(math.log(0.5) / h) if h > 0 else 0.0


@oracle(lr=1e-3, decay="decoupled")
def ademamix(
    g: Tensor,
    state: State,
    *,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 2.0,
    beta3_warmup: float | None = None,
    alpha_warmup: float | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, State]:
    r"""Take one step of AdEMAMix: Adam with a second average of the gradient, a slow one.

    .. math::
        m_1 \leftarrow \beta_1 m_1 + (1 - \beta_1) g, \qquad
        m_2 \leftarrow \beta_3(t) m_2 + (1 - \beta_3(t)) g, \qquad
        \nu \leftarrow \beta_2 \nu + (1 - \beta_2) g^2

    .. math::
        u = \frac{m_1 / (1 - \beta_1^t) + \alpha(t) m_2}{\sqrt{\nu / (1 - \beta_2^t)} + \epsilon}, \qquad
        \alpha(t) = \min(t \alpha / T_\alpha, \alpha)

    with the decay of `slow_decay`.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg_fast`` (m_1), ``exp_avg_slow`` (m_2) and
            ``exp_avg_sq`` (nu), of the weights' shape.
        betas: decay per step of m_1, nu and, after its warm-up, m_2.
        alpha: weight of m_2 after its warm-up.
        beta3_warmup, alpha_warmup: steps of the two warm-ups; None or 0 is none.
        eps: added to the root, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Pagliardini, Ablin, Grangier, The AdEMAMix Optimizer: Better, Faster, Older, ICLR 2025,
    algorithm 1; defaults of the authors' code.

    >>> import torch
    >>> w, state = ademamix(torch.zeros(1), torch.tensor([2.0]), {}, lr=0.5, betas=(0.5, 0.5, 0.75))
    >>> w, state["exp_avg_slow"]
    (tensor([-0.7500]), tensor([0.5000]))
    """
    t = steps_taken(state)
    beta1, beta2, beta3 = betas
    beta3 = slow_decay(t, beta3_warmup, beta1, beta3)
    weight = min(t * alpha / alpha_warmup, alpha) if alpha_warmup else alpha
    m1 = beta1 * state.get("exp_avg_fast", 0.0) + (1 - beta1) * g
    m2 = beta3 * state.get("exp_avg_slow", 0.0) + (1 - beta3) * g
    nu = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    update = (m1 / (1 - beta1**t) + weight * m2) / (torch.sqrt(nu / (1 - beta2**t)) + eps)
    return update, {"step": t, "exp_avg_fast": m1, "exp_avg_slow": m2, "exp_avg_sq": nu}


ORACLES: dict[str, Oracle] = {"AdEMAMix": ademamix}
