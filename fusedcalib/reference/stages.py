"""The stages around a rule: penalties, decay, centring, projection. Sources are named per function.

Pure functions of one tensor each; the order they take in a step stands in `pipeline.oracle`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""What a rule remembers between steps, under torch.optim's keys; ``{}`` before the first step."""

Oracle: TypeAlias = Callable[..., tuple[Tensor, State]]
"""One step of an optimizer: ``oracle(param, grad, state, *, lr=..., ...) -> (param, state)``."""

Betas: TypeAlias = tuple[float, float]
"""How much of an average survives a step, for the two averages of a rule."""

MatrixDims: TypeAlias = tuple[int, int] | None
"""Which dimensions are the matrix of a stack; None where there are no stacks."""

Centralize: TypeAlias = bool | Literal["gradient", "update"]
"""Where centring happens: nowhere (False), on the gradient (True, "gradient"), on the update."""


def as_rows(x: Tensor, matrix_dims: MatrixDims = None) -> Tensor:
    """See a tensor such that a row is one index of dimension 0.

    Args:
        x: any shape.
        matrix_dims: None leaves it. (-2, -1), or (1, 2) of three dimensions, says that a tensor of three
            dimensions or more, ``[..., out, in]``, is a stack of matrices, whose rows make ``[rows, in]``.

    >>> import torch
    >>> as_rows(torch.zeros(8, 3, 5), (-2, -1)).shape
    torch.Size([24, 5])
    """
    return x.reshape(-1, x.shape[-1]) if matrix_dims and x.ndim > 2 else x


def by_rows(
    stage: Callable[..., Tensor], x: Tensor, *settings: object, matrix_dims: MatrixDims = None
) -> Tensor:
    """Apply a stage to the rows of a tensor that may be a stack of matrices, see `as_rows`."""
    return stage(as_rows(x, matrix_dims), *settings).reshape(x.shape)


