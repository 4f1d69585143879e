"""The traffic of an optimizer without its arithmetic, on the GPU: reads arrays, writes all but the last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(arrays, share, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of flat float32 arrays whose length is a multiple of BLOCK."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(arrays)):
        mean += tl.load(arrays[k] + offset)
    mean *= share
    for k in tl.static_range(len(arrays) - 1):
        tl.store(arrays[k] + offset, mean)


def stream(*arrays: Tensor) -> None:
    """Write the mean of flat float32 arrays to all but the last; length a multiple of 4096."""
    _kernel[(arrays[0].numel() // BLOCK,)](arrays, 1 / len(arrays), BLOCK=BLOCK, num_warps=8)
