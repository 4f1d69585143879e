"""Nadam: Dozat 2016 (lecture, "Adam Extensions"), torch.optim.NAdam, and Ruder's simpler form."""

import torch
from torch import Tensor

from .adam import averages
from .pipeline import oracle, root
from .stages import Betas, Oracle, State


@oracle(lr=2e-3)
def nadam(
    g: Tensor,
    state: State,
    *,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
) -> tuple[Tensor, State]:
    r"""Take one step of Nadam: Adam with Nesterov's momentum, on Dozat's schedule.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi}), \qquad
        u = \Bigl( \frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i} g
        + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1} \mu_i} m_t \Bigr) / (\sqrt{\hat v} + \epsilon)

    with m and v as in `adam`. As :math:`\psi \to \infty` all :math:`\mu_t` become
    :math:`\beta_1`; with :math:`\psi = 0` they are half of that. Whatever the dtype of the weights
    the product up to t is one of torch's scalars: each factor and each product is rounded to float32,
    to float64 only where that is the default dtype.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``mu_product`` (a number or 0-dim tensor), ``exp_avg`` (m) and
            ``exp_avg_sq`` (v), of the weights' shape.
        betas: decay per step of the two averages.
        eps: added to the root, outside of it, in units of the gradient.
        momentum_decay: :math:`\psi`, how fast the schedule rises.

    Returns:
        New weights and new state, its ``step`` an int and its ``mu_product`` a float.

    Source: Dozat, Incorporating Nesterov Momentum into Adam, ICLR workshop 2016;
    torch.optim.NAdam.

    >>> import torch
    >>> w, state = nadam(torch.zeros(1), torch.ones(1), {}, lr=0.5, betas=(0.0, 0.5))
    >>> w, state["mu_product"]
    (tensor([-0.5000]), 0.0)
    """
    t, m, v = averages(g, state, betas)
    mu, mu_next = (betas[0] * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
    double = torch.get_default_dtype() == torch.float64
    before = torch.as_tensor(state.get("mu_product", 1.0), dtype=torch.float64 if double else torch.float32)
    product = (before * mu).item()
    ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
    update = ahead / root(v / (1 - betas[1] ** t), eps, inside=False)
    return update, {"step": t, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}


@oracle(lr=1e-3)
def ruder_nadam(
    g: Tensor, state: State, *, betas: Betas = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, State]:
    r"""Take one step of Nadam in the form of Ruder's overview: no schedule, no product.

    .. math::
        u = \frac{1}{\sqrt{\hat v} + \epsilon}
        \Bigl( \beta_1 \hat m + \frac{1 - \beta_1}{1 - \beta_1^t} g \Bigr)

    with the averages of `adam`; with :math:`\beta_1 = 0` it is Adam. It differs from `nadam` with
    an infinite ``momentum_decay`` only in that :math:`\hat m` is corrected there by the
    :math:`1 - \beta_1^{t+1}` of the step to come. Not an optimizer class.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``exp_avg`` (m) and ``exp_avg_sq`` (v).
        betas: decay per step of the two averages.
        eps: added to the root, outside of it, in units of the gradient.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Ruder, arXiv 1609.04747, section 4.8 (last equation).

    >>> import torch
    >>> w, state = ruder_nadam(torch.zeros(1), torch.ones(1), {}, lr=0.5, betas=(0.5, 0.5))
    >>> w
    tensor([-0.7500])
    """
    beta1, beta2 = betas
    t, m, v = averages(g, state, betas)
    ahead = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
    update = ahead / root(v / (1 - beta2**t), eps, inside=False)
    return update, {"step": t, "exp_avg": m, "exp_avg_sq": v}


ORACLES: dict[str, Oracle] = {"NAdam": nadam}
