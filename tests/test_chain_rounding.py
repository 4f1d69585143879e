"""Random rounding of bf16 parameters."""

import math

import pytest
import torch
from cases import BACKENDS, DEVICE, assert_identical, parameters, train
from chain_cases import each_backend

import fusedcalib
from fusedcalib import WeightNoise


def rounded(backend, value, count=100_000, seed=0, **options):
    """Many bf16 parameters after a step of SGD from 0 to a value."""
    w = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=DEVICE))
    w.grad_dtype = None
    w.grad = torch.full((count,), -value, device=DEVICE)
    fusedcalib.SGD([w], lr=1.0, stochastic_rounding=True, seed=seed, backend=backend, **options).step()
    return w.detach().float().cpu()


@each_backend
@pytest.mark.parametrize("place", [0.0, 0.125, 0.5, 0.9])
def test_rounding_is_unbiased(backend, place):
    """One of the two neighbours, the upper one with the odds of the value's place between them."""
    low, high = 1.0, 1.0 + 2**-7
    x = rounded(backend, low + place * 2**-7)
    assert set(x.tolist()) <= {low, high}
    found = (x == high).float().mean().item()
    assert abs(found - place) <= 5 * math.sqrt(place * (1 - place) / x.numel())  # five standard deviations


@each_backend
def test_rounding_of_special_values(backend):
    """Zero, infinity and NaN stay; a negative number goes to a neighbour too."""
    for value in (0.0, math.inf, -math.inf):
        assert set(rounded(backend, value, 64).tolist()) == {value}
    assert rounded(backend, math.nan, 64).isnan().all()
    assert set(rounded(backend, -1.0 - 2**-8, 1000).tolist()) == {-1.0, -1.0 - 2**-7}


def test_rounding_is_the_same_on_every_executor_and_by_seed():
    one, *others = (rounded(backend, 1.003) for backend in BACKENDS)
    assert all(torch.equal(one, other) for other in others)
    assert not torch.equal(one, rounded(BACKENDS[0], 1.003, seed=1))


def test_rounding_of_projected_rows_is_the_same_on_every_executor():
    """Of rows of several blocks of random numbers, all of whose elements become one number before it."""

    def run(backend):
        w = torch.nn.Parameter(torch.zeros(2, 2048, dtype=torch.bfloat16, device=DEVICE))
        w.grad_dtype = None
        w.grad = torch.full(w.shape, -4.0, device=DEVICE)
        options = {"stochastic_rounding": True, "max_row_norm": 1.003 * 2048**0.5, "backend": backend}
        fusedcalib.SGD([w], lr=1.0, **options).step()
        return w.detach().float().cpu()

    one, *others = map(run, BACKENDS)
    assert 0.2 < (one > 1).float().mean() < 0.6  # 0.384 of the way from 1 to the next
    assert all(torch.equal(one, other) for other in others)


@each_backend
@pytest.mark.parametrize("noise", [None, WeightNoise(1e-3)])
def test_rounding_does_not_depend_on_grouping(backend, noise):
    """Named parameters in one group, or in a group each in another order; also next to noise."""
    torch.manual_seed(0)
    start = {name: torch.randn(shape) for name, shape in (("a", (7, 13)), ("b", (50,)), ("c", (2, 5000)))}
    grads = {name: torch.randn_like(t) for name, t in start.items()}

    def run(arrange):
        params = {k: torch.nn.Parameter(t.to(DEVICE, torch.bfloat16)) for k, t in start.items()}
        opt = fusedcalib.AdamW(
            arrange(params), lr=0.1, stochastic_rounding=True, noise=noise, centralize=True, backend=backend
        )
        for _ in range(2):
            for k, p in params.items():
                p.grad = grads[k].to(p)
            opt.step()
        return {k: p.detach() for k, p in params.items()}

    one = run(lambda params: list(params.items()))
    many = run(lambda params: [{"params": [item]} for item in reversed(params.items())])
    assert_identical(one, many)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "numba"])
def test_rounding_leaves_fp32_alone_and_refuses_fp16(backend):
    params = parameters()
    opt = fusedcalib.SGD(params, stochastic_rounding=True, backend=backend)
    train(opt)
    opt = fusedcalib.SGD(parameters(dtype=torch.float16), stochastic_rounding=True, backend=backend)
    with pytest.raises(ValueError, match=r"fp16.*stochastic_rounding=False"):
        train(opt)


@each_backend
def test_random_rounding_goes_on_where_rounding_to_nearest_stands_still(backend):
    """Steps of 2^-10 from 1 in bf16, whose neighbours are 2^-7 and 2^-8 away: 512 of them go 1/2 far."""

    def end(**options):
        w = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=DEVICE))
        opt = fusedcalib.SGD([w], lr=2**-10, backend=backend, **options)
        w.grad = torch.ones_like(w)
        for _ in range(512):
            opt.step()
        return w.detach().double()

    assert (end() == 1).all()
    x = end(stochastic_rounding=True)
    # A step rounds by at most 2^-8, with a variance of 2^-18 at most, and there are 512.
    assert (x - 0.5).abs().max() <= 5 * math.sqrt(512 * 2.0**-18)
    assert abs(x.mean() - 0.5) <= 5 * math.sqrt(512 * 2.0**-18 / 64)
