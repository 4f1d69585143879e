"""LAMB: You et al. 2020."""

import torch
from torch import Tensor

from .adam import adamw
from .pipeline import Trust, direction_of, oracle
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
) -> tuple[Tensor | None, State]:
    r"""Take one step of LAMB: Adam's direction with decay, as long as the weights are.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2, \\
        u = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w, \qquad
        w \leftarrow w - \eta \frac{\|w\|}{\|u\|} u

    Args:
        g, state, betas, eps: as in `adam`.
        trust_clip: whether the ratio of the norms is 1 at most.
        always_adapt: whether the ratio is taken without weight decay, too.

    Returns:
        New weights and new state, as `adam`.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,
    algorithm 2 with phi the identity.

    >>> import torch
    >>> w, state = lamb(torch.tensor([3.0, 4.0]), torch.ones(2), {}, lr=0.5, weight_decay=0.0, eps=0.0,
    ...     always_adapt=True)
    >>> w  # a step of half the length of the weights, 5, along (1, 1)
    tensor([1.2322, 2.2322])
    """
    return direction_of(adamw)(g, state, betas=betas, eps=eps)


ORACLES: dict[str, Oracle] = {"LAMB": lamb}
