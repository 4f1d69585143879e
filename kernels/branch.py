"""Branch weights (CSGD): the step of those of all layers in one launch.

A program takes one branch weight R [K, positions], which is small, and knows whether all of it is finite
before it writes any. Row of the table (int64): the addresses of R and its gradient, K, positions, and the
column of `numbers` and `sources` that has its learning rate.
"""

from .control import leaf
from .direct import Launch
from .language import jit, tl
from .ops import divide
from .table import pointer_of

POSITIONS = 128  # of a block
FIELDS = 5
_FIELDS = tl.constexpr(FIELDS)


@jit
def branch_kernel(
    table,  # int64 [branch weights, FIELDS]
    numbers,  # fp64 [2, groups]: the learning rate, or 0; the sign of its step
    sources,  # int64 [groups]: where the learning rate lies, as in kernels/control.py; 0: it is the number
    groups,
    grad_scale,  # fp32 [1] or None: gradients are this much too large
    found_inf,  # fp32 [1] or None: where not 0, everything stays
    norm,  # fp32 or fp64 [1] or None: where not finite, everything stays
    DTYPES: tl.constexpr,  # of R and its gradient
    COMPUTE: tl.constexpr,
    CHECK: tl.constexpr,  # branch weights stay whose own step is not finite
    P: tl.constexpr,
):
    """R_k <- |R_k + sign lr dR_k|, divided by its sum over the branches; 1/K where that is 0."""
    row = table + tl.program_id(0) * _FIELDS
    K, positions, group = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    lr = leaf(numbers + group, sources + group, group >= 0)
    rate = (lr * tl.load(numbers + groups + group)).to(COMPUTE)
    stays = lr == 0
    if found_inf is not None:
        stays = stays | (tl.load(found_inf) != 0)
    if norm is not None:
        stays = stays | _lost(tl.load(norm))
    if CHECK:
        lost = tl.zeros([P], tl.int32)
        for start in range(0, positions, P):
            place = start + tl.arange(0, P)
            lost += _lost(total_of(row, place, K, positions, rate, grad_scale, DTYPES, COMPUTE)).to(tl.int32)
        stays = stays | (tl.sum(lost, axis=0) != 0)
    if stays:
        return
    for start in range(0, positions, P):
        place = start + tl.arange(0, P)
        total = total_of(row, place, K, positions, rate, grad_scale, DTYPES, COMPUTE)
        even = divide(tl.full([P], 1, COMPUTE), (K + tl.zeros([P], tl.int64)).to(COMPUTE))
        for k in range(K):
            moved = moved_of(row, place, k, positions, rate, grad_scale, DTYPES, COMPUTE)
            new = tl.where(total == 0, even, divide(moved, total))
            target = pointer_of(tl.load(row), DTYPES[0], 1) + k * positions + place
            tl.store(target, new.to(DTYPES[0]), place < positions)


@jit
def _lost(x):
    """Whether x is not finite."""
    return x - x != 0


@jit
def moved_of(row, place, k, positions, rate, grad_scale, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """|R_k + rate dR_k| at some positions of branch k, 0 outside."""
    at, inside = k * positions + place, place < positions
    R = tl.load(pointer_of(tl.load(row), DTYPES[0], 1) + at, inside, other=0).to(COMPUTE)
    g = tl.load(pointer_of(tl.load(row + 1), DTYPES[1], 1) + at, inside, other=0).to(COMPUTE)
    if grad_scale is not None:
        g = divide(g, tl.load(grad_scale).to(COMPUTE) + tl.zeros_like(g))
    return tl.where(inside, tl.abs(R + rate * g), 0)


@jit
def total_of(row, place, K, positions, rate, grad_scale, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """The sum of all branches at some positions."""
    total = tl.zeros(place.shape, COMPUTE)
    for k in range(K):
        total += moved_of(row, place, k, positions, rate, grad_scale, DTYPES, COMPUTE)
    return total


def branch_launch(
    table, numbers, sources, grad_scale, found_inf, norm, dtypes, compute, check: bool
) -> Launch:
    """The step of every branch weight of the table; arguments as the kernel's."""
    tables = (table, numbers, sources, numbers.shape[1], grad_scale, found_inf, norm)
    constants = {"DTYPES": dtypes, "COMPUTE": compute, "CHECK": check, "P": POSITIONS}
    return Launch(
        branch_kernel, table.shape[0], tables, {**constants, "num_warps": 4, "enable_fp_fusion": False}
    )
