"""Branch weights (CSGD) stepped by plain torch, one after the other, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout.branches import SIGNS, Bucket, Given, Groups


def refresh(bucket: Bucket, groups: Groups) -> None:
    """Gradients and options are read when they are needed."""


def prepare(bucket: Bucket, given: Given) -> None:
    """There is nothing to make ready."""


def step(bucket: Bucket, groups: Groups, given: Given) -> None:
    """Steps every branch weight of the bucket."""
    for group, R in bucket.members:
        _step(R, groups[group], given)


def _step(R: Tensor, group: dict[str, Any], given: Given) -> None:
    assert R.grad is not None
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()
    if not isinstance(lr, Tensor) and lr == 0:
        return
    compute = torch.promote_types(R.dtype, torch.float32)
    grad = R.grad.to(compute)
    if given.scale is not None:
        grad = grad / given.scale
    new = branch_step(R.to(compute), -grad if group["maximize"] else grad, lr, group["branch_sign"])
    stays = [lr == 0] if isinstance(lr, Tensor) else []
    if given.found_inf is not None:
        stays.append(given.found_inf != 0)
    if given.norm is not None:
        stays.append(~given.norm.isfinite())
    if given.check:
        stays.append(~new.isfinite().all())
    for condition in stays:
        new = torch.where(condition, R.to(compute), new)
    R.copy_(new)


def branch_step(R: Tensor, grad: Tensor, lr: float | Tensor, sign: str = "descent") -> Tensor:
    r"""Branch weights after a step.

    .. math:: R_k \leftarrow |R_k - \ell\, dR_k|, \qquad R_k \leftarrow R_k / \textstyle\sum_j R_j

    and 1/K each where all are 0. With sign "literal" :math:`|R_k + \ell\, dR_k|`, as the paper
    prints it: that ascends where dR is the gradient of a loss.

    Args:
        R: branch weights [K, ...].
        grad: gradient of the loss with respect to them, like R.
        lr: :math:`\ell`, a number or 0-dim tensor.
        sign: "descent" or "literal". Default "descent".

    Raises:
        ValueError: the sign is neither.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019, Algorithm 1, lines 7 and 8.

    >>> import torch
    >>> branch_step(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), lr=0.25)
    tensor([0.2500, 0.7500])
    """
    if sign not in SIGNS:
        raise ValueError(f"Invalid branch_sign: {sign!r}, expected one of {', '.join(SIGNS)}")
    return normalized((R + SIGNS[sign] * lr * grad).abs())


def normalized(R: Tensor) -> Tensor:
    """Branch weights that add up to 1 over the branches; 1/K each where all are 0."""
    total = R.sum(0, keepdim=True)
    return torch.where(total == 0, 1 / R.shape[0], R / total)
