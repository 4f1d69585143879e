"""The Newton-Schulz iteration, of many matrices of one shape at once, in workspaces that are kept."""

from __future__ import annotations

from collections.abc import Mapping
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

PRODUCTS = 3  # of a step
# Elements of matrices that are iterated at once: few enough for all of an iteration to stay in the caches of
# a CPU, where the work of a product is far more than that of calling it. Elsewhere they bound the workspaces.
CACHED = {"cpu": 1 << 17}
AT_ONCE = 1 << 24


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
        parts = torch.split(kept[: whole + 2 * square], [whole, square, square])
        return parts[0].view(X.shape), parts[1].view(len(X), side, side), parts[2].view(len(X), side, side)


def at_once(batch: Tensor) -> int:
    """How many matrices of a batch [n, rows, columns] are iterated at once."""
    return max(1, CACHED.get(batch.device.type, AT_ONCE) // (batch.shape[1] * batch.shape[2]))


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
    for a, b, c in how.coefficients:
        if tall:
            torch.bmm(now.mT, now, out=gram)
        else:
            torch.bmm(now, now.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=power)
        factors = (now, power) if tall else (power, now)
        torch.baddbmm(now, *factors, beta=a, out=then)
        now, then = then, now
    return PRODUCTS * len(how.coefficients)
