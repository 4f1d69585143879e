"""The Newton-Schulz iteration, of many matrices of one shape at once, in workspaces that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# Amsel et al. 2025 (arXiv 2505.16932): for singular values in [1e-3, 1], the last one for ever after.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # bf16 may round a singular value up, beyond where the polynomials are made for

# A gram matrix is symmetric: on a CPU, where products take all the time, what is above its diagonal blocks
# is copied. On a GPU a product more is a launch more.
STRIPS = 4
NARROWEST = 64  # columns of a strip

COPIES = 1 << 24  # elements of matrices that are iterated at once: bounds the workspaces


class Iteration(NamedTuple):
    """What is computed of each matrix: the coefficients of every step, and how it is scaled before."""

    coefficients: tuple[Triple, ...]
    eps: float
    safety: float = 1.0


def iteration_of(group: Mapping[str, Any]) -> Iteration:
    """The iteration that a param group asks for."""
    steps, eps = int(group["ns_steps"]), float(group["eps"])
    if group["coefficients"] == "polar_express":
        table = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
        table += [_POLAR_EXPRESS[-1]] * max(1, steps - len(table))
        return Iteration(tuple(table[:steps]), eps, SAFETY)
    a, b, c = map(float, group["ns_coefficients"])
    return Iteration(((a, b, c),) * steps, eps)


class Workspaces:
    """Memory of iterations, kept from step to step; those of matrices of all shapes share it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def reserve(self, like: Tensor, count: int) -> None:
        """Has room for matrices `like` [n, rows, columns], so many at once."""
        rows, columns = like.shape[1:]
        size = count * (rows * columns + 2 * min(rows, columns) ** 2)
        key = like.device, like.dtype
        if key not in self._kept or self._kept[key].numel() < size:
            self._kept[key] = torch.empty(size, dtype=like.dtype, device=like.device)

    def of(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like X [n, rows, columns]; two [n, side, side] of its shorter side."""
        side, whole = min(X.shape[1:]), X.numel()
        square = len(X) * side * side
        kept = self._kept[X.device, X.dtype]
        parts = kept[: whole + 2 * square].split((whole, square, square))
        return parts[0].view(X.shape), parts[1].view(len(X), side, side), parts[2].view(len(X), side, side)


def at_once(rows: int, columns: int) -> int:
    """How many matrices of a shape are iterated at once."""
    return max(1, COPIES // (rows * columns))


def orthogonalize(X: Tensor, how: Iteration, spaces: Workspaces) -> int:
    """Makes each matrix of X [n, rows, columns] one whose singular values are about 1, in place.

    Matrices with more rows than columns are iterated from the right, which is the same as transposing them
    before and after. Returns the number of matrix products.
    """
    other, gram, power = spaces.of(X)
    norms = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)
    if how.safety != 1.0:
        norms.mul_(how.safety)
    norms.clamp_(min=how.eps)
    # The result is to be in X: each step moves from one to the other.
    now, then = (other, X) if len(how.coefficients) % 2 else (X, other)
    torch.div(X, norms, out=now)
    tall = X.shape[1] > X.shape[2]
    strips = _strips(gram)
    products = 0
    for a, b, c in how.coefficients:
        left, right = (now.mT, now) if tall else (now, now.mT)
        products += _symmetric(gram, None, left, right, strips, 0.0, 1.0)
        products += _symmetric(power, gram, gram, gram, strips, b, c)
        factors = (now, power) if tall else (power, now)
        torch.baddbmm(now, *factors, beta=a, out=then)
        products += 1
        now, then = then, now
    return products


def _strips(gram: Tensor) -> Sequence[tuple[int, int]]:
    """The columns that are computed at once, from their diagonal on."""
    side = gram.shape[1]
    count = max(1, min(STRIPS, side // NARROWEST)) if gram.device.type == "cpu" else 1
    cuts = [side * i // count for i in range(count + 1)]
    return [*pairwise(cuts)]


def _symmetric(
    out: Tensor,
    added: Tensor | None,
    left: Tensor,
    right: Tensor,
    strips: Sequence[tuple[int, int]],
    beta: float,
    alpha: float,
) -> int:
    """out = beta * added + alpha * left @ right, which is symmetric; returns the number of products."""
    for first, last in strips:
        rows, columns, place = left[:, first:], right[:, :, first:last], out[:, first:, first:last]
        if added is None:
            torch.bmm(rows, columns, out=place)
        else:
            torch.baddbmm(added[:, first:, first:last], rows, columns, beta=beta, alpha=alpha, out=place)
        if last < out.shape[1]:
            out[:, first:last, last:].copy_(out[:, last:, first:last].mT)
    return len(strips)
