"""StableAdamW: Wortsman et al. 2023."""

from torch import Tensor

from .adam import adamw
from .pipeline import Trust, direction_of, oracle
from .stages import Betas, Oracle, State


def _slower(w: Tensor, g: Tensor, update: Tensor, state: State, options: State) -> Tensor:
    """One over the RMS of the gradient by the root of its second moment, where that is above 1."""
    v = state["exp_avg_sq"] / (1 - options["betas"][1] ** state["step"])
    rms = (g**2 / v.clamp(min=options["eps"] ** 2)).mean().sqrt()
    factor: Tensor = 1 / rms.clamp(min=1.0)
    return factor


@oracle(lr=1e-3, weight_decay=0.01, decay="trusted", trust=Trust(_slower))
def stableadamw(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.99), eps: float = 1e-6
) -> tuple[Tensor | None, State]:
    r"""Take one step of StableAdamW: AdamW, slower where the second moment lags behind the gradient.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2, \\
        \hat v = v_t / (1 - \beta_2^t), \qquad
        \eta_t = \eta / \max\bigl(1, \sqrt{\mathrm{mean}(g^2 / \max(\hat v, \epsilon^2))}\bigr), \\
        w \leftarrow (1 - \eta_t \lambda) w - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}

    Args:
        g, state, betas, eps: as in `adam`.

    Returns:
        New weights and new state, as `adam`.

    Source: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
    NeurIPS 2023, algorithm 2.

    >>> import torch
    >>> w, state = stableadamw(torch.ones(1), torch.ones(1), {}, lr=0.5, weight_decay=0.0, eps=0.0)
    >>> w  # the first gradient is its own second moment
    tensor([0.5000])
    """
    return direction_of(adamw)(g, state, betas=betas, eps=eps)


ORACLES: dict[str, Oracle] = {"StableAdamW": stableadamw}
