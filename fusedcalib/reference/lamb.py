"""LAMB: You et al. 2020."""

import torch
from torch import Tensor

from .pipeline import Trust, oracle, root, steps_taken
from .stages import Betas, Oracle, State


def _ratio(w: Tensor, g: Tensor, update: Tensor, state: State, options: State) -> Tensor:
    """The length of the weights by that of the update: 1 where one of them has none, or none is wanted."""
    one = torch.ones((), dtype=w.dtype)
    if options["weight_decay"] == 0 and not options["always_adapt"]:
        return one
    of_weights, of_update = torch.linalg.vector_norm(w), torch.linalg.vector_norm(update)
    ratio = of_weights / of_update if of_weights > 0 and of_update > 0 else one
    return ratio.clamp(max=1.0) if options["trust_clip"] else ratio


@oracle(lr=1e-3, weight_decay=0.01, decay="trusted", trust=Trust(_ratio))
def lamb(
    g: Tensor,
    state: State,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-6,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of LAMB: Adam's direction with decay, as long as the weights are.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2, \\
        u = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w, \qquad
        w \leftarrow w - \eta \frac{\|w\|}{\|u\|} u

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg`` (m) and ``exp_avg_sq`` (v), of the
            weights' shape.
        betas: :math:`(\beta_1, \beta_2)`, decay per step of the two averages.
        eps: added to the root, in units of the gradient.
        trust_clip: whether the ratio of the norms is 1 at most.
        always_adapt: whether the ratio is taken without weight decay, too.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,
    algorithm 2 with phi the identity.

    >>> w, state = lamb(torch.tensor([3.0, 4.0]), torch.ones(2), {}, lr=0.5, weight_decay=0.0, eps=0.0,
    ...     always_adapt=True)
    >>> w  # a step of half the length of the weights, 5, along (1, 1)
    tensor([1.2322, 2.2322])
    """
    t, (beta1, beta2) = steps_taken(state), betas
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    update = m / (1 - beta1**t) / root(v / (1 - beta2**t), eps, inside=False)
    return update, {"step": t, "exp_avg": m, "exp_avg_sq": v}


ORACLES: dict[str, Oracle] = {"LAMB": lamb}
