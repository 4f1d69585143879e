"""Random numbers by counter: Philox-4x32-10 (Salmon et al. 2011), and standard normals of its words.

A number depends on seed, stream, step, purpose and the index of its element, and on nothing else: not on
tiles, launches or the device. Words are the same on every executor to the last bit. Normals (Box and Muller
1958) are polynomials in fused multiply-adds: within 6e-5 of exact ones, the same on every executor but for a
GPU's square root, which is approximate: 2 units in the last place. They reach to 6.7 sigma.

A counter is (index // 4 in two words, stream, step and purpose); its four words are those of four elements.
"""

from typing import Any, NamedTuple

from .language import jit, tl

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
PURPOSES = {"gradient": 0, "weights": 1, "rounding": 2}  # in the two highest bits of the step's word
# Minimax polynomials, lowest power first: -2 ln(1 + s) / s for s in [1/sqrt 2 - 1, sqrt 2 - 1]; with f in
# [-1, 1) and z = f^2, sin(pi f / 2) / f and cos(pi f / 2).
LOG = (
    *(-2.0000091138541602, 0.9998043064615154, -0.6651608453096093, 0.5080670601699919),
    *(-0.441114402281546, 0.285827363392674),
)
SIN = (1.5707948516400303, -0.6459209762438789, 0.0794876541721947, -0.004362468657484906)
COS = (0.9999932951796583, -1.2334845019329783, 0.2525802341818433, -0.019095732042087858)
SQRT_HALF = 0x3F3504F3  # the bits of fp32 1/sqrt 2: splits a number into 2^e (1 + s)
MINUS_TWO_LN2 = -1.3862943611198906

_M0, _M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_W0, _W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
_ROUNDS = tl.constexpr(ROUNDS)
ON_WEIGHTS = tl.constexpr(PURPOSES["weights"] << 30)
ON_ROUNDING = tl.constexpr(PURPOSES["rounding"] << 30)
_LOG, _SIN, _COS = tl.constexpr(LOG), tl.constexpr(SIN), tl.constexpr(COS)
_SQRT_HALF, _MINUS_TWO_LN2 = tl.constexpr(SQRT_HALF), tl.constexpr(MINUS_TWO_LN2)


@jit
def word(x: tl.constexpr):
    """A constant as a word."""
    return tl.full([], x, tl.uint32)


@jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words [...] of a counter of four words and a key of two."""
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(c0, word(_M0)), c0 * word(_M0)
        high1, low1 = tl.umulhi(c2, word(_M1)), c2 * word(_M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + word(_W0), k1 + word(_W1)
    return c0, c1, c2, c3


@jit
def horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """A polynomial, lowest power first, each step rounded once."""
    y = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for i in tl.static_range(DEGREE - 1, -1, -1):
        y = tl.fma(x, y, tl.full(x.shape, COEFFICIENTS[i], tl.float32))
    return y


@jit
def normals(a, b, sigma):
    """Two normals [...], fp32, of two words: radius from a, angle from b."""
    u = tl.fma(a.to(tl.float32), 2.0**-32, 2.0**-33)  # in (0, 1]
    bits = u.to(tl.int32, bitcast=True) - _SQRT_HALF
    s = ((bits & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    exponent = (bits >> 23).to(tl.float32)
    radius = tl.sqrt(tl.fma(exponent, _MINUS_TWO_LN2, horner(s, _LOG, 5) * s)) * sigma
    # Half a turn: 23 bits as the fraction of a number in [2, 4); the highest bit makes it a whole one.
    f = ((b & word(0x7FFFFF)) | word(0x40000000)).to(tl.float32, bitcast=True) - 3.0
    z = f * f
    sine = radius * (horner(z, _SIN, 3) * f)
    cosine = radius * horner(z, _COS, 3)
    return sine, (cosine.to(tl.uint32, bitcast=True) ^ (b & word(0x80000000))).to(tl.float32, bitcast=True)


class Words(NamedTuple):
    """What numbers depend on besides the index of their element: uint32 each."""

    stream: Any
    step: Any  # and purpose
    key0: Any
    key1: Any


@jit
def words_at(index, words):
    """Four words [...] of the counters `index` (int64 [...]), which are element indices // 4."""
    return philox(index.to(tl.uint32), (index >> 32).to(tl.uint32), *words)


@jit
def normal_tile(first, sigma, words, R: tl.constexpr, C: tl.constexpr, QUADS: tl.constexpr):
    """Normals [R, C] of C elements each from the indices `first` [R, 1] on.

    QUADS: four neighbours in a row share a counter; 33 instructions an element. Else (rows of odd lengths)
    a row begins within a counter, so four elements choose from the words of two: 60 to 70 instructions.
    """
    a0, a1, b0, b1, d0, d1 = words_from(first, words, C, QUADS)
    x0, x1 = normals(a0, a1, sigma)
    x2, x3 = normals(b0, b1, sigma)
    if not QUADS:
        x4, _ = normals(d0, d1, sigma)
        odd = (first & 1) != 0
        x0, x1 = tl.where(odd, x1, x0), tl.where(odd, x2, x1)
        x2, x3 = tl.where(odd, x3, x2), tl.where(odd, x4, x3)
    return interleaved(x0, x1, x2, x3, R, C)


@jit
def word_tile(first, words, R: tl.constexpr, C: tl.constexpr, QUADS: tl.constexpr):
    """The word [R, C] of each element. Arguments as of normal_tile."""
    a0, a1, b0, b1, d0, _ = words_from(first, words, C, QUADS)
    if not QUADS:
        odd = (first & 1) != 0
        a0, a1 = tl.where(odd, a1, a0), tl.where(odd, b0, a1)
        b0, b1 = tl.where(odd, b1, b0), tl.where(odd, d0, b1)
    return interleaved(a0, a1, b0, b1, R, C)


@jit
def words_from(first, words, C: tl.constexpr, QUADS: tl.constexpr):
    """Words [R, C // 4] from element `first` [R, 1] on, or from that before it where it is odd.

    Four of each four elements, and two more where rows begin within a counter (not QUADS).
    """
    index = (first >> 2) + tl.arange(0, C // 4)[None, :]
    a0, a1, b0, b1 = words_at(index, words)
    d0, d1 = a0, a1
    if not QUADS:
        d0, d1, e0, e1 = words_at(index + 1, words)
        late = (first & 2) != 0
        a0, a1 = tl.where(late, b0, a0), tl.where(late, b1, a1)
        b0, b1 = tl.where(late, d0, b0), tl.where(late, d1, b1)
        d0, d1 = tl.where(late, e0, d0), tl.where(late, e1, d1)
    return a0, a1, b0, b1, d0, d1


@jit
def interleaved(x0, x1, x2, x3, R: tl.constexpr, C: tl.constexpr):
    """Four blocks [R, C // 4] as one [R, C]: 0, 1, 2, 3, 0, ..."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([R, C])
