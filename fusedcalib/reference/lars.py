"""LARS: You et al. 2017."""

import torch
from torch import Tensor

from .pipeline import Trust, oracle
from .stages import Oracle, State


def _local_rate(w: Tensor, g: Tensor, update: None, state: State, options: State) -> Tensor:
    """The rate of a layer, beside the global one: 1 where a norm is 0 or none is wanted."""
    decay, one = options["weight_decay"], torch.ones((), dtype=w.dtype)
    if decay == 0 and not options["always_adapt"]:
        return one
    of_weights, of_gradient = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
    rate: Tensor = options["trust_coeff"] * of_weights / (of_gradient + decay * of_weights + options["eps"])
    if of_weights == 0 or of_gradient == 0:
        rate = one
    if options["trust_clip"] and options["lr"] > 0:
        rate = (rate / options["lr"]).clamp(max=1.0)
    return rate


@oracle(lr=1.0, decay="trusted", trust=Trust(_local_rate, "gradient"))
def lars(
    g: Tensor,
    state: State,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    trust_coeff: float = 0.001,
    eps: float = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> tuple[Tensor, State]:
    r"""Take one step of LARS: SGD with momentum, at a rate of its own for each layer.

    .. math::
        \rho = \tau \frac{\|w\|}{\|g\| + \lambda \|w\| + \epsilon}, \qquad
        b_t = \mu b_{t-1} + (1 - d) \rho (g + \lambda w) \;(b_1 = \rho (g + \lambda w)), \qquad
        w \leftarrow w - \eta b_t

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`. Here it comes
            multiplied by the layer's rate.
        state: ``{}`` or ``momentum_buffer`` (b), of the weights' shape.
        momentum, dampening: :math:`\mu` and d.
        nesterov: whether the step looks ahead, by :math:`\rho (g + \lambda w) + \mu b_t`.
        trust_coeff: :math:`\tau`.
        eps: added to the denominator of the layer's rate, in units of the gradient.
        trust_clip: whether the layer's rate times :math:`\eta` becomes the smaller of the two (LARC).
        always_adapt: whether the layer's rate is taken without weight decay, too.

    Returns:
        New weights and new state.

    Source: You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, 2017, algorithm 1; the
    momentum's form and the clip as in timm.

    >>> import torch
    >>> w, state = lars(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), {}, trust_coeff=0.5, eps=0.0,
    ...     always_adapt=True)
    >>> w  # half of 5 / 2 times the gradient
    tensor([3.0000, 1.5000])
    """
    if momentum == 0:
        return g, {}
    buffer = momentum * state["momentum_buffer"] + (1 - dampening) * g if state else g
    return g + momentum * buffer if nesterov else buffer, {"momentum_buffer": buffer}


ORACLES: dict[str, Oracle] = {"LARS": lars}
