"""Adadelta: Zeiler 2012 (lecture eq. 5-11), torch.optim.Adadelta."""

from torch import Tensor

from .pipeline import oracle, root, steps_taken
from .stages import Oracle, State


@oracle(lr=1.0)
def adadelta(g: Tensor, state: State, *, rho: float = 0.9, eps: float = 1e-6) -> tuple[Tensor, State]:
    r"""Take one step of Adadelta.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g^2, \qquad
        u = \frac{\sqrt{d_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g, \qquad
        d_t = \rho d_{t-1} + (1 - \rho) u^2

    With ``lr=1`` it is the lecture's form, which has no learning rate. With another one d still
    averages u, not the move.

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``step``, ``square_avg`` (v) and ``acc_delta`` (d), of the weights' shape.
        rho: decay per step of the two averages.
        eps: inside of both roots; in units of the gradient's square and of the weights' square.

    Returns:
        New weights and new state, its ``step`` an int.

    Source: Zeiler, arXiv 1212.5701, algorithm 1, that is Yao, lecture, eq. 5-11;
    torch.optim.Adadelta.

    >>> import torch
    >>> w, state = adadelta(torch.zeros(1), torch.tensor([2.0]), {}, rho=0.5, eps=0.25)
    >>> w, state["square_avg"]
    (tensor([-0.6667]), tensor([2.]))
    """
    d = state.get("acc_delta", g.new_zeros(g.shape))
    v = rho * state.get("square_avg", 0.0) + (1 - rho) * g**2
    update = root(d, eps, inside=True) / root(v, eps, inside=True) * g
    d = rho * d + (1 - rho) * update**2
    return update, {"step": steps_taken(state), "square_avg": v, "acc_delta": d}


ORACLES: dict[str, Oracle] = {"Adadelta": adadelta}
