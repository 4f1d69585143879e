"""AdaBelief: Zhuang et al. 2020."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Betas, Oracle, State


@oracle(lr=1e-3)
def adabelief(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-16
) -> tuple[Tensor, State]:
    r"""Take one step of AdaBelief: Adam with the distance of g from its average in the place of its size.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g - m_t)^2 + \epsilon, \qquad
        u = \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg`` (m) and ``exp_avg_var`` (s), of the
            weights' shape.
        betas: decay per step of the two averages.
        eps: added to s in every step, where it stays, and to the root.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Zhuang et al., AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients,
    NeurIPS 2020, algorithm 2, without projection; default of eps of the authors' code.

    >>> import torch
    >>> w, state = adabelief(torch.zeros(1), torch.tensor([2.0]), {}, lr=0.5, betas=(0.5, 0.75))
    >>> w, state["exp_avg_var"]
    (tensor([-1.]), tensor([0.2500]))
    """
    t, (beta1, beta2) = steps_taken(state), betas
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    s = beta2 * state.get("exp_avg_var", 0.0) + (1 - beta2) * (g - m) ** 2 + eps
    update = m / (1 - beta1**t) / root(s / (1 - beta2**t), eps, inside=False)
    return update, {"step": t, "exp_avg": m, "exp_avg_var": s}


ORACLES: dict[str, Oracle] = {"AdaBelief": adabelief}
