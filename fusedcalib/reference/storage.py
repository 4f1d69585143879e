r"""Compressed optimizer state by its definition: slow, exact, and for any shape.

Each row (one index of dimension 0; a vector or a scalar is one row) is cut into blocks of 64 columns, the
last of which may be shorter. A block keeps its largest magnitude a, fp32, and an 8-bit code for each element:
E4M3 where state can be negative (`encode_signed`), twelve levels an octave where it cannot
(`encode_nonnegative`). A block's largest element is exact, and encoding what was decoded gives the same
codes and scales.

The codes are computed in float64 and on exact integers, such that shortcuts in single precision can be
judged. How weights are stored stands in `weights`, and its functions are here too.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .weights import join, split, stochastic_bf16

__all__ = [
    "decode_nonnegative",
    "decode_signed",
    "encode_nonnegative",
    "encode_signed",
    "join",
    "split",
    "stochastic_bf16",
]

BLOCK = 64
"""Columns that share a scale."""

LEAST_SCALE = 2.0**-104
"""Blocks whose largest magnitude is below it are stored as zeros, which keeps K / a far within fp32."""

LEVEL = 2**23 // 12
"""Distance of two levels of the code for non-negative state, in units of 2^-23 octaves."""

BELOW_ONE = 255 * LEVEL
"""How far code 0 lies below code 255, which is the block's largest, in units of 2^-23 octaves."""


# -- blocks -----------------------------------------------------------------------------------


