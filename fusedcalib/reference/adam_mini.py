"""Adam-mini: Zhang et al. 2024."""

import torch
from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Betas, Oracle, State


@oracle(lr=1e-3, decay="decoupled")
def adam_mini(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, State]:
    r"""Take one step of Adam-mini: Adam with one second moment for each row.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{mean}(g \odot g), \qquad
        u = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    A row is one index of dimension 0, the paper's partition of weights by output neuron and of
    embeddings by token; a vector or a scalar is one block. A row without elements keeps its v.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (steps taken so far), ``exp_avg`` (m), of the weights' shape, and
            ``exp_avg_sq`` (v), ``[rows]``.
        betas: decay per step of the two averages.
        eps: added to the root.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, arXiv 2406.16793,
    algorithm 1.

    >>> import torch
    >>> w, state = adam_mini(torch.zeros(1, 2), torch.tensor([[1.0, 7.0]]), {}, lr=5.0)
    >>> w, state["exp_avg_sq"]
    (tensor([[-1., -7.]]), tensor([0.0250]))
    """
    t, (beta1, beta2) = steps_taken(state), betas
    blocks = g.flatten(1) if g.ndim > 1 else g.reshape(1, g.numel())
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    if not g.numel():
        beta2 = 1.0  # rows of nothing keep their number
    square = torch.linalg.vector_norm(blocks, dim=1) ** 2 / max(1, blocks.shape[1])
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * square
    wide = v.reshape(-1, *[1] * (g.ndim - 1)) if g.ndim else v.reshape(())
    update = m / (1 - beta1**t) / root(wide / (1 - beta2**t), eps, inside=False)
    return update, {"step": t, "exp_avg": m, "exp_avg_sq": v}


ORACLES: dict[str, Oracle] = {"AdamMini": adam_mini}
