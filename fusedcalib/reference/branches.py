"""Calibrated convolutions (Zhuo et al., AAAI 2019): kernels of branches, their gradients, the step of R."""

import torch
from torch import Tensor


def branch_kernels(R: Tensor, w: Tensor) -> Tensor:
    r"""Weigh one set of kernels K times.

    .. math:: H_k = R_k * w

    Args:
        R: branch weights ``[K, kh, kw]``.
        w: kernels ``[out, in, kh, kw]``.

    Returns:
        H, ``[K, out, in, kh, kw]``.

    Source: Zhuo et al., CSGD, AAAI 2019, eq. 3.

    >>> import torch
    >>> branch_kernels(torch.tensor([[[0.5]], [[2.0]]]), torch.ones(1, 1, 1, 1)).flatten()
    tensor([0.5000, 2.0000])
    """
    return torch.einsum("kyx,oiyx->koiyx", R, w)


def branch_kernel_gradients(R: Tensor, w: Tensor, dH: Tensor) -> tuple[Tensor, Tensor]:
    r"""Carry the gradient of the kernels back.

    .. math:: dR_k = \sum_{o,i} w * dH_k, \qquad dw = \sum_k R_k * dH_k

    Args:
        R, w: as in `branch_kernels`.
        dH: gradient with respect to H.

    Returns:
        dR and dw.

    Source: Zhuo et al., CSGD, AAAI 2019, eq. 2, read as the chain rule.

    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1)
    >>> branch_kernel_gradients(torch.full((1, 1, 1), 2.0), 3 * one, one[None])
    (tensor([[[3.]]]), tensor([[[[2.]]]]))
    """
    return torch.einsum("oiyx,koiyx->kyx", w, dH), torch.einsum("kyx,koiyx->oiyx", R, dH)


def branch_step(R: Tensor, grad: Tensor, lr: float, sign: str = "descent") -> Tensor:
    r"""Move the branch weights and normalise them.

    .. math:: R_k \leftarrow |R_k - \ell\, dR_k| \Big/ \sum_j |R_j - \ell\, dR_j|

    Args:
        R: branch weights ``[K, ...]``, before the step.
        grad: gradient with respect to them.
        lr: :math:`\ell`, in units of R over those of the gradient.
        sign: "descent", or "literal" for the printed plus sign.

    Returns:
        R after the step, 1/K where every numerator is 0.

    Source: Zhuo et al., CSGD, AAAI 2019, algorithm 1, lines 7 and 8. Which sign: with the gradient of a
    loss the printed one ascends; w descends with the same derivative.

    >>> import torch
    >>> branch_step(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.5]), lr=1.0)
    tensor([1., 0.])
    """
    step = {"descent": lr, "literal": -lr}[sign]
    size = torch.abs(R - step * grad)
    share = size / size.sum(dim=0)
    return torch.nan_to_num(share, nan=1 / len(R)) if bool(torch.isfinite(size).all()) else share