def _blocks(x: Tensor) -> Tensor:
    """Elements as [rows, blocks, 64], the end of each row filled up with zeros."""
    rows = x.shape[0] if x.ndim > 1 else 1
    columns = math.prod(x.shape[1:] if x.ndim > 1 else x.shape)
    count = -(-columns // BLOCK)
    filled = x.new_zeros(rows, count * BLOCK)
    filled[:, :columns] = x.reshape(rows, columns)
    return filled.reshape(rows, count, BLOCK)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Elements of `_blocks` in their shape, row-major, without what they were filled up with."""
    columns = math.prod(shape[1:] if len(shape) > 1 else shape)
    return blocks.flatten(1)[:, :columns].reshape(shape).contiguous()


def _scaled(x: Tensor, top: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Divide the magnitudes of each block by the largest, as the formats define it.

    .. math:: y = |x| \cdot \mathrm{fl}(K / a), \qquad a = \max |x|

    both operations rounded once to fp32. The maximum of a block with a NaN is the quiet NaN, and one below
    2^-104 is 0, so that no decoded value is denormal. K / a is 0 where a is 0, infinite or NaN.

    Args:
        x: state, any shape.
        top: K, what the largest magnitude becomes, to within one rounding.

    Returns:
        x in blocks, y in blocks and a, fp32: ``[rows, blocks, 64]``, the same, ``[rows, blocks]``.
    """
    blocks = _blocks(x.detach().to(torch.float32))
    largest = blocks.abs().amax(dim=2)
    scales = torch.where(largest.isnan(), math.nan, largest)
    scales = torch.where(scales < LEAST_SCALE, 0.0, scales)
    quotient = torch.full_like(scales, top) / scales  # top / scales would round the reciprocal, then scale it
    inverse = torch.where(scales > 0, quotient, 0.0)
    return blocks, blocks.abs() * inverse[:, :, None], scales


def _decoded(codes: Tensor, scales: Tensor, share: Callable[[int], float]) -> Tensor:
    """The share that each code stands for times the scale of its block: one rounding to fp32."""
    shares = torch.tensor([share(code) for code in range(256)], dtype=torch.float32, device=codes.device)
    return _unblocked(shares[_blocks(codes).to(torch.int64)] * scales[:, :, None], codes.shape)


# -- signed state -----------------------------------------------------------------------------


def encode_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Encode state that can be negative in 8 bits: E4M3 of the share in the block's largest magnitude.

    With y from 0 to 256 = K the scaled magnitude, and e its binade, at least -6,

    .. math:: q = \mathrm{round}(y \cdot 2^{3 - e}), \qquad \mathrm{code} = 8 (e + 6) + q + 128 s

    rounded once, ties to even: three bits after the leading one down to 2^-6, from there on steps of 2^-9.
    The codes are those of OCP's E4M3 (torch.float8_e4m3fn) up to 256. What is not below 256, NaN with it,
    counts as 256. s is the sign bit of x, and 0 for NaN.

    Args:
        x: state, ``[rows, ...]``, any shape, computed in fp32.

    Returns:
        Codes, uint8, x's shape, row-major, and scales a, fp32, ``[rows, ceil(columns / 64)]``.

    Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0; blocks as in Dettmers et
    al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022.

    >>> import torch
    >>> codes, scales = encode_signed(torch.tensor([4.0, -1.0, 0.0, -1e-9]))
    >>> codes.tolist(), scales.tolist()
    ([120, 232, 0, 128], [[4.0]])
    """
    blocks, y, scales = _scaled(x, 256.0)
    y = torch.where(y < 256, y, 256.0).to(torch.float64)
    half, exponent = torch.frexp(y)  # y = half * 2^exponent, half in [1/2, 1)
    normal = y >= 2**-6
    binade = torch.where(normal, exponent.to(torch.int64) - 1, -6)
    q = torch.round(torch.where(normal, half * 2**4, y * 2**9)).to(torch.int64)
    sign = torch.where(blocks.isnan(), 0, torch.signbit(blocks).to(torch.int64))
    return _unblocked(8 * (binade + 6) + q + 128 * sign, x.shape).to(torch.uint8), scales


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    r"""Decode what `encode_signed` made.

    .. math:: \mathrm{value} = \mathrm{E4M3}(\mathrm{code}) \cdot (a \cdot 2^{-8})

    Args:
        codes: uint8, ``[rows, ...]``, any shape.
        scales: a, fp32, ``[rows, ceil(columns / 64)]``.

    Returns:
        State, fp32, of the codes' shape; NaN where the scale is.

    Source: as `encode_signed`.

    >>> import torch
    >>> decode_signed(*encode_signed(torch.tensor([4.0, -1.03, 0.0])))
    tensor([ 4., -1.,  0.])
    """
    return _decoded(codes, scales * 2.0**-8, _e4m3)


def _e4m3(code: int) -> float:
    """The number that a code of E4M3 stands for; 0x7F and 0xFF, NaN in OCP's format, are never made."""
    exponent, mantissa = code % 128 // 8, code % 8
    magnitude = math.ldexp(mantissa + 8, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -magnitude if code >= 128 else magnitude


# -- non-negative state -----------------------------------------------------------------------


def encode_nonnegative(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Encode state that is never negative in 8 bits: twelve levels an octave below the block's largest.

    Of r = x / a, from 0 to 1 = K, the logarithm is taken piecewise linearly,

    .. math:: l(r) = 2^{23} (e + r / 2^e - 1), \qquad 2^e \le r < 2^{e+1}

    an integer for fp32 numbers that are normal, which they are above the floor f_0 = 4.17e-7, that is
    :math:`l(f_0) = -255 \cdot 699050`. Then, rounded half up,

    .. math:: \mathrm{code} = \lfloor (12 (l(r) - l(f_0)) + 2^{22}) / 2^{23} \rfloor \in [0, 255]

    What is not above the floor, NaN with it, counts as the floor: there is no code for 0.

    Args:
        x: state, ``[rows, ...]``, any shape, computed in fp32.

    Returns:
        Codes, uint8, x's shape, row-major, and scales a, fp32, ``[rows, ceil(columns / 64)]``.

    Source: blocks as in Dettmers et al. 2022; a code without zero for second moments as in Li et al., Memory
    Efficient Optimizers with 4-bit States, NeurIPS 2023.

    >>> import torch
    >>> codes, scales = encode_nonnegative(torch.tensor([4.0, 2.0, 0.0]))
    >>> codes.tolist(), scales.tolist()
    ([255, 243, 0], [[4.0]])
    """
    _, r, scales = _scaled(x, 1.0)
    floor = _level(0)
    half, exponent = torch.frexp(torch.where(r > floor, r, floor).to(torch.float64))
    logarithm = (exponent.to(torch.int64) - 2) * 2**23 + (half * 2**24).to(torch.int64)
    codes = (12 * (logarithm + BELOW_ONE) + 2**22) // 2**23
    return _unblocked(codes, x.shape).to(torch.uint8), scales


def decode_nonnegative(codes: Tensor, scales: Tensor) -> Tensor:
    r"""Decode what `encode_nonnegative` made.

    .. math:: \mathrm{value} = l^{-1}(699050 (\mathrm{code} - 255)) \cdot a

    with l as there: code 255 is a itself, code 0 is 4.17e-7 a, and a block of zeros has a = 0.

    Args:
        codes: uint8, ``[rows, ...]``, any shape.
        scales: a, fp32, ``[rows, ceil(columns / 64)]``.

    Returns:
        State, fp32, of the codes' shape; NaN where the scale is.

    Source: as `encode_nonnegative`.

    >>> import torch
    >>> decode_nonnegative(*encode_nonnegative(torch.tensor([4.0, 1.01, 0.0])))
    tensor([4.0000e+00, 1.0000e+00, 1.6689e-06])
    """
    return _decoded(codes, scales, _level)


def _level(code: int) -> float:
    """The share in the block's largest that a code stands for, an fp32 number exactly."""
    binade, rest = divmod(LEVEL * code - BELOW_ONE, 2**23)
    return math.ldexp(2**23 + rest, binade - 23)
