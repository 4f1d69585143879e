"""The traffic of AdamW without its arithmetic, on the GPU: reads four arrays, writes three."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(a_ptr, b_ptr, c_ptr, d_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of flat float32 arrays whose length is a multiple of BLOCK."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offset)
    b = tl.load(b_ptr + offset)
    c = tl.load(c_ptr + offset)
    mean = (a + b + c + tl.load(d_ptr + offset)) * 0.25
    tl.store(a_ptr + offset, mean)
    tl.store(b_ptr + offset, mean)
    tl.store(c_ptr + offset, mean)


def stream(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Write the mean of four flat float32 arrays to the first three; length a multiple of 4096."""
    _kernel[(a.numel() // BLOCK,)](a, b, c, d, BLOCK=BLOCK, num_warps=8)
