"""The random numbers of noise: a published generator, normal and independent numbers, their schedules."""

import math

import numpy as np
import pytest
import torch

import fusedcalib
from fusedcalib import GradientNoise, LangevinNoise, WeightNoise, noise
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.layout.scalars import scalars_of

WORDS = (7, 11, 13)
KNOWN = {  # Random123's kat_vectors
    ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        *(0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(("arguments", "words"), KNOWN.items())
def test_philox_gives_the_published_words(arguments, words):
    assert tuple(map(int, noise.philox(*arguments))) == words


def test_normals_are_those_of_their_words():
    """Box and Muller in float64 over the same words: radius of one, angle and sign of the other."""
    first, count = 4 * 10**9, 10**6
    quads = np.arange(first // 4, (first + count) // 4, dtype=np.uint64)
    words = noise.philox((quads & np.uint64(0xFFFFFFFF), quads >> np.uint64(32), WORDS[0], 5), WORDS[1:])
    expected = []
    for a, b in (words[:2], words[2:]):
        radius = np.sqrt(-2 * np.log((a.astype(float) + 0.5) / 2**32))
        angle = np.pi / 2 * ((b & np.uint64(0x7FFFFF)).astype(float) / 2**22 - 1)
        sign = np.where(b >> np.uint64(31) != 0, -1, 1)
        expected += [radius * np.sin(angle), sign * radius * np.cos(angle)]
    found = noise.normals(first, count, 5, WORDS)
    assert np.abs(found - np.stack(expected, axis=1).reshape(-1)).max() < 6e-5


def spread(n, times=5.0):
    """`times` standard errors of a mean of n numbers of variance 1."""
    return times / math.sqrt(n)


@pytest.fixture(scope="module")
def sample():
    return noise.normals(0, 2**22, 1, WORDS).astype(np.float64)


def test_moments_are_those_of_a_normal(sample):
    n = sample.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((sample**power).mean() - moment) < math.sqrt(variance) * spread(n), power


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 3, 4, 5])
def test_tails_are_those_of_a_normal(sample, sigma):
    expected = math.erfc(sigma / math.sqrt(2))
    allowed = 5 * math.sqrt(expected / sample.size) + 1 / sample.size
    assert abs((np.abs(sample) > sigma).mean() - expected) < allowed


def test_neighbours_parameters_steps_seeds_and_purposes_are_independent(sample):
    n = sample.size
    for lag in (*range(1, 9), 512, 4096):
        assert abs((sample[lag:] * sample[:-lag]).mean()) < spread(n - lag), lag
    others = {
        "step": noise.normals(0, n, 2, WORDS),
        "stream": noise.normals(0, n, 1, (8, 11, 13)),
        "seed": noise.normals(0, n, 1, (7, 12, 13)),
        "purpose": noise.normals(0, n, 1, WORDS, stage="weights"),
    }
    for name, other in others.items():
        assert abs((sample * other).mean()) < spread(n), name
        assert abs((sample**2 * other.astype(float) ** 2).mean() - 1) < 3 * spread(n), name


@pytest.mark.parametrize("first", [0, 1, 2, 3, 2**34 + 6])
def test_any_stretch_is_part_of_the_whole(first):
    whole = noise.normals(first - first % 4, 300, 3, WORDS)
    np.testing.assert_array_equal(noise.normals(first, 200, 3, WORDS), whole[first % 4 :][:200])


def test_streams_follow_names_and_seeds():
    named = noise.words_of(1, "layer.weight", 0)
    assert named == noise.words_of(1, "layer.weight", 5)
    several = {noise.words_of(s, n, i) for s in (0, 1, 2**40) for n in (None, "a", "b") for i in (0, 1)}
    assert len(several) == 3 * (2 + 2)


# -- schedules --------------------------------------------------------------------------------


def deviation(kind, lr, step):
    """What a step takes: `sigma` of kernels/stages.py."""
    opt = fusedcalib.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, noise=kind)
    return scalars_of(recipe_of(opt.rule, opt.param_groups[0]), opt.param_groups[0], step)[4]


@pytest.mark.parametrize("step", [1, 2, 10_001])
def test_the_variance_of_gradient_noise_falls(step):
    """t = 0 at the first step; the deviation is the root of the variance."""
    expected = math.sqrt(0.3 / step**0.55)
    assert deviation(GradientNoise(0.3), 0.1, step) == pytest.approx(expected, rel=1e-12)


def test_noise_on_weights():
    assert deviation(WeightNoise(0.25), 0.1, 3) == 0.25
    assert deviation(LangevinNoise(0.5), 0.04, 3) == pytest.approx(0.2)
    assert deviation(WeightNoise(0.25), 0.0, 3) == deviation(LangevinNoise(0.5), 0.0, 3) == 0
    assert deviation(GradientNoise(0.25), 0.0, 1) == 0.5
    assert deviation(None, 0.1, 3) == 0
