"""How values are kept in memory: the forms a tensor may have, and what makes them of values and back.

A tensor of a slot is kept in one of these kinds:

    cast         one floating-point type, rounded to nearest
    stochastic   bf16, rounded at random: a state that is not negative
    signed       a byte an element, E4M3, and an fp32 scale for each 64 columns of a row: a state
    nonnegative  the same, twelve levels an octave and no zero: a state
    split16      bf16 and 16 bits more, which together are fp32 to the last bit: a parameter
    split8       bf16 and 8 bits more: a parameter of 24 bits
    float32      bf16 or fp16, and beside it the fp32 number that it is rounded from: a parameter

The functions of elements use the names of ops.py and `ELEMENTARY`, integers of 32 bits and correctly rounded
fp32: as with rules, all executors run this one source, and keep the same bits. The formulas are in
fusedcalib/reference/storage.py, which is independent of it.
"""

from .language import constexpr_function, jit, tl
from .ops import divide, where

COMPANIONS = ("split16", "split8", "float32")  # have a second tensor like the parameter
CODED = ("signed", "nonnegative")  # have scales
BLOCK = 64  # columns that share a scale
_BLOCK = tl.constexpr(BLOCK)
# What who runs the functions of elements elsewhere has to supply: four functions, and these as fp32.
ELEMENTARY = ("bits_of", "float_of", "at_most", "at_least")
SINGLES = {"_top": 256.0, "_infinity": float("inf"), "_normal": 2.0**-14, "_lowest": 4.1723734511833754e-07}
_top, _infinity = tl.constexpr(SINGLES["_top"]), tl.constexpr(SINGLES["_infinity"])
_normal, _lowest = tl.constexpr(SINGLES["_normal"]), tl.constexpr(SINGLES["_lowest"])


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


# -- of elements ------------------------------------------------------------------------------


@jit
def bits_of(x):
    """The bits of fp32 as int32."""
    return x.to(tl.int32, bitcast=True)


@jit
def float_of(bits):
    """The fp32 number of some bits."""
    return bits.to(tl.float32, bitcast=True)


@jit
def at_most(x, top):
    """The smaller of x and `top`; `top` where x is NaN."""
    return tl.minimum(x, top)


@jit
def at_least(x, bottom):
    """The larger of x and `bottom`; `bottom` where x is NaN."""
    return tl.maximum(x, bottom)


@jit
def trimmed(x, bits):
    """fp32 x with its lowest 8 bits 0, rounded: 128 as `bits` does it to nearest, a random byte at random."""
    return where(x == x, float_of((bits_of(x) + bits) >> 8 << 8), x)


@jit
def split(x):
    """fp32 x as the bits of bf16 (to nearest, ties away from zero) and the 16 that are left, signed."""
    bits = where(x == x, bits_of(x), 0x7FC00000)
    return (bits + 0x8000) >> 16, ((bits & 0xFFFF) ^ 0x8000) - 0x8000


@jit
def joined(high, low):
    """The fp32 number that was split into these; where bf16 was set to another, a number next to that."""
    magnitude = ((high & 0x7FFF) << 16) + low
    return float_of(((high & 0x8000) << 16) | where(magnitude > 0, magnitude, 0))


@jit
def signed_code(x, inverse):
    """E4M3 (0 to 255) of x times the inverse of its block's scale, rounded once, to nearest even.

    A number that is added to 2^20 times its power of two, 2^-6 at least, is rounded to steps of E4M3.
    """
    x = at_most(x, _infinity)  # NaN has no sign
    y = at_most(float_of(magnitude(x)) * inverse, _top)
    bits = bits_of(y)
    power = where(bits > 0x3C800000, bits, 0x3C800000) & 0x7F800000
    steps = bits_of(y + float_of(power + 0x0A000000)) - power - 0x0A0003C8
    return steps + (power >> 20) - (bits_of(x) >> 31) * 128


