"""Virtual gradients: squares of output gradients accumulated, and these divided by their root, in one launch.

A program has some places of the output, all examples of them: it reads them twice, the second time mostly
from the L2 cache, and writes them once. No atomics; a place is added up in a fixed order.
"""

from typing import Any, NamedTuple

from .language import jit, tl
from .ops import divide, sqrt


class VirtualSpec(NamedTuple):
    """One specialisation of virtual_kernel."""

    UPDATE: bool  # whether squares are accumulated
    M: int = 8  # examples of a tile
    P: int = 128  # places of a tile


class VirtualNumbers(NamedTuple):
    """The numbers of the formula, and the shape of the gradient [examples, places]."""

    examples: Any
    places: Any
    scale: Any
    rho: Any
    fresh: Any
    eps: Any


@jit
def virtual_kernel(
    grad,  # fp32, bf16 or fp16 [examples, places]
    scaled,  # like grad
    r,  # fp32 [places]
    gain,  # fp32 [1], by which the gradients are multiplied before they are squared
    n,  # VirtualNumbers
    SPEC: tl.constexpr,  # VirtualSpec
):
    """r <- rho r + fresh mean((gain grad)^2) where that is finite; scaled = grad scale / sqrt(r + eps)."""
    M: tl.constexpr = SPEC.M
    P: tl.constexpr = SPEC.P
    place = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = place < n.places
    squares = tl.load(r + place, mask=inside, other=0)
    if SPEC.UPDATE:
        by = tl.load(gain)
        total = tl.zeros([M, P], tl.float32)
        for start in range(0, n.examples, M):
            example = examples_of(start, SPEC)
            mask = (example < n.examples) & inside[None, :]
            q = tl.load(grad + example * n.places + place[None, :], mask=mask, other=0).to(tl.float32) * by
            total += q * q
        mean = divide(tl.sum(total, axis=0), (n.examples + tl.zeros([P], tl.int32)).to(tl.float32))
        new = n.rho * squares + n.fresh * mean
        squares = tl.where(tl.abs(new) < float("inf"), new, squares)
        tl.store(r + place, squares, mask=inside)
    under = squares + n.eps
    factor = tl.where(under > 0, divide(n.scale + tl.zeros([P], tl.float32), sqrt(under)), 0)
    for start in range(0, n.examples, M):
        example = examples_of(start, SPEC)
        mask = (example < n.examples) & inside[None, :]
        at = example * n.places + place[None, :]
        g = tl.load(grad + at, mask=mask, other=0)
        tl.store(scaled + at, (g.to(tl.float32) * factor[None, :]).to(g.dtype), mask=mask)


@jit
def examples_of(start, SPEC: tl.constexpr):
    """M examples [M, 1] from `start` on."""
    return (start + tl.arange(0, SPEC.M)).to(tl.int64)[:, None]
