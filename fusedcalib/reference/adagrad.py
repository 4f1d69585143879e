"""Adagrad: Duchi et al. 2011 (lecture, "Adagrad" and its update table), torch.optim.Adagrad."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Oracle, State


@oracle(lr=1e-2)
def adagrad(
    g: Tensor,
    state: State,
    *,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    eps_inside_sqrt: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of Adagrad.

    .. math::
        G_t = G_{t-1} + g^2, \qquad
        u = \frac{1}{1 + (t - 1) \delta} \, \frac{g}{\sqrt{G_t} + \epsilon}

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step`` and ``sum`` (G, of the weights' shape).
        lr_decay: :math:`\delta`; shrinks the learning rate of the move.
        initial_accumulator_value: :math:`G_0`, used while `state` has no ``sum``.
        eps: added to the root, outside of it, in units of the gradient.
        eps_inside_sqrt: divide by :math:`\sqrt{G_t + \epsilon}`, the lecture's form.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Duchi, Hazan and Singer, JMLR 2011 (diagonal form), that is Yao, lecture, eq. 6;
    torch.optim.Adagrad.

    >>> import torch
    >>> w, state = adagrad(torch.zeros(1), torch.tensor([3.0]), {}, lr=0.5)
    >>> w, state = adagrad(w, torch.tensor([4.0]), state, lr=0.5)
    >>> w, state["sum"]
    (tensor([-0.9000]), tensor([25.]))
    """
    t = steps_taken(state)
    total = state.get("sum", initial_accumulator_value) + g**2
    update = g / root(total, eps, eps_inside_sqrt)
    return update / (1 + (t - 1) * lr_decay), {"step": t, "sum": total}


ORACLES: dict[str, Oracle] = {"Adagrad": adagrad}
