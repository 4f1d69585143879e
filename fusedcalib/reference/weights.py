r"""Stored weights by their definitions: fp32 numbers as bf16 and a remainder, or rounded at random to bf16.

Everything is computed on the bits of numbers as exact integers, sign and magnitude apart.
"""

import torch
from torch import Tensor

_CANONICAL_NAN = 0x7FC00000


def _bits(x: Tensor) -> Tensor:
    """Bits of fp32 numbers as int64 in [0, 2^32); every NaN has the same ones, 0x7FC00000.

    Its lower 16 bits are 0, so that nothing added to them for rounding changes it.
    """
    bits = x.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64) % 2**32
    return torch.where(x.isnan(), _CANONICAL_NAN, bits)


def _floats(bits: Tensor) -> Tensor:
    """Fp32 numbers of bits given as int64 in [0, 2^32)."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _bf16(bits: Tensor) -> Tensor:
    """Numbers of bf16 of bits given as int64 in [0, 2^16); a cast would give NaN other bits."""
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.bfloat16)


def split(x: Tensor, bits: int = 16, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Split fp32 weights into the nearest bf16 numbers and the signed remainders.

    With s the sign bit and m the other 31 bits of x as an integer,

    .. math::
        h = \lfloor m / 2^{16} + 1/2 \rfloor, \qquad r = m - 2^{16} h \in [-2^{15}, 2^{15})

    and the parameter is the bf16 number of sign s and bits h: x rounded to nearest, ties away from zero.
    With 16 bits r is kept whole and nothing is lost. With 8 bits m is first rounded to a multiple of 256,

    .. math:: m \leftarrow 256 \lfloor (m + c) / 256 \rfloor

    c = 128 (to nearest) or random in 0...255 (then the mean of what is decoded is x), and r / 256 is kept:
    16 significant bits, error at most 2^-16 of x to nearest. NaN becomes the quiet NaN with remainder 0;
    magnitudes beyond the largest bf16 number have the parameter infinity.

    Args:
        x: weights, fp32, any shape.
        bits: of the remainder, 16 or 8.
        random: integers in [0, 256), x's shape; None rounds to nearest. With 8 bits only.

    Returns:
        bf16 parameter and int16 or int8 remainder, both of x's shape.

    Raises:
        ValueError: `bits` is neither 16 nor 8, or `random` is given with 16.

    Source: the split of apex and TransformerEngine's FusedAdam; 24 bits as in FlashOptim (arXiv 2602.23349).

    >>> import torch
    >>> split(torch.tensor([1.0 + 2**-9, -1.0]))
    (tensor([ 1., -1.], dtype=torch.bfloat16), tensor([16384,     0], dtype=torch.int16))
    >>> split(torch.tensor([1.0 + 2**-9]), bits=8)[1]
    tensor([64], dtype=torch.int8)
    """
    _check_bits(bits)
    if bits == 16 and random is not None:
        raise ValueError("a remainder of 16 bits is exact, there is nothing to round at random")
    whole = _bits(x)
    sign, magnitude = whole // 2**31, whole % 2**31
    if bits == 8:
        added = 128 if random is None else random.to(torch.int64)
        magnitude = (magnitude + added) // 256 * 256
    upper = (magnitude + 2**15) // 2**16
    rest = magnitude - upper * 2**16
    param = _bf16(sign * 2**15 + upper)
    return param, rest.to(torch.int16) if bits == 16 else (rest // 256).to(torch.int8)


def join(param: Tensor, remainder: Tensor, bits: int = 16) -> Tensor:
    r"""Join bf16 parameters and remainders to fp32 weights: the inverse of `split`.

    .. math:: m = \max(2^{16} h + 2^{16 - b} r, 0), \qquad \text{sign that of the parameter}

    with h the lower 15 bits of the parameter and b = `bits`. The maximum is idle after `split`; it keeps the
    sign of a parameter that was since overwritten with 0. Whatever finite number it was overwritten with is
    decoded to within half the distance of two bf16 numbers.

    Args:
        param: bf16, any shape.
        remainder: int16 (`bits` 16) or int8 (8), the same shape.
        bits: of the remainder, 16 or 8.

    Returns:
        Weights, fp32, of the same shape.

    Raises:
        ValueError: `bits` is neither 16 nor 8.

    Source: as `split`.

    >>> import torch
    >>> x = torch.tensor([3.14159274, -1e-41, 3.4e38])
    >>> torch.equal(join(*split(x)), x)
    True
    >>> join(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([-5], dtype=torch.int16))
    tensor([0.])
    """
    _check_bits(bits)
    pattern = param.detach().contiguous().view(torch.int16).to(torch.int64) % 2**16
    sign, upper = pattern // 2**15, pattern % 2**15
    magnitude = upper * 2**16 + remainder.to(torch.int64) * 2 ** (16 - bits)
    return _floats(sign * 2**31 + magnitude.clamp(min=0))


def _check_bits(bits: int) -> None:
    if bits not in (16, 8):
        raise ValueError(f"a remainder has 16 or 8 bits, not {bits!r}")


def stochastic_bf16(x: Tensor, bits16: Tensor) -> Tensor:
    r"""Round to one of the two bf16 neighbours, such that the mean over all random bits is x.

    .. math:: m \leftarrow 2^{16} \lfloor (m + c) / 2^{16} \rfloor

    with m the bits of x but its sign and c random: a neighbour is taken as often as x is near it, and bf16
    numbers stay. NaN becomes the quiet NaN.

    Args:
        x: fp32, any shape.
        bits16: c, integers in [0, 2^16), x's shape.

    Returns:
        bf16, x's shape.

    Source: Zamirai et al., Revisiting BFloat16 Training, 2020 (arXiv 2010.06192).

    >>> import torch
    >>> x = torch.full((4,), 1.0 + 2**-9)
    >>> stochastic_bf16(x, torch.tensor([0, 2**14, 2**15, 3 * 2**14])).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    whole = _bits(x)
    sign, magnitude = whole // 2**31, whole % 2**31
    return _bf16(sign * 2**15 + (magnitude + bits16.to(torch.int64)) // 2**16)
