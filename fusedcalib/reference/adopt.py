"""ADOPT: Taniguchi et al. 2024, in the form of the authors' code (iShohei220/adopt)."""

import torch
from torch import Tensor

from .pipeline import oracle, steps_taken
from .stages import Betas, Oracle, State


@oracle(lr=1e-3)
def adopt(
    g: Tensor,
    state: State,
    *,
    betas: Betas = (0.9, 0.9999),
    eps: float = 1e-6,
    clip_exponent: float | None = 0.25,
) -> tuple[Tensor | None, State]:
    r"""Take one step of ADOPT: Adam that divides by the v of the gradients before this one.

    .. math::
        v_0 = g_0^2, \qquad
        h = \mathrm{clip}\Bigl( \frac{g_k}{\max(\sqrt{v_{k-1}}, \epsilon)}, \pm k^c \Bigr), \qquad
        m_k = \beta_1 m_{k-1} + (1 - \beta_1) h, \qquad u = m_k, \qquad
        v_k = \beta_2 v_{k-1} + (1 - \beta_2) g_k^2

    The first gradient only sets v; the weights neither move nor decay on it.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` (gradients seen, k at the start of a step), ``exp_avg`` (m) and
            ``exp_avg_sq`` (v), of the weights' shape.
        betas: decay per step of the two averages.
        eps: least value of the root, in units of the gradient.
        clip_exponent: c; None does not clip.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal
    Rate, NeurIPS 2024, with clipping; defaults of the authors' code.

    >>> import torch
    >>> w, state = adopt(torch.zeros(1), torch.tensor([2.0]), {}, lr=0.5, betas=(0.5, 0.5))
    >>> w, state["exp_avg_sq"]
    (tensor([0.]), tensor([4.]))
    >>> w, state = adopt(w, torch.tensor([1.0]), state, lr=0.5, betas=(0.5, 0.5))
    >>> w, state["exp_avg_sq"]
    (tensor([-0.1250]), tensor([2.5000]))
    """
    beta1, beta2 = betas
    seen = steps_taken(state) - 1
    if seen == 0:
        return None, {"step": 1, "exp_avg": torch.zeros_like(g), "exp_avg_sq": g**2}
    v = state["exp_avg_sq"]
    h = g / v.sqrt().clamp(min=eps)
    if clip_exponent is not None:
        bound = seen**clip_exponent
        h = h.clamp(-bound, bound)
    m = beta1 * state["exp_avg"] + (1 - beta1) * h
    return m, {"step": seen + 1, "exp_avg": m, "exp_avg_sq": beta2 * v + (1 - beta2) * g**2}


ORACLES: dict[str, Oracle] = {"ADOPT": adopt}
