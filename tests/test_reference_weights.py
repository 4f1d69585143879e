"""Split and rounded weights as defined: exact where they claim it, bounded elsewhere."""

import math

import pytest
import torch
from storage_cases import bits_of, fp32, of_bits, same_bits
from torch import Tensor

from fusedcalib.reference.weights import join, split, stochastic_bf16

LOWER = torch.tensor(sorted({(at + near) % 2**16 for at in (0, 2**7, 2**15) for near in range(-17, 17)}))


@pytest.fixture(scope="module")
def patterns() -> Tensor:
    """All upper halves of an fp32 number with the lower ones where rounding changes, NaNs among them."""
    assert len(LOWER) == 102
    return of_bits((torch.arange(2**16)[:, None] * 2**16 + LOWER).reshape(-1))


def test_a_split_number_is_joined_bit_for_bit(patterns: Tensor) -> None:
    param, rest = split(patterns)
    nan = patterns.isnan()
    assert (param.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(param.isnan(), nan)
    joined = join(param, rest)
    assert same_bits(joined[~nan], patterns[~nan])
    assert set(bits_of(joined[nan]).tolist()) == {0x7FC00000}
    assert not rest[nan].any()


def test_the_parameter_is_the_nearest_bf16_number_and_of_two_the_larger(patterns: Tensor) -> None:
    """Torch's cast, that is, except in ties, which it gives to the even one."""
    x = patterns[~patterns.isnan()]
    param, cast = split(x)[0], x.to(torch.bfloat16)
    tie = bits_of(x) % 2**16 == 2**15
    assert torch.equal(param[~tie].view(torch.int16), cast[~tie].view(torch.int16))
    assert same_bits(param[tie].float(), of_bits(bits_of(x[tie]) + 2**15))
    assert (param[tie].float().abs() > x[tie].abs()).all()


def overwritten(param: Tensor) -> dict[str, Tensor]:
    doubled = param * 2
    return {
        "zero": torch.zeros_like(param),
        "minus zero": -torch.zeros_like(param),
        "one": torch.ones_like(param),
        "doubled": torch.where(doubled.isfinite(), doubled, param),
    }


@pytest.mark.parametrize("how", ["zero", "minus zero", "one", "doubled"])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_parameter_written_from_outside_keeps_what_was_written(
    patterns: Tensor, how: str, bits: int
) -> None:
    """To half the distance of two bf16 numbers, which below 2^-126 is 2^-134."""
    x = patterns[patterns.isfinite()][:: 13 if bits == 16 else 29]
    param, rest = split(x, bits)
    finite = param.isfinite()
    param, rest = overwritten(param[finite])[how], rest[finite]
    found = join(param, rest, bits)
    assert torch.equal(torch.signbit(found), torch.signbit(param))
    _, exponent = torch.frexp(param.double())
    half = torch.exp2((exponent - 9).clamp(min=-134).double())
    assert ((found.double() - param.double()).abs() <= half).all()  # false of NaN


def test_eight_bits_keep_sixteen_significant_ones(patterns: Tensor) -> None:
    x = patterns[patterns.isfinite() & (patterns.abs() < 3.38e38)][::7]
    param, rest = split(x, bits=8)
    assert rest.dtype == torch.int8
    found = join(param, rest, bits=8)
    error = (found.double() - x.double()).abs()
    assert (error <= (x.abs().double() * 2.0**-16).clamp(min=2.0**-142)).all()
    assert torch.equal(torch.signbit(found), torch.signbit(x))
    again = split(found, bits=8)
    assert torch.equal(again[0].view(torch.int16), param.view(torch.int16))
    assert torch.equal(again[1], rest)


def test_eight_bits_of_what_is_not_finite() -> None:
    x = of_bits(torch.tensor([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FFFFFFF, 0xFF800001]))
    for random in (None, torch.full((5,), 255)):
        found = join(*split(x, bits=8, random=random), bits=8)
        assert torch.equal(found[:3], torch.tensor([math.inf, -math.inf, math.inf]))
        assert bits_of(found[3:]).tolist() == [0x7FC00000] * 2


SAMPLE = torch.tensor([1.0, -1.0000001, 3.14159274, 1.9999999, -2.7e-20, 6.1e30, 1e-40, 0.0, -0.0])


def test_eight_random_bits_have_the_mean_that_is_wanted() -> None:
    """Over all 256 of them exactly, the nearest two numbers being taken."""
    draws = torch.arange(256)[:, None].expand(-1, len(SAMPLE))
    x = SAMPLE.expand(256, -1)
    found = join(*split(x, bits=8, random=draws), bits=8).double()
    assert torch.equal(found.mean(dim=0), SAMPLE.double())
    spacing = torch.exp2((torch.frexp(SAMPLE.double()).exponent - 16).clamp(min=-141).double())
    assert ((found - x.double()).abs() < spacing).all()


def test_a_small_step_is_not_lost_at_random_as_it_is_to_nearest() -> None:
    """Weights 1, steps of 2^-20, a part in 32 of the spacing: 3 %, five deviations of the mean."""
    steps, n, step = 400, 2048, 2.0**-20
    weights = {"nearest": split(torch.ones(n), bits=8), "random": split(torch.ones(n), bits=8)}
    for _ in range(steps):
        draws = torch.randint(256, (n,))
        for how, random in (("nearest", None), ("random", draws)):
            weights[how] = split(join(*weights[how], bits=8) + step, bits=8, random=random)
    moved = {how: (join(*kept, bits=8).double() - 1).mean() for how, kept in weights.items()}
    assert moved["nearest"] == 0
    assert moved["random"] == pytest.approx(steps * step, rel=0.03)


def test_sixteen_random_bits_have_the_mean_that_is_wanted() -> None:
    draws = torch.arange(2**16)[:, None].expand(-1, len(SAMPLE))
    found = stochastic_bf16(SAMPLE.expand(2**16, -1), draws)
    assert torch.equal(found.double().mean(dim=0), SAMPLE.double())
    assert max(len(column.unique()) for column in found.float().T) == 2


def test_bf16_numbers_stay_whatever_the_random_bits() -> None:
    x = fp32(0, 2**32, 2**16)
    for bits in (0, 2**16 - 1):
        found = stochastic_bf16(x, torch.full(x.shape, bits))
        assert same_bits(found[~x.isnan()].float(), x[~x.isnan()])
        assert set(bits_of(found[x.isnan()].float()).tolist()) == {0x7FC00000}


def test_what_a_split_refuses() -> None:
    for function in (lambda: split(SAMPLE, bits=12), lambda: join(*split(SAMPLE), bits=12)):
        with pytest.raises(ValueError, match="16 or 8 bits, not 12"):
            function()
    with pytest.raises(ValueError, match="at random"):
        split(SAMPLE, random=torch.zeros(len(SAMPLE), dtype=torch.int64))
