"""The arithmetic a rule may use besides + - * and comparisons.

Every operation here is correctly rounded (IEEE 754), on every executor: with fused multiply-add off,
this is why the GPU, the CPU loop and plain torch agree to the last bit. A rule uses these names and no
others; whoever runs its source elsewhere only has to supply the same names.

Shapes: elementwise, operands broadcast.
"""

from .language import jit, tl


@jit
def divide(x, y):
    """x / y. Triton's own `/` is approximate in fp32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@jit
def sqrt(x):
    """Square root. Triton's own `sqrt` is approximate in fp32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@jit
def negative(x):
    """-x, of a zero too: Triton's own is 0 - x, which makes 0 of 0."""
    return x * -1.0


@jit
def absolute(x):
    """|x|."""
    return tl.abs(x)


@jit
def sign(x):
    """-1, 0 or 1; 0 of NaN, as torch.sign."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@jit
def maximum(x, y):
    """The larger operand; NaN if either is NaN, as torch.maximum."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@jit
def minimum(x, y):
    """The smaller operand; NaN if either is NaN, as torch.minimum."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@jit
def only_where(condition, x):
    """x where the condition holds, else 0."""
    return tl.where(condition, x, 0.0)


@jit
def where(condition, x, y):
    """x where the condition holds, else y."""
    return tl.where(condition, x, y)