@jit
def signed_level(code):
    """The value of an E4M3 code (int32) over 256, yet to be multiplied by its block's scale."""
    value = float_of(((code & 0x7F) << 20) + 0x38000000)
    value = at_most(value, value + value - _normal)  # the smaller is the second for codes below 8
    return float_of(bits_of(value) | ((code & 0x80) << 24))


@jit
def nonnegative_code(x, inverse):
    """The place (0 to 255) of x, times the inverse of its block's scale, among 12 levels an octave.

    The bits of a float are a piecewise linear logarithm. A level is 2^23 // 12 = 699050 of them; code 0 is
    255 levels below 1, `_lowest`, and stands for all that is smaller: nothing in a block becomes zero.
    """
    return ((bits_of(at_least(x * inverse, _lowest)) - 0x34E000AA) * 12 + 0x400000) >> 23


@jit
def nonnegative_level(code):
    """The value of such a code (int32), yet to be multiplied by its block's scale."""
    return float_of(code * 699050 + 0x34E000AA)


@jit
def magnitude(x):
    """The bits of |x|, in the order of magnitudes: those of NaN are the largest."""
    return bits_of(x) & 0x7FFFFFFF


@jit
def scale_of(bits):
    """The scale of a block, of the bits (int32) of its largest magnitude: NaN if one is.

    Below 2^-104 it is 0: so no decoded value is denormal, which some threads would flush.
    """
    return float_of(where(bits > 0x7F800000, 0x7FC00000, where(bits < 0x0B800000, 0, bits)))


# -- of blocks --------------------------------------------------------------------------------


@constexpr_function
def kind_of(i, spec):
    """How tensor i of a slot is kept."""
    return spec.KEPT[i] if i < len(spec.KEPT) else "cast"


@constexpr_function
def values_of(spec):
    """How many tensors rules see: what a parameter has beside it comes last, and is none of them."""
    return len(spec.DTYPES) - (kind_of(0, spec) in ("split16", "split8", "float32"))


@constexpr_function
def scales_at(i, spec):
    """Where a row of the table has the address of the scales of tensor i: such addresses come last."""
    coded = [kind in ("signed", "nonnegative") for kind in spec.KEPT]
    return spec.FIELDS - sum(coded[i:])


@constexpr_function
def norms_at(spec):
    """Where a row of the table has the address of sums over the whole tensor: before those of scales."""
    return scales_at(0, spec) - 1


@jit
def scales_of(x, mask, SPEC: tl.constexpr):
    """The scales [R, C // 64] of the blocks of x [R, C] where the mask is."""
    R: tl.constexpr = SPEC.R
    C: tl.constexpr = SPEC.C
    bits = tl.where(mask, magnitude(x), 0)
    return scale_of(tl.max(bits.reshape([R, C // _BLOCK, _BLOCK]), axis=2))


@jit
def along_blocks(numbers, SPEC: tl.constexpr):
    """A number for each block [R, C // 64] as one for each element [R, C]."""
    R: tl.constexpr = SPEC.R
    C: tl.constexpr = SPEC.C
    return tl.broadcast_to(numbers[:, :, None], [R, C // _BLOCK, _BLOCK]).reshape([R, C])


@jit
def coded(x, scales, KIND: tl.constexpr, SPEC: tl.constexpr):
    """The bytes [R, C] of x and its scales [R, C // 64]."""
    top = tl.full(scales.shape, 256.0 if KIND == "signed" else 1.0, tl.float32)
    inverse = along_blocks(where(scales > 0, divide(top, scales), 0.0), SPEC)
    if KIND == "signed":
        return signed_code(x, inverse).to(tl.uint8)
    else:
        return nonnegative_code(x, inverse).to(tl.uint8)


@jit
def decoded(codes, scales, KIND: tl.constexpr, SPEC: tl.constexpr):
    """What bytes [R, C] and their scales [R, C // 64] stand for."""
    code = codes.to(tl.int32)
    level = signed_level(code) if KIND == "signed" else nonnegative_level(code)
    return level * along_blocks(scales, SPEC)
