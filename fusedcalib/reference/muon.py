"""Muon as it is published (Jordan et al. 2024; Liu et al. 2025), one matrix at a time, in its own type."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .stages import State


def newton_schulz(
    matrix: Tensor, coefficients: Sequence[tuple[float, float, float]], eps: float = 1e-7
) -> Tensor:
    r"""Odd polynomials :math:`p(X) = a X + b X X^\top X + c X X^\top X X^\top X`, one after the other.

    Args:
        matrix: [rows, columns]; it is scaled to Frobenius norm 1 first.
        coefficients: :math:`(a, b, c)` of each polynomial.
        eps: the least norm it is divided by.

    >>> newton_schulz(torch.diag(torch.tensor([3.0, 4.0])), [(1.5, -0.5, 0.0)] * 8)  # singular values to 1
    tensor([[1., 0.],
            [0., 1.]])
    """
    x = matrix / max(float(matrix.norm()), eps)
    for a, b, c in coefficients:
        cube = x @ x.mT @ x
        x = a * x + b * cube + c * (cube @ x.mT @ x)
    return x


def muon(
    w: Tensor,
    g: Tensor,
    state: State,
    *,
    coefficients: Sequence[tuple[float, float, float]],
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
) -> tuple[Tensor, State]:
    """The new parameter [rows, columns] and its new state, of its gradient and state."""
    average = momentum * state.get("momentum_buffer", torch.zeros_like(g)) + (1 - momentum) * g
    ahead = momentum * average + (1 - momentum) * g if nesterov else average
    rows, columns = w.shape
    scale = math.sqrt(max(1.0, rows / columns))
    if adjust_lr_fn == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    direction = newton_schulz(ahead, coefficients, eps)
    return w - lr * weight_decay * w - lr * scale * direction, {"momentum_buffer": average}
