"""Stochastic gradient descent with momentum: lecture eq. 1-2, GC algorithm 1, torch.optim.SGD."""

from typing import Any

from torch import Tensor

from .pipeline import direction_of, oracle
from .stages import Oracle, State


@oracle(lr=1e-3)
def sgd(
    g: Tensor,
    state: State,
    *,
    momentum: float = 0,
    dampening: float = 0,
    nesterov: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of SGD, with momentum in torch's form.

    .. math::
        b_t = \mu b_{t-1} + (1 - \tau) g, \; b_1 = g, \qquad
        u = b_t \text{ or, Nesterov, } g + \mu b_t

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``{"momentum_buffer": b}``, b of the weights' shape.
        momentum: :math:`\mu`; 0 keeps no state.
        dampening: :math:`\tau`; not applied on the first step.
        nesterov: look ahead along the buffer.

    Returns:
        New weights and new state; ``{}`` without momentum.

    Source: Yao, lecture, eq. 1 and 2; Yong et al. 2020, algorithm 1 and section 3.4, in the form
    of the authors' code, ``a (1 - b)`` there being ``lr`` here; torch.optim.SGD.

    >>> import torch
    >>> w, state = sgd(torch.zeros(1), torch.ones(1), {}, lr=0.5, momentum=0.5)
    >>> w, state = sgd(w, torch.ones(1), state, lr=0.5, momentum=0.5)
    >>> w, state["momentum_buffer"]
    (tensor([-1.2500]), tensor([1.5000]))
    """
    if momentum == 0:
        return g, {}
    before = state.get("momentum_buffer")
    b = g.clone() if before is None else momentum * before + (1 - dampening) * g
    return g + momentum * b if nesterov else b, {"momentum_buffer": b}


@oracle(lr=1e-3, decay="decoupled")
def sgdw(g: Tensor, state: State, **options: Any) -> tuple[Tensor | None, State]:
    r"""Take one step of SGDW: SGD whose decay acts on the weights, not on the gradient.

    .. math:: w \leftarrow (1 - \eta \lambda) w - \eta u, \qquad u \text{ as in } sgd(g)

    Args:
        g, state, options: as in `sgd`.

    Returns:
        New weights and new state, as `sgd`.

    Source: Loshchilov and Hutter, ICLR 2019, algorithm 1, with the decay times the learning rate
    as in torch.optim.AdamW.

    >>> import torch
    >>> w, state = sgdw(torch.ones(1), torch.ones(1), {}, lr=0.5, weight_decay=0.5)
    >>> w
    tensor([0.2500])
    """
    return direction_of(sgd)(g, state, **options)


ORACLES: dict[str, Oracle] = {"SGD": sgd, "SGDW": sgdw}
