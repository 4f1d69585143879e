"""Newton's method (lecture, "Second-Order Optimization"), dense: for tests on small problems."""

import torch
from torch import Tensor


def newton(theta: Tensor, grad: Tensor, hessian: Tensor) -> Tensor:
    r"""Step to the critical point of the quadratic model at the weights.

    .. math:: \theta - H^{-1} \nabla J(\theta)

    On a quadratic that is its critical point itself, from anywhere and without a learning rate.
    The price is N^2 numbers of memory and N^3 operations; for a method that keeps a few vectors
    in the place of H see torch.optim.LBFGS.

    Args:
        theta: weights, any shape, N elements.
        grad: gradient at `theta`, the same shape.
        hessian: H, the second derivatives at `theta`, ``[N, N]`` in the order of
            ``theta.flatten()``.

    Returns:
        New weights.

    Raises:
        torch.linalg.LinAlgError: H is singular.

    Source: Yao, lecture, "Newton Method".

    >>> import torch
    >>> newton(torch.ones(2), torch.tensor([2.0, 4.0]), torch.diag(torch.tensor([2.0, 8.0])))
    tensor([0.0000, 0.5000])
    """
    move: Tensor = torch.linalg.solve(hessian, grad.flatten())
    return theta - move.reshape(theta.shape)
