"""Virtual gradients: squares of output gradients accumulated, and these divided by their root, in one launch.

A program has some places of the output, all examples of them: it reads them twice, the second time mostly
from the L2 cache, and writes them once. No atomics; a place is added up in a fixed order.
"""

from .language import cdiv, jit, tl
from .ops import divide, sqrt

EXAMPLES, PLACES = 8, 128  # of a tile


@jit
def virtual_kernel(
    grad,
    scaled,
    r,
    gain,
    examples,
    places,
    scale,
    rho,
    fresh,
    eps,
    UPDATE: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
):
    """r <- rho r + fresh mean((gain grad)^2) where that is finite; scaled = grad scale / sqrt(r + eps)."""
    place = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = place < places
    squares = tl.load(r + place, mask=inside, other=0)
    if UPDATE:
        by = tl.load(gain)
        total = tl.zeros([M, P], tl.float32)
        for start in range(0, examples, M):
            example = (start + tl.arange(0, M)).to(tl.int64)[:, None]
            mask = (example < examples) & inside[None, :]
            q = tl.load(grad + example * places + place[None, :], mask=mask, other=0).to(tl.float32) * by
            total += q * q
        mean = divide(tl.sum(total, axis=0), (examples + tl.zeros([P], tl.int32)).to(tl.float32))
        new = rho * squares + fresh * mean
        squares = tl.where(tl.abs(new) < float("inf"), new, squares)
        tl.store(r + place, squares, mask=inside)
    under = squares + eps
    factor = tl.where(under > 0, divide(scale + tl.zeros([P], tl.float32), sqrt(under)), 0)
    for start in range(0, examples, M):
        example = (start + tl.arange(0, M)).to(tl.int64)[:, None]
        mask = (example < examples) & inside[None, :]
        at = example * places + place[None, :]
        g = tl.load(grad + at, mask=mask, other=0)
        tl.store(scaled + at, (g.to(tl.float32) * factor[None, :]).to(g.dtype), mask=mask)


def launch_virtual(grad, scaled, r, gain, scale: float, rho: float, eps: float, update: bool) -> None:
    """Accumulates and scales, on the current stream.

    Args:
        grad: fp32, bf16 or fp16 [examples, ...] on the device, contiguous.
        scaled: like grad, is written.
        r: fp32 [...], contiguous, is written where `update`.
        gain: fp32, one number on the device, by which the gradients are multiplied before they are squared.
        scale, rho, eps: as in the formula.
        update: whether to accumulate.
    """
    grid = (cdiv(r.numel(), PLACES),)
    numbers = (grad.shape[0], r.numel(), float(scale), float(rho), 1.0 - rho, float(eps))
    options = {"num_warps": 4, "enable_fp_fusion": False}
    virtual_kernel[grid](grad, scaled, r, gain, *numbers, UPDATE=update, M=EXAMPLES, P=PLACES, **options)
