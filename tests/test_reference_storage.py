"""Compressed state as defined: exact where it claims it, bounded elsewhere, whatever is in a block."""

import math

import numpy as np
import pytest
import torch
from storage_cases import CODES, bits_of, fp32, largest_of, of_bits, roundtrip
from torch import Tensor

from fusedcalib.reference import storage
from fusedcalib.reference.storage import decode_nonnegative, decode_signed, encode_nonnegative, encode_signed

NAN, INF = math.nan, math.inf


def with_largest(values: Tensor, largest: float) -> Tensor:
    """Values as the first 63 columns of blocks whose last one is the largest."""
    rows = -(-len(values) // 63)
    filled = torch.zeros(rows * 63)
    filled[: len(values)] = values
    return torch.cat([filled.reshape(rows, 63), torch.full((rows, 1), largest)], dim=1)


def test_signed_codes_are_torchs_cast() -> None:
    """Of blocks whose largest is 256, such that nothing is scaled.

    Every 521st number from 0 to it, and the ties with what is next to them.
    """
    grid = torch.arange(121, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = bits_of((grid[1:] + grid[:-1]) / 2)
    near = of_bits(torch.cat([ties - 1, ties, ties + 1]))
    every = fp32(0, 0x43800001, 521)
    x = with_largest(torch.cat([near, every]), 256.0)
    for sign in (1, -1):
        codes, scales = encode_signed(sign * x)
        assert torch.equal(codes, (sign * x).to(torch.float8_e4m3fn).view(torch.uint8))
        assert (scales == 256).all()
        assert torch.equal(decode_signed(codes, scales), (sign * x).to(torch.float8_e4m3fn).float())


def test_nonnegative_codes_are_their_formula_in_integers() -> None:
    """Of blocks whose largest is 1: on the bits of a number, whose order its logarithm has, from below."""
    first = 0x3F800000 - 255 * 699050
    x = fp32(first - 10**7, 0x3F800001, 149)
    expected = ((bits_of(x).clamp(min=first) - first) * 12 + 2**22) // 2**23
    codes = encode_nonnegative(with_largest(x, 1.0))[0][:, :63].reshape(-1)[: len(x)]
    assert torch.equal(codes.long(), expected)
    assert (codes.diff() >= 0).all()
    assert (codes[0], codes[-1]) == (0, 255)
    values = decode_nonnegative(torch.arange(256, dtype=torch.uint8), torch.ones(1, 4))
    assert torch.equal(bits_of(values), first + 699050 * torch.arange(256))


@pytest.mark.parametrize("scale", [1.0, 2.0**-103, 3.4e38, 1.2345e-7])
@pytest.mark.parametrize("kind", CODES)
def test_every_code_that_is_made_is_its_own(kind: str, scale: float) -> None:
    encode, decode = CODES[kind]
    top = {"signed": 120, "nonnegative": 255}[kind]
    made = torch.arange(top, dtype=torch.uint8)
    if kind == "signed":
        made = torch.cat([made, made + 128])
    codes = torch.full((len(made), 2), top, dtype=torch.uint8)
    codes[:, 0] = made
    scales = torch.full((len(made), 1), scale)
    again = encode(decode(codes, scales))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@pytest.fixture(scope="module")
def values() -> Tensor:
    """Rows of 1000 columns: scales over many decades, and within a block over five and fifteen."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    blocks = [normal(100, 15, 64) * torch.exp(spread * normal(100, 15, 64)) for spread in (0.5, 2.0, 6.0)]
    scaled = torch.cat(blocks) * torch.exp(12 * normal(300, 15, 1))
    return torch.cat([scaled.flatten(1), normal(300, 40)], dim=1).clamp(-1e38, 1e38)


def test_errors_of_signed_codes(values: Tensor) -> None:
    """1/17 where E4M3 is normal, half its smallest step below; 1e-6 for the roundings of the scaling."""
    found, x, largest = decode_signed(*encode_signed(values)), values.double(), largest_of(values)
    error, normal = (found - x).abs(), x.abs() >= largest * 2.0**-14
    assert 0.3 < normal.double().mean() < 0.95
    assert (error[normal] <= x.abs()[normal] / 17 * (1 + 1e-6)).all()
    assert (error[~normal] <= largest[~normal] * 2.0**-18 * (1 + 1e-6)).all()
    assert torch.equal(torch.signbit(found), torch.signbit(values))


def test_errors_of_nonnegative_codes(values: Tensor) -> None:
    """Half a level is 1/24 octave of the lower end of a binade, and 170 units of 2^-23 where levels drift."""
    given = values.abs()
    found, x, largest = decode_nonnegative(*encode_nonnegative(given)), given.double(), largest_of(values)
    half = 1 / 24 + 170 / 2**23
    bound = half / (1 + half) * (1 + 1e-6)
    floor = largest * float(of_bits(torch.tensor(0x3F800000 - 255 * 699050)))
    above = x >= floor
    assert 0.3 < above.double().mean() < 0.97
    error = (found.double() / x - 1).abs()[above]
    assert error.max() <= bound < 0.0401
    assert error.max() > 0.039
    assert ((found.double() / x).sqrt() - 1).abs()[above].max() < 0.0203
    assert torch.equal(found[~above], floor.float()[~above])
    assert (found >= given)[~above].all()


@pytest.mark.parametrize("kind", CODES)
def test_a_blocks_largest_is_exact_and_encoding_again_changes_nothing(kind: str, values: Tensor) -> None:
    encode, decode = CODES[kind]
    x = values if kind == "signed" else values.abs()
    codes, scales = encode(x)
    found = decode(codes, scales)
    is_largest = x.abs() == largest_of(x)
    assert torch.equal(found[is_largest], x[is_largest])
    again = encode(found)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert (codes.shape, scales.shape) == (x.shape, (300, 16))


# -- hostile blocks ---------------------------------------------------------------------------

LENGTHS = (1, 63, 64, 65)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("level", [0.0, -0.0, 1e-40, 2.0**-111])
def test_blocks_that_are_zero_or_all_but(kind: str, length: int, level: float) -> None:
    """Their scale is 0; signs stay."""
    codes, scales, found = roundtrip(kind, torch.full((2, length), level))
    negative = kind == "signed" and math.copysign(1, level) < 0
    assert (codes == 128 * negative).all()
    assert torch.equal(scales, torch.zeros(2, -(-length // 64)))
    assert torch.equal(found, torch.zeros(2, length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", CODES)
def test_the_smallest_live_block(kind: str, length: int) -> None:
    x = torch.full((2, length), 2.0**-104)
    codes, scales, found = roundtrip(kind, x)
    assert torch.equal(found, x)
    assert (codes == codes[0, 0]).all()
    assert (scales == 2.0**-104).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", CODES)
def test_one_outlier(kind: str, length: int) -> None:
    """It is exact; the others are 0, or the floor where there is no 0. The next block has none."""
    x = torch.full((2, length), 1e-3)
    x[:, 0] = 1e6
    found = roundtrip(kind, x)[2]
    assert (found[:, 0] == 1e6).all()
    rest = found[:, 1:64]
    assert ((rest == 0) if kind == "signed" else ((rest - 0.417).abs() < 1e-3)).all()
    assert torch.equal(found[:, 64:], x[:, 64:])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_visible(kind: str, length: int, bad: float) -> None:
    x = torch.ones(2, length)
    x[0, 0] = bad
    codes, scales, found = roundtrip(kind, x)
    block, rest = found[0, :64], found[0, 64:]
    if math.isnan(bad):
        assert bits_of(scales[0, :1]).tolist() == [0x7FC00000]
        assert block.isnan().all()
        assert codes[0, 0] == (120 if kind == "signed" else 0)
    else:
        assert scales[0, 0] == INF
        assert not block.isfinite().any()
        assert block[0] == (bad if kind == "signed" else INF)
    assert torch.equal(rest, x[0, 64:])
    assert torch.equal(found[1], x[1])


def test_a_nan_of_any_bits_has_the_same_codes() -> None:
    x = of_bits(torch.tensor([[0x7F800001, 0x3F800000], [0xFFFFFFFF, 0x3F800000]]))
    codes, scales = encode_signed(x)
    assert torch.equal(codes[0], codes[1])
    assert bits_of(scales).tolist() == [[0x7FC00000]] * 2


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("largest", [8.6e37, 1.7e38, 3.4e38])
def test_scales_near_the_largest_fp32(kind: str, largest: float) -> None:
    """K / a is denormal here for K = 1, and the reciprocal of a where it is not."""
    x = torch.linspace(0.01, 1, 64).double() * largest
    found = roundtrip(kind, x.float())[2].double()
    assert found[-1] == x[-1].float()
    assert ((found / x - 1).abs() < 1 / 16.9).all()


@pytest.mark.parametrize("top", [256.0, 1.0])
def test_the_scaling_rounds_the_quotient_once(top: float) -> None:
    """As numpy's division does, also where the reciprocal of the scale is denormal."""
    largest = torch.cat([torch.rand(512) + 1, torch.rand(512) * 1.7e38 + 1.7e38])
    x = torch.rand(1024, 64) * largest[:, None]
    x[:, 0] = largest
    expected = x.numpy() * (np.float32(top) / largest.numpy())[:, None]
    assert torch.equal(storage._scaled(x, top)[1][:, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("kind", CODES)
def test_blocks_are_those_of_the_row_whatever_the_shape_and_layout(kind: str) -> None:
    """Columns are row-major over the other dimensions, a vector is one row; codes are contiguous."""
    encode, decode = CODES[kind]
    x = torch.rand(4, 6, 5, 7)
    codes, scales = encode(x)
    for row in range(4):
        flat = [encode(part) for part in x[row].flatten().split(64)]
        assert torch.equal(codes[row].flatten(), torch.cat([c for c, _ in flat]))
        assert torch.equal(scales[row], torch.cat([s.flatten() for _, s in flat]))
    strided = encode(x.to(memory_format=torch.channels_last))
    assert strided[0].is_contiguous()
    assert torch.equal(strided[0], codes)
    assert torch.equal(decode(*strided), decode(codes, scales))
    assert encode(x.flatten())[1].shape == (1, 14)
    assert decode(*encode(x.flatten(1))).is_contiguous()
    for shape in ((), (0,), (0, 3), (3, 0)):
        codes, scales = encode(torch.rand(shape))
        assert decode(codes, scales).shape == codes.shape == shape
        assert storage._blocks(codes).shape[:2] == scales.shape
