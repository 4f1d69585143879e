"""How values are kept in memory, device side: `decode` makes of them what rules see, `encode` undoes it.

Nothing else knows how a tensor is stored. So far that is in one floating-point type: a cast. Its twins are in
fusedcalib/executors/numba/memory.py and fusedcalib/executors/eager.py.
"""

from .language import jit, tl


@jit
def decode(x, SPEC: tl.constexpr):
    """What was read of a tensor [R, C], in the type of the arithmetic."""
    return x.to(SPEC.COMPUTE)


@jit
def encode(x, i: tl.constexpr, SPEC: tl.constexpr):
    """Values [R, C] as tensor i of the slot keeps them, rounded to nearest."""
    return x.to(SPEC.DTYPES[i])


@jit
def stored(x, DTYPE: tl.constexpr):
    """x as a tensor of DTYPE holds it, rounded to nearest."""
    return x.to(DTYPE).to(x.dtype)


@jit
def stochastic(x, bits, DTYPE: tl.constexpr):
    """fp32 x as one of the two bf16 numbers around it, up with the odds of its place between them.

    bits: 16 random ones (uint32). Only of bf16; any other DTYPE leaves x. Infinity and NaN stay.
    """
    if tl.bfloat16 == DTYPE:
        cut = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        return tl.where(x == x, cut.to(tl.float32, bitcast=True), x)
    else:
        return x
