"""Rules that move by a sign: Lion (Chen et al. 2023) and Signum, signSGD (Bernstein et al. 2018)."""

from torch import Tensor

from .pipeline import oracle
from .stages import Betas, Oracle, State


@oracle(lr=1e-4, decay="decoupled")
def lion(g: Tensor, state: State, *, betas: Betas = (0.9, 0.99)) -> tuple[Tensor, State]:
    r"""Take one step of Lion.

    .. math::
        u = \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g, \; m_0 = 0

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``exp_avg`` (m, of the weights' shape).
        betas: the share of m in the move, and its decay per step.

    Returns:
        New weights and new state.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, algorithm 2.

    >>> import torch
    >>> w, state = lion(torch.zeros(3), torch.tensor([4.0, 0.0, -0.1]), {}, lr=0.5, betas=(0.5, 0.5))
    >>> w, state["exp_avg"]
    (tensor([-0.5000,  0.0000,  0.5000]), tensor([ 2.0000,  0.0000, -0.0500]))
    """
    beta1, beta2 = betas
    m = state.get("exp_avg", 0.0)
    return (beta1 * m + (1 - beta1) * g).sign(), {"exp_avg": beta2 * m + (1 - beta2) * g}


@oracle(lr=1e-4, decay="decoupled")
def signum(g: Tensor, state: State, *, momentum: float = 0.9) -> tuple[Tensor, State]:
    r"""Take one step of Signum, which without momentum is signSGD.

    .. math:: m_t = \beta m_{t-1} + (1 - \beta) g, \; m_0 = 0, \qquad u = \mathrm{sign}(m_t)

    Args:
        g: gradient of the mean loss; for the step around the rule see `pipeline.oracle`.
        state: ``{}`` or ``momentum_buffer`` (m, of the weights' shape).
        momentum: :math:`\beta`; 0 keeps no state.

    Returns:
        New weights and new state; ``{}`` without momentum.

    Source: Bernstein et al., signSGD, ICML 2018, algorithm 2; decoupled decay as in Bernstein et
    al., signSGD with majority vote, ICLR 2019, algorithm 1.

    >>> import torch
    >>> w, state = signum(torch.zeros(2), torch.tensor([4.0, -0.1]), {}, lr=0.5, momentum=0.5)
    >>> w, state["momentum_buffer"]
    (tensor([-0.5000,  0.5000]), tensor([ 2.0000, -0.0500]))
    """
    if momentum == 0:
        return g.sign(), {}
    m = momentum * state.get("momentum_buffer", 0.0) + (1 - momentum) * g
    return m.sign(), {"momentum_buffer": m}


ORACLES: dict[str, Oracle] = {"Lion": lion, "Signum": signum}
