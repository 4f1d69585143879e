"""What a training sees of compressed moments: its updates, beside those of exact ones and of other codes."""

import pytest
import torch
from storage_cases import largest_of, roundtrip
from torch import Tensor


def test_second_moments_of_live_blocks_are_never_zero() -> None:
    """Also where nearly all gradients are 0 or tiny beside the largest."""
    g = torch.randn(64, 256) * 10 ** torch.empty(64, 256).uniform_(-18, 0)
    g[torch.rand(64, 256) < 0.5] = 0
    found = roundtrip("nonnegative", g**2)[2]
    alive = largest_of(g**2) >= 2.0**-104
    assert alive.all()
    assert (found > 0).all()


Pair = tuple[Tensor, Tensor]


def exact(m: Tensor, v: Tensor) -> Pair:
    return m, v


def blocks_of_64(m: Tensor, v: Tensor) -> Pair:
    return roundtrip("signed", m)[2], roundtrip("nonnegative", v)[2]


def linear(m: Tensor, v: Tensor) -> Pair:
    """255 equal steps up to the block's largest."""
    top = v.amax(1, keepdim=True)
    return roundtrip("signed", m)[2], torch.round(v / top * 255) / 255 * top


def fp8(m: Tensor, v: Tensor) -> Pair:
    """E4M3 up to 448 in blocks of 256 for both, which has a zero and no floor."""

    def stored(x: Tensor) -> Tensor:
        blocks = x.reshape(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True) / 448
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)

    return stored(m), stored(v)


def square_root(m: Tensor, v: Tensor) -> Pair:
    """255 equal steps of the root."""
    top = v.amax(1, keepdim=True).sqrt()
    return roundtrip("signed", m)[2], (torch.round(v.sqrt() / top * 255) / 255 * top) ** 2


def updates(stored, gradients, beta2: float) -> Tensor:
    """Updates of Adam whose averages are stored after each step, and taken fresh into it."""
    m = v = torch.zeros_like(gradients[0])
    moves = []
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
        moves.append(m / (1 - 0.9**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8))
        m, v = stored(m, v)
    return torch.stack(moves)


def gradients(spread: float, steps: int = 300, blocks: int = 48) -> Tensor:
    """sigma_i N(0.3, 1) with heavy tails, ln sigma_i ~ N(0, spread^2) within a block."""
    generator = torch.Generator().manual_seed(3)
    sigma = torch.exp(spread * torch.randn(blocks, 64, generator=generator))
    tails = torch.exp(0.5 * torch.randn(steps, blocks, 64, generator=generator))
    return sigma * tails * (0.3 + torch.randn(steps, blocks, 64, generator=generator))


def update_error(stored, spread: float, beta2: float) -> tuple[float, float]:
    """Rms error of the update over its rms, and the largest, in the later half of the steps."""
    given = gradients(spread)
    half = len(given) // 2
    expected = updates(exact, given, beta2)[half:]
    error = (updates(stored, given, beta2)[half:] - expected).double()
    return float((error.square().mean() / expected.double().square().mean()).sqrt()), float(error.abs().max())


ALLOWED = {0.95: 0.08, 0.999: 0.12}


@pytest.mark.parametrize("beta2", ALLOWED)
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_the_update_is_that_of_exact_states_to_a_few_per_cent(spread: float, beta2: float) -> None:
    rms, largest = update_error(blocks_of_64, spread, beta2)
    assert rms <= ALLOWED[beta2]
    assert largest < 0.5


@pytest.mark.parametrize("beta2", ALLOWED)
@pytest.mark.parametrize("stored", [linear, fp8, square_root])
def test_codes_with_a_zero_for_second_moments_are_found_out(stored, beta2: float) -> None:
    """The bounds above are of use: peers' codes do not keep them."""
    rms, largest = update_error(stored, 1.0, beta2)
    assert rms > ALLOWED[beta2]
    assert largest > 0.5


@pytest.mark.parametrize("spread", [0.5, 1.0])
@pytest.mark.parametrize("beta2", ALLOWED)
def test_an_element_whose_gradients_end_hardly_moves(spread: float, beta2: float) -> None:
    """Momentum of code 4 and less is not left by rounding, over the root of the floor: 4 2^-17 / 6.46e-4."""
    given = gradients(spread, steps=500, blocks=8)
    given[150:, :, ::4] = 0
    moves = updates(blocks_of_64, given, beta2)[:, :, ::4].abs()
    assert moves[150:].max() <= moves[149].max()
    assert moves[250:].max() < 0.05
    assert moves[250:].square().mean().sqrt() < 0.005


def test_an_element_that_never_has_a_gradient_does_not_move() -> None:
    given = gradients(1.0, steps=200, blocks=4)
    given[:, :, ::4] = 0
    assert not updates(blocks_of_64, given, 0.999)[:, :, ::4].any()
