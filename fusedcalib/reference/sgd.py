"""Stochastic gradient descent with momentum: lecture eq. 1-2, GC algorithm 1, torch.optim.SGD."""

from torch import Tensor

from . import stages
from .stages import Centralize, Oracle, State


def sgd(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float = 1e-3,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    maximize: bool = False,
    centralize: Centralize = False,
    centralize_min_ndim: int = 2,
) -> tuple[Tensor, State]:
    r"""Take one step of SGD, with momentum in torch's form.

    .. math::
        \hat g = P(\pm g + \lambda w), \qquad
        b_t = \mu b_{t-1} + (1 - \tau) \hat g, \; b_1 = \hat g, \qquad
        u = b_t \text{ or, Nesterov, } \hat g + \mu b_t, \qquad
        w \leftarrow w - \eta u

    Args:
        param: weights w, any shape.
        grad: gradient g of the mean loss, the same shape.
        state: ``{}`` or ``{"momentum_buffer": b}``, b of the weights' shape.
        lr: learning rate :math:`\eta`.
        momentum: :math:`\mu`; 0 keeps no state.
        dampening: :math:`\tau`; not applied on the first step.
        weight_decay: :math:`\lambda`, coupled: added to the gradient before centring.
        nesterov: look ahead along the buffer.
        maximize: ascend: the gradient changes sign, the decay does not.
        centralize: False, True or "gradient" (:math:`P(g + \lambda w)`), "update" (:math:`P u`).
        centralize_min_ndim: weights of fewer dimensions are not centred.

    Returns:
        New weights and new state; ``{}`` without momentum.

    Raises:
        ValueError: `centralize` is none of its four values.

    Source: Yao, lecture, eq. 1 and 2; Yong et al. 2020, algorithm 1 and section 3.4, in the form
    of the authors' code, ``a (1 - b)`` there being ``lr`` here; torch.optim.SGD.

    >>> import torch
    >>> w, state = sgd(torch.zeros(1), torch.ones(1), {}, lr=0.5, momentum=0.5)
    >>> w, state = sgd(w, torch.ones(1), state, lr=0.5, momentum=0.5)
    >>> w, state["momentum_buffer"]
    (tensor([-1.2500]), tensor([1.5000]))
    """
    g = -grad if maximize else grad
    g = stages.coupled_decay(g, param, weight_decay)
    update = g = stages.centralize_at("gradient", g, centralize, centralize_min_ndim)
    new_state: State = {}
    if momentum != 0:
        before = state.get("momentum_buffer")
        buf = g.clone() if before is None else momentum * before + (1 - dampening) * g
        update = g + momentum * buf if nesterov else buf
        new_state["momentum_buffer"] = buf
    update = stages.centralize_at("update", update, centralize, centralize_min_ndim)
    return param - lr * update, new_state


ORACLES: dict[str, Oracle] = {"SGD": sgd}