def centralize(x: Tensor, min_ndim: int = 2) -> Tensor:
    r"""Remove from each row its mean (Gradient Centralization).

    .. math:: P x = x - \mathrm{mean}(x, 1..n-1), \qquad P = I - e e^T, \; e = 1/\sqrt M

    A row is one index of dimension 0, in PyTorch's layout the weight vector of one output unit;
    the paper writes the same matrix transposed and speaks of columns. Tensors whose rows have
    fewer than two elements (scalars, vectors, ``[n, 1]``) are returned unchanged: P would be 0
    there and freeze the weight.

    Args:
        x: gradient or update, ``[rows, ...]``, any shape.
        min_ndim: tensors of fewer dimensions are returned unchanged (default 2; 4 centres
            convolutions only, as the authors' ``gc_conv_only``).

    Source: Yong et al., Gradient Centralization, ECCV 2020, section 3.3, eq. 1-2.

    >>> import torch
    >>> centralize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    if x.ndim < min_ndim or math.prod(x.shape[1:]) < 2:
        return x
    return x - x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def centralize_at(
    stage: Literal["gradient", "update"], x: Tensor, setting: Centralize, min_ndim: int
) -> Tensor:
    """Centre `x`, the tensor at `stage`, if `setting` asks for centring there.

    Args:
        stage: where in the step `x` was taken.
        x: gradient or update, ``[rows, ...]``.
        setting: the user's choice; True means "gradient", the paper's form.
        min_ndim: see `centralize`.

    Raises:
        ValueError: `setting` is none of False, True, "gradient", "update".

    Source: gradient: Yong et al. 2020, algorithms 1 and 2. update: the authors' code (``gc_loc``).
    """
    known = isinstance(setting, bool) or (isinstance(setting, str) and setting in ("gradient", "update"))
    if not known:
        raise ValueError(f'centralize must be False, True, "gradient" or "update", not {setting!r}')
    chosen = "gradient" if setting is True else setting
    return centralize(x, min_ndim) if chosen == stage else x


def coupled_decay(grad: Tensor, param: Tensor, weight_decay: float) -> Tensor:
    r"""Add the gradient of an L2 penalty to the gradient.

    .. math:: g + \lambda w

    Comes before centring, which gives the paper's :math:`P(g + \lambda w)`.

    Args:
        grad: gradient, any shape.
        param: weights, the gradient's shape.
        weight_decay: :math:`\lambda`, per step; 0 returns `grad` unchanged.

    Source: Yong et al. 2020, section 3.4; torch.optim.SGD.

    >>> import torch
    >>> coupled_decay(torch.tensor([1.0]), torch.tensor([2.0]), 0.5)
    tensor([2.])
    """
    return grad + weight_decay * param if weight_decay != 0 else grad


def l1_subgradient(grad: Tensor, param: Tensor, l1: float) -> Tensor:
    r"""Add a subgradient of an L1 penalty to the gradient.

    .. math:: g + \lambda_1 \mathrm{sign}(w), \qquad \mathrm{sign}(0) = 0

    With coupled decay it makes the elastic net: the penalty
    :math:`\Lambda (\beta w^2 + |w|)` has :math:`\lambda = 2 \Lambda \beta, \lambda_1 = \Lambda`.

    Args:
        grad: gradient, any shape.
        param: weights, the gradient's shape.
        l1: :math:`\lambda_1`, in units of the gradient; 0 returns `grad` unchanged.

    Source: Yao, lecture, regularization (L1, elastic net).

    >>> import torch
    >>> l1_subgradient(torch.zeros(3), torch.tensor([2.0, 0.0, -3.0]), 0.5)
    tensor([ 0.5000,  0.0000, -0.5000])
    """
    return grad + l1 * param.sign() if l1 != 0 else grad


def decoupled_decay(param: Tensor, lr: float, weight_decay: float) -> Tensor:
    r"""Shrink the weights themselves, outside the gradient.

    .. math:: (1 - \eta \lambda) w

    Args:
        param: weights before the step, any shape.
        lr: learning rate :math:`\eta`.
        weight_decay: :math:`\lambda`, per unit of learning rate; 0 returns `param` unchanged.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2;
    the learning rate multiplies the decay as in torch.optim.AdamW.

    >>> import torch
    >>> decoupled_decay(torch.tensor([2.0]), lr=0.5, weight_decay=0.5)
    tensor([1.5000])
    """
    return param * (1 - lr * weight_decay) if weight_decay != 0 else param


def cautious(update: Tensor, grad: Tensor) -> Tensor:
    r"""Leave out of an update what does not agree with the gradient (Cautious Optimizers).

    .. math:: u \odot 1[u \odot g > 0]

    The authors divide it by the share of elements that are left; here it is not.

    Args:
        update: what the rule returns, any shape.
        grad: the gradient that it was given, of that shape.

    Source: Liang et al., Cautious Optimizers, 2024 (arXiv 2411.16085), algorithm 1.

    >>> import torch
    >>> cautious(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, 5.0, 0.0]))
    tensor([1., 0., 0.])
    """
    return torch.where(update * grad > 0, update, torch.zeros_like(update))


def cautious_decay(param: Tensor, update: Tensor, lr: float, weight_decay: float) -> Tensor:
    r"""Shrink those weights that the update does not move away from zero (Cautious Weight Decay).

    .. math:: w - \eta \lambda\, 1[u \odot w \ge 0] \odot w

    Args:
        param: weights before the step, any shape.
        update: what is subtracted from them times the learning rate, of that shape.
        lr: learning rate :math:`\eta`.
        weight_decay: :math:`\lambda`, per unit of learning rate.

    Source: Chen et al., Cautious Weight Decay, 2025 (arXiv 2510.12402), algorithm 1.

    >>> import torch
    >>> cautious_decay(torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), lr=0.5, weight_decay=0.5)
    tensor([1.5000, 2.0000])
    """
    return torch.where(update * param >= 0, param - lr * weight_decay * param, param)


def proximal_decay(param: Tensor, lr: float, weight_decay: float) -> Tensor:
    r"""Shrink the weights by the proximal step of an L2 penalty, after they moved.

    .. math:: w / (1 + \eta \lambda)

    Args:
        param: weights after the step, any shape.
        lr: learning rate :math:`\eta`.
        weight_decay: :math:`\lambda`, per unit of learning rate; 0 returns `param` unchanged.

    Source: Xie et al., Adan, TPAMI 2024 (arXiv 2208.06677), algorithm 1.

    >>> import torch
    >>> proximal_decay(torch.tensor([3.0]), lr=0.5, weight_decay=1.0)
    tensor([2.])
    """
    return param / (1 + lr * weight_decay) if weight_decay != 0 else param


def project_rows(param: Tensor, max_norm: float | None) -> Tensor:
    r"""Pull every row that is longer than `max_norm` back onto the ball of that radius.

    .. math:: w_r \leftarrow w_r \min(1, c / \|w_r\|_2)

    A row is one index of dimension 0, all other dimensions flattened. Rows inside the ball keep
    their bits; scalars and vectors have no rows and are returned unchanged.

    Args:
        param: weights after the step, ``[rows, ...]``, any shape.
        max_norm: the radius c > 0; None returns `param` unchanged.

    Source: Yao, lecture, regularization (max-norm); Srebro and Shraibman, COLT 2005.

    >>> import torch
    >>> project_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if max_norm is None or param.ndim < 2:
        return param
    norm = torch.linalg.vector_norm(param, dim=tuple(range(1, param.ndim)), keepdim=True)
    return torch.where(norm > max_norm, param * (max_norm / norm), param)
