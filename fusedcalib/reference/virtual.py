"""The virtual gradient (Li and Shu 2019): what the weight gradient of a linear operation is made of."""

from torch import Tensor


def virtual_gradient(
    q: Tensor, r: Tensor, scale: float, rho: float = 0.9, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    r"""Accumulate squares of output gradients, then scale these.

    .. math:: r \leftarrow \rho r + (1 - \rho) \frac1m \sum_\tau q_\tau^2, \qquad
        \hat q_\tau = s\, q_\tau / \sqrt{r + \epsilon}

    Args:
        q: ``[m, ...]``, gradient of each example's own loss with respect to the output.
        r: accumulated squares, ``[...]``; zeros at first.
        scale: :math:`s`.
        rho: :math:`\rho`.
        eps: :math:`\epsilon`, in units of the gradient squared.

    Returns:
        The scaled q and the new r.

    Source: Li and Shu, SVGD, 2019, algorithm 1.

    >>> import torch
    >>> virtual_gradient(torch.tensor([[3.0], [4.0]]), torch.zeros(1), scale=1.0, rho=0.0, eps=0.0)
    (tensor([[0.8485],
            [1.1314]]), tensor([12.5000]))
    """
    squares = sum((example * example for example in q), start=0 * r) / len(q)
    r = rho * r + (1 - rho) * squares
    return scale * q / (r + eps) ** 0.5, r


def virtual_weight_gradient(x: Tensor, scaled: Tensor) -> Tensor:
    r"""Mean of the outer products of scaled output gradients and inputs.

    .. math:: dW = \frac1m \sum_\tau \hat q_\tau x_\tau^T

    Args:
        x: inputs of the layer, ``[m, in]``.
        scaled: from `virtual_gradient`, ``[m, out]``.

    Source: Li and Shu, SVGD, 2019, algorithm 1, for a matrix product.

    >>> import torch
    >>> virtual_weight_gradient(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]]))
    tensor([[1.]])
    """
    return scaled.mT @ x / len(x)
