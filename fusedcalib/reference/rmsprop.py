"""RMSprop: Tieleman and Hinton 2012 (lecture eq. 12), Graves 2013, torch.optim.RMSprop."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Oracle, State


@oracle(lr=1e-2)
def rmsprop(
    g: Tensor,
    state: State,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    eps_inside_sqrt: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of RMSprop.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g^2, \qquad
        \tilde v = v_t \text{ or, centered, } v_t - a_t^2, \;
        a_t = \alpha a_{t-1} + (1 - \alpha) g

    .. math::
        h = g / (\sqrt{\tilde v} + \epsilon), \qquad
        u = h \text{ or, with momentum, } b_t = \mu b_{t-1} + h

    `centered` subtracts the mean over time of each element's gradient. `centralize`, of the step
    around the rule, subtracts the mean over a row.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``square_avg`` (v) and, where asked for, ``momentum_buffer`` (b)
            and ``grad_avg`` (a), of the weights' shape.
        alpha: decay per step of the averages, which are not corrected for their start at 0.
        eps: added to the root, outside of it, in units of the gradient.
        momentum: :math:`\mu`; 0 keeps no buffer.
        centered: divide by the standard deviation in place of the root mean square. As in torch,
            nothing keeps a rounding error from making the variance negative and its root NaN.
        eps_inside_sqrt: divide by :math:`\sqrt{\tilde v + \epsilon}`, the lecture's form.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Yao, lecture, eq. 12 (defaults there: alpha 0.9, lr 1e-3); centered: Graves,
    arXiv 1308.0850, eq. 38-45; torch.optim.RMSprop.

    >>> import torch
    >>> w, state = rmsprop(torch.zeros(1), torch.tensor([4.0]), {}, lr=0.5, alpha=0.75)
    >>> w, state["square_avg"]
    (tensor([-1.]), tensor([4.]))
    """
    v = alpha * state.get("square_avg", 0.0) + (1 - alpha) * g**2
    new_state: State = {"step": steps_taken(state), "square_avg": v}
    variance = v
    if centered:
        a = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * g
        variance, new_state["grad_avg"] = v - a**2, a
    update = g / root(variance, eps, eps_inside_sqrt)
    if momentum > 0:
        update = momentum * state.get("momentum_buffer", 0.0) + update
        new_state["momentum_buffer"] = update
    return update, new_state


ORACLES: dict[str, Oracle] = {"RMSprop": rmsprop}
