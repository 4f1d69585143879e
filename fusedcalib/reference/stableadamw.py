"""StableAdamW: Wortsman et al. 2023."""

import torch
from torch import Tensor

from .pipeline import Trust, oracle, root, steps_taken
from .stages import Betas, Oracle, State


def _slower(w: Tensor, g: Tensor, update: Tensor, state: State, options: State) -> Tensor:
    """One over the root mean square of the gradient by its running root mean square, where that is above 1."""
    v = state["exp_avg_sq"] / (1 - options["betas"][1] ** state["step"])
    rms = (g**2 / v.clamp(min=options["eps"] ** 2)).mean().sqrt()
    return 1 / rms.clamp(min=1.0)


@oracle(lr=1e-3, weight_decay=0.01, decay="trusted", trust=Trust(_slower))
def stableadamw(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.99), eps: float = 1e-6
) -> tuple[Tensor, State]:
    r"""Take one step of StableAdamW: AdamW, slower where the second moment lags behind the gradient.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2, \\
        \hat v = v_t / (1 - \beta_2^t), \qquad
        \eta_t = \eta / \max\bigl(1, \sqrt{\mathrm{mean}(g^2 / \max(\hat v, \epsilon^2))}\bigr), \\
        w \leftarrow (1 - \eta_t \lambda) w - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg`` (m) and ``exp_avg_sq`` (v), of the
            weights' shape.
        betas: :math:`(\beta_1, \beta_2)`, decay per step of the two averages.
        eps: added to the root, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
    NeurIPS 2023, algorithm 2.

    >>> w, state = stableadamw(torch.ones(1), torch.ones(1), {}, lr=0.5, weight_decay=0.0, eps=0.0)
    >>> w  # the first gradient is its own second moment
    tensor([0.5000])
    """
    t, (beta1, beta2) = steps_taken(state), betas
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    update = m / (1 - beta1**t) / root(v / (1 - beta2**t), eps, inside=False)
    return update, {"step": t, "exp_avg": m, "exp_avg_sq": v}


ORACLES: dict[str, Oracle] = {"StableAdamW": stableadamw}
