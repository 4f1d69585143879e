"""Branch weights (CSGD): the step of those of all layers in one launch.

A program takes one branch weight R [K, positions], which is small, and knows whether all of it is finite
before it writes any. Row of the table (int64): the addresses of R and its gradient, K, positions, and the
column of `numbers` and `sources` that has its learning rate.
"""

from typing import Any, NamedTuple

from .decide import leaf
from .language import jit, tl
from .ops import divide

FIELDS = 5
_FIELDS = tl.constexpr(FIELDS)


class BranchSpec(NamedTuple):
    """One specialisation of branch_kernel."""

    DTYPES: tuple[Any, ...]  # Triton's, of R and its gradient
    COMPUTE: Any  # dtype of the arithmetic
    CHECK: bool  # branch weights stay whose own step is not finite
    P: int = 128  # positions of a block


class Told(NamedTuple):
    """What a step is told; None where it is not."""

    grad_scale: Any  # fp32 [1]: gradients are this much too large
    found_inf: Any  # fp32 [1]: where not 0, everything stays
    norm: Any  # fp32 or fp64 [1]: where not finite, everything stays


class Branches(NamedTuple):
    """One branch weight, and what its gradient is multiplied by."""

    row: Any  # of the table: the addresses of R and its gradient come first
    K: Any
    positions: Any
    rate: Any
    scale: Any  # by which its gradient is divided; None where it is not


@jit
def branch_kernel(
    table,  # int64 [branch weights, FIELDS]
    numbers,  # fp64 [2, groups]: the learning rate, or 0; the sign of its step
    sources,  # int64 [groups]: where the learning rate lies, as in kernels/decide.py; 0: it is the number
    groups,
    told,  # Told
    SPEC: tl.constexpr,  # BranchSpec
):
    """R_k <- |R_k + sign lr dR_k|, divided by its sum over the branches; 1/K where that is 0."""
    P: tl.constexpr = SPEC.P
    row = table + tl.program_id(0) * _FIELDS
    K, positions, group = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    lr = leaf(numbers + group, sources + group, group >= 0)
    rate = (lr * tl.load(numbers + groups + group)).to(SPEC.COMPUTE)
    stays = lr == 0
    if told.found_inf is not None:
        stays = stays | (tl.load(told.found_inf) != 0)
    if told.norm is not None:
        stays = stays | _lost(tl.load(told.norm))
    branches = Branches(row, K, positions, rate, told.grad_scale)
    if SPEC.CHECK:
        lost = tl.zeros([P], tl.int32)
        for start in range(0, positions, P):
            lost += _lost(total_of(branches, start + tl.arange(0, P), SPEC)).to(tl.int32)
        stays = stays | (tl.sum(lost, axis=0) != 0)
    if stays:
        return
    for start in range(0, positions, P):
        place = start + tl.arange(0, P)
        total = total_of(branches, place, SPEC)
        even = divide(tl.full([P], 1, SPEC.COMPUTE), (K + tl.zeros([P], tl.int64)).to(SPEC.COMPUTE))
        for k in range(K):
            new = tl.where(total == 0, even, divide(moved_of(branches, place, k, SPEC), total))
            target = tensor_of(row, 0, SPEC) + k * positions + place
            tl.store(target, new.to(SPEC.DTYPES[0]), place < positions)


@jit
def _lost(x):
    """Whether x is not finite."""
    return x - x != 0


@jit
def tensor_of(row, i: tl.constexpr, SPEC: tl.constexpr):
    """Where R lies (tensor 0), or its gradient (1)."""
    return tl.load(row + i).to(tl.pointer_type(SPEC.DTYPES[i]))


@jit
def moved_of(branches, place, k, SPEC: tl.constexpr):
    """|R_k + rate dR_k| at some positions [P] of branch k, 0 outside."""
    at, inside = k * branches.positions + place, place < branches.positions
    R = tl.load(tensor_of(branches.row, 0, SPEC) + at, inside, other=0).to(SPEC.COMPUTE)
    g = tl.load(tensor_of(branches.row, 1, SPEC) + at, inside, other=0).to(SPEC.COMPUTE)
    if branches.scale is not None:
        g = divide(g, tl.load(branches.scale).to(SPEC.COMPUTE) + tl.zeros_like(g))
    return tl.where(inside, tl.abs(R + branches.rate * g), 0)


@jit
def total_of(branches, place, SPEC: tl.constexpr):
    """The sum of all branches at some positions [P]."""
    total = tl.zeros(place.shape, SPEC.COMPUTE)
    for k in range(branches.K):
        total += moved_of(branches, place, k, SPEC)
    return total
