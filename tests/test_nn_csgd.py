"""CSGD: the steps of weights and branch weights, and noise on calibrated weights only."""

import copy
import math

import pytest
import torch
from cases import BACKENDS
from nn_cases import OPTIONS, SIGNS, batches, each_backend, network, train, weights_of
from torch import nn
from torch.nn import functional

import fusedcalib
from fusedcalib import reference
from fusedcalib.nn import CSGD, CalibConv2d, csgd_groups

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("mode", ["mixed", "grouped"])
def test_a_step_is_the_references(sign, mode):
    model = network(mode=mode)
    optimizer = CSGD(model, lr=0.1, branch_lr=0.5, branch_sign=sign, backend="eager")
    for batch in batches(4):
        before = [R.detach().clone() for R in weights_of(model)]
        train(model, optimizer, [batch])
        for R, old in zip(weights_of(model), before, strict=True):
            torch.testing.assert_close(R, reference.branch_step(old, R.grad, 0.5, sign), rtol=0, atol=1e-15)
            assert R.min() >= 0
            torch.testing.assert_close(R.sum(0), torch.ones_like(R[0]), rtol=0, atol=1e-14)
            assert not torch.equal(R, old)


def test_descent_goes_down():
    """The branch weights alone lower the loss by one sign, and raise it by the other."""
    x, y = batches(1)[0]
    start = network()
    for layer in start:
        layer.train(not isinstance(layer, nn.BatchNorm2d))
    for sign, factor in (("descent", -1), ("literal", 1)):
        model = copy.deepcopy(start)
        optimizer = CSGD(csgd_groups(model)[-1:], branch_lr=0.01, branch_sign=sign)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            losses.append(functional.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        assert (losses[1] - losses[0]) * factor > 0


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *(("eager", options) for options in ({"lr": 0.1}, OPTIONS, {"lr": 0.1, "centralize": True})),
        (BACKENDS[0], OPTIONS),
    ],
)
def test_one_branch_without_noise_is_sgd(backend, options):
    """To the last bit, whether R is stepped as such or SGD leaves it alone."""
    model = network(branches=1, dtype=torch.float32)
    twin = copy.deepcopy(model)
    for R in weights_of(twin):
        R.requires_grad_(False)
    data = batches(5, torch.float32)
    train(model, CSGD(model, noise=None, backend=backend, **options), data)
    train(twin, fusedcalib.SGD(twin.parameters(), backend=backend, **options), data)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@each_backend
def test_without_branch_weights_it_is_sgd(backend):
    params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = CSGD(params, **OPTIONS, noise=None, backend=backend)
    theirs = fusedcalib.SGD(twins, **OPTIONS, backend=backend)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(map(torch.equal, params, twins))


@each_backend
def test_branch_weights_know_no_other_option(backend):
    """Nor does their part change that of the weights: momentum, decay, noise, centring, clipping, limits."""
    options = {"momentum": 0.9, "weight_decay": 0.5, "centralize": True, "centralize_min_ndim": 1, "l1": 0.1}
    options |= {"max_row_norm": 0.1, "max_grad_norm": 1e-3, "ema_decay": 0.5}
    R = nn.Parameter(torch.rand(3, 2, 2))
    w = nn.Parameter(torch.randn(4, 3))
    alone = nn.Parameter(w.detach().clone())
    groups = [{"params": [R], "branch": True, "lr": 0.1}, {"params": [w], "noise": None}]
    ours = CSGD(groups, lr=0.2, backend=backend, **options)
    theirs = CSGD([alone], lr=0.2, noise=None, backend=backend, **options)
    for _ in range(3):
        before = R.detach().clone()
        R.grad, w.grad = torch.randn_like(R), torch.randn_like(w)
        alone.grad = w.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(R.detach(), reference.branch_step(before, R.grad, 0.1))
        assert torch.equal(w, alone)
    assert R not in ours.state


# -- noise --------------------------------------------------------------------------------------


def test_noise_is_on_calibrated_weights_only():
    """Mean 0, std as asked for, not multiplied by lr, other numbers in each element and step."""
    model = nn.Sequential(CalibConv2d(16, 64, 3, branches=2), nn.Conv2d(128, 64, 1))
    optimizer = CSGD(model, lr=1e-30, noise=fusedcalib.WeightNoise(0.5), branch_lr=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moves = []
    for _ in range(2):
        old = model[0].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moves.append(model[0].weight.detach() - old)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name != "0.weight")
    for move in moves:
        n = move.numel()
        assert abs(move.mean()) < 5 * 0.5 / math.sqrt(n)
        assert abs(move.std() / 0.5 - 1) < 5 / math.sqrt(2 * n)
        assert abs((move[:, :16] * move[:, 16:]).mean()) < 5 * 0.25 / math.sqrt(n / 2)
    assert abs((moves[0] * moves[1]).mean()) < 5 * 0.25 / math.sqrt(n)


def test_row_sums_walk_at_random():
    """Var(row sum) = M sigma^2 t."""
    layer = CalibConv2d(4, 512, 3, branches=2, bias=False)
    optimizer = CSGD(layer, lr=1e-30, noise=fusedcalib.WeightNoise(0.1))
    start, rows = layer.weight.detach().sum((1, 2, 3)), layer.weight[0].numel()
    for _ in range(8):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    variance = (layer.weight.detach().sum((1, 2, 3)) - start).var()
    assert abs(variance / (rows * 0.01 * 8) - 1) < 5 * math.sqrt(2 / 512)


def test_default_noise():
    groups = CSGD(network()).param_groups
    assert [group["noise"] for group in groups[:2]] == [{"kind": "weights", "std": 1e-4}, {}]


def test_no_random_numbers_of_torch_are_used():
    model, data = network(), batches(2)
    optimizer = CSGD(model, **OPTIONS)
    state = torch.random.get_rng_state()
    train(model, optimizer, data)
    assert torch.equal(torch.random.get_rng_state(), state)
