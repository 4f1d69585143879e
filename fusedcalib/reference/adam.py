"""Adam and AdamW: Kingma and Ba 2015 (lecture eq. 13-15, GC algorithm 2); Loshchilov and Hutter."""

import torch
from torch import Tensor

from . import stages
from .stages import Centralize, Oracle, State


def adam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    centralize: Centralize = False,
    centralize_min_ndim: int = 2,
) -> tuple[Tensor, State]:
    r"""Take one step of Adam.

    .. math::
        \hat g = P(\pm g + \lambda w), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \hat g, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \hat g^2

    .. math::
        \hat m = m_t / (1 - \beta_1^t), \qquad \hat v = v_t / (1 - \beta_2^t), \qquad
        u = \hat m / (\sqrt{\hat v} + \epsilon), \qquad w \leftarrow w - \eta u

    Args:
        param: weights w, any shape.
        grad: gradient g of the mean loss, the same shape.
        state: ``{}`` or ``step`` (steps taken so far: int or 0-dim tensor), ``exp_avg`` (m),
            ``exp_avg_sq`` (v) and, for AMSGrad, ``max_exp_avg_sq``, of the weights' shape.
        lr: learning rate :math:`\eta`.
        betas: decay per step of the two averages.
        eps: added to the root, outside of it, in units of the gradient.
        weight_decay: :math:`\lambda`, coupled (added to the gradient before centring) unless
            `decoupled_weight_decay`.
        amsgrad: divide by the largest v so far in place of v, both uncorrected, as torch does.
        maximize: ascend: the gradient changes sign, the decay does not.
        decoupled_weight_decay: first :math:`w \leftarrow (1 - \eta \lambda) w`, not centred.
        centralize: False, True or "gradient" (:math:`P(g + \lambda w)`), "update" (:math:`P u`).
        centralize_min_ndim: weights of fewer dimensions are not centred.

    Returns:
        New weights and new state, its ``step`` an int.

    Raises:
        ValueError: `centralize` is none of its four values.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, that is Yao, lecture, eq. 13-15;
    Yong et al. 2020, algorithm 2 and section 3.4; AMSGrad: Reddi et al., ICLR 2018.

    >>> import torch
    >>> w, state = adam(torch.zeros(2), torch.tensor([3.0, -0.1]), {}, lr=0.5)
    >>> w, state["step"]
    (tensor([-0.5000,  0.5000]), 1)
    """
    beta1, beta2 = betas
    g = -grad if maximize else grad
    if decoupled_weight_decay:
        param = stages.decoupled_decay(param, lr, weight_decay)
    else:
        g = stages.coupled_decay(g, param, weight_decay)
    g = stages.centralize_at("gradient", g, centralize, centralize_min_ndim)

    zero = torch.zeros_like(param)
    step = int(state.get("step", 0)) + 1
    m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g**2
    new_state: State = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = torch.maximum(state.get("max_exp_avg_sq", zero), v)
        new_state["max_exp_avg_sq"] = v

    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    update = m_hat / (v_hat.sqrt() + eps)
    update = stages.centralize_at("update", update, centralize, centralize_min_ndim)
    return param - lr * update, new_state


def adamw(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    centralize: Centralize = False,
    centralize_min_ndim: int = 2,
) -> tuple[Tensor, State]:
    r"""Take one step of AdamW: Adam whose decay acts on the weights, not on the gradient.

    .. math:: w \leftarrow (1 - \eta \lambda) w - \eta u, \qquad u \text{ as in } adam(g)

    Args:
        param, grad, state, lr, betas, eps, amsgrad, maximize: as in `adam`.
        weight_decay: :math:`\lambda`, per unit of learning rate; never centred.
        centralize: False, True or "gradient" (:math:`P g`), "update" (:math:`P u`).
        centralize_min_ndim: weights of fewer dimensions are not centred.

    Returns:
        New weights and new state, as `adam`.

    Raises:
        ValueError: `centralize` is none of its four values.

    Source: Loshchilov and Hutter, ICLR 2019, algorithm 2, in the form of torch.optim.AdamW.

    >>> import torch
    >>> w, state = adamw(torch.ones(1), torch.ones(1), {}, lr=0.5, weight_decay=0.5)
    >>> w
    tensor([0.2500])
    """
    return adam(
        param,
        grad,
        state,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
        centralize=centralize,
        centralize_min_ndim=centralize_min_ndim,
    )


ORACLES: dict[str, Oracle] = {"Adam": adam, "AdamW": adamw}
