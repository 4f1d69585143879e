"""Momentum as the papers write it (lecture eq. 1, 2, 1.2, 1.3; GC algorithm 1), one step each.

These are not options of the optimizer classes, which keep torch's form. They are here because each
follows the same path as torch's form under a change of variables, named in its docstring: that is
how a result from the papers is reproduced with the classes.
"""

import math

from torch import Tensor


def velocity_momentum(
    theta: Tensor, grad: Tensor, velocity: Tensor, *, lr: float, gamma: float = 0.9
) -> tuple[Tensor, Tensor]:
    r"""Take one step of momentum with the learning rate inside the velocity.

    .. math:: v \leftarrow \gamma v + \eta g, \qquad \theta \leftarrow \theta - v

    With `grad` taken at :math:`\theta` it is the lecture's momentum: the path of
    ``sgd(momentum=gamma)`` as long as `lr` does not change (the velocity remembers the old one).
    With `grad` taken at :math:`\theta - \gamma v` it is Nesterov's method, and that point
    follows the path of ``sgd(momentum=gamma, nesterov=True)``: torch's weights look ahead, the
    lecture's are those plus ``lr * gamma`` times torch's buffer.

    Args:
        theta: weights, any shape.
        grad: gradient, the same shape.
        velocity: v, the same shape; zeros before the first step.
        lr: learning rate :math:`\eta`.
        gamma: momentum.

    Returns:
        New weights and new velocity.

    Source: Yao, lecture, eq. 1 (momentum) and eq. 2 (NAG).

    >>> import torch
    >>> velocity_momentum(torch.zeros(1), torch.ones(1), torch.ones(1), lr=0.5, gamma=0.5)
    (tensor([-1.]), tensor([1.]))
    """
    velocity = gamma * velocity + lr * grad
    return theta - velocity, velocity


def ema_momentum(
    param: Tensor, grad: Tensor, average: Tensor, *, alpha: float, beta: float = 0.9
) -> tuple[Tensor, Tensor]:
    r"""Take one step along the moving average of the gradient.

    .. math:: m \leftarrow \beta m + (1 - \beta) g, \qquad w \leftarrow w - \alpha m

    The path of ``sgd(lr=alpha * (1 - beta), momentum=beta)``, not of ``dampening=beta``.

    Args:
        param: weights w, any shape.
        grad: gradient g, the same shape; centred by the caller if wanted.
        average: m, the same shape; zeros before the first step.
        alpha: step size, 1 / (1 - beta) times the learning rate of torch's form.
        beta: momentum.

    Returns:
        New weights and new average.

    Source: Yong et al. 2020, algorithm 1, lines 4-5.

    >>> import torch
    >>> ema_momentum(torch.zeros(1), torch.ones(1), torch.zeros(1), alpha=1.0, beta=0.5)
    (tensor([-0.5000]), tensor([0.5000]))
    """
    average = beta * average + (1 - beta) * grad
    return param - alpha * average, average


def heavy_ball(x: Tensor, before: Tensor, grad: Tensor, *, s: float, alpha: float) -> Tensor:
    r"""Take one step of Polyak's heavy ball.

    .. math:: x_{k+1} = x_k + \alpha (x_k - x_{k-1}) - s \nabla f(x_k)

    Started at rest (`before` equal to `x`) it is the path of ``sgd(lr=s, momentum=alpha)``.

    Args:
        x: weights now, any shape.
        before: weights one step ago, the same shape.
        grad: gradient at `x`, the same shape.
        s: step size.
        alpha: momentum.

    Returns:
        The next weights.

    Source: Polyak 1964, as Yao, lecture, eq. 1.2.

    >>> import torch
    >>> heavy_ball(torch.ones(1), torch.zeros(1), torch.ones(1), s=0.5, alpha=0.5)
    tensor([1.])
    """
    return x + alpha * (x - before) - s * grad


def nesterov(x: Tensor, y: Tensor, grad: Tensor, *, s: float, coefficient: float) -> tuple[Tensor, Tensor]:
    r"""Take one step of Nesterov's method in its two-sequence form.

    .. math:: y_{k+1} = x_k - s \nabla f(x_k), \qquad x_{k+1} = y_{k+1} + c_k (y_{k+1} - y_k)

    With a constant :math:`c_k = c`, x is the path of ``sgd(lr=s, momentum=c, nesterov=True)``.
    With another one torch's form cannot follow: as
    :math:`b \leftarrow c_{k-1} b + g, \; x \leftarrow x - s (g + c_k b)` the method takes two
    coefficients a step.

    Args:
        x: point where the gradient is taken, any shape.
        y: the other sequence, the same shape; equal to `x` before the first step.
        grad: gradient at `x`, the same shape.
        s: step size, at most 1 / L.
        coefficient: :math:`c_k`.

    Returns:
        Next x and next y.

    Source: Yao, lecture, "Nesterov ODE: convex" (NAG-C) and eq. 1.3 (NAG-SC).

    >>> import torch
    >>> nesterov(torch.ones(1), torch.ones(1), torch.ones(1), s=0.5, coefficient=0.5)
    (tensor([0.2500]), tensor([0.5000]))
    """
    y_next = x - s * grad
    return y_next + coefficient * (y_next - y), y_next


def nag_sc(x: Tensor, y: Tensor, grad: Tensor, *, s: float, mu: float) -> tuple[Tensor, Tensor]:
    r"""Take one step of Nesterov's method for a strongly convex function (NAG-SC).

    .. math:: nesterov, \qquad c = \frac{1 - \sqrt{\mu s}}{1 + \sqrt{\mu s}}

    Args:
        x, y, grad, s: as in `nesterov`.
        mu: :math:`\mu`, modulus of strong convexity, at most 1 / s.

    Returns:
        Next x and next y.

    Source: Yao, lecture, eq. 1.3.

    >>> import torch
    >>> nag_sc(torch.ones(1), torch.ones(1), torch.ones(1), s=0.25, mu=1.0)
    (tensor([0.6667]), tensor([0.7500]))
    """
    q = math.sqrt(mu * s)
    return nesterov(x, y, grad, s=s, coefficient=(1 - q) / (1 + q))


def nag_c(x: Tensor, y: Tensor, grad: Tensor, *, s: float, k: int) -> tuple[Tensor, Tensor]:
    r"""Take one step of Nesterov's method for a convex function (NAG-C).

    .. math:: nesterov, \qquad c_k = \frac{k}{k + 3}

    Args:
        x, y, grad, s: as in `nesterov`.
        k: steps taken before this one, 0 at first.

    Returns:
        Next x and next y.

    Source: Yao, lecture, "Nesterov ODE: convex".

    >>> import torch
    >>> nag_c(torch.ones(1), torch.ones(1), torch.ones(1), s=0.5, k=3)
    (tensor([0.2500]), tensor([0.5000]))
    """
    return nesterov(x, y, grad, s=s, coefficient=k / (k + 3))
