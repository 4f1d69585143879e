"""Virtual gradients against Algorithm 1, on linear layers and convolutions."""

import copy
import math

import pytest
import torch
from torch import nn
from virtual_cases import F64, PLAIN, backward, each_layer, examples_of, made, target_for

from fusedcalib import reference
from fusedcalib.nn import VirtualConv2d, VirtualLinear

CONVS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "dilation": 2, "padding": (2, 1)},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
]


@each_layer
def test_each_step_is_algorithm_1(name):
    """Three batches: q of each example's own loss, r after it, the weight gradient from both."""
    layer, plain, x = made(name, rho=0.7, eps=1e-3)
    r = 0.0
    for _ in range(3):
        x, target = torch.randn_like(x), target_for(plain, x)
        m = examples_of(name, x)
        dx, dw, db = backward(layer, x, target, examples=m)
        q = (3 * (plain(x) - target) ** 2).detach()  # each example's own
        seen = q.flatten(0, 1) if name == "linear, rows" else q
        if "channel" in name:  # as if each place were an example
            seen = q.transpose(0, 1).flatten(1).T
        r = torch.zeros(seen.shape[1:], dtype=F64) if isinstance(r, float) else r
        scaled, r = reference.virtual_gradient(seen, r, 0.3, 0.7, 1e-3)
        torch.testing.assert_close(layer.r, r, rtol=1e-14, atol=0)
        if "channel" in name:
            scaled = scaled.T.unflatten(1, (len(q), *q.shape[2:])).transpose(0, 1)
        if "conv" in name:
            expected = torch.nn.grad.conv2d_weight(x, layer.weight.shape, scaled) / m
        else:
            expected = reference.virtual_weight_gradient(x.flatten(0, -2), scaled.reshape(-1, 4))
            expected = expected * scaled.reshape(-1, 4).shape[0] / m
        torch.testing.assert_close(dw, expected, rtol=1e-12, atol=1e-14)
        plain_dx, _, plain_db = backward(plain, x, target, examples=m)
        assert torch.equal(dx, plain_dx)
        assert torch.equal(db, plain_db)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@each_layer
def test_plain_gradient(name, dtype):
    """rho = eps = s = 1: the factor is 1, and every gradient torch's own, to the last bit."""
    layer, plain, x = made(name, **PLAIN)
    layer, plain, x = layer.to(dtype), plain.to(dtype), x.to(dtype)
    target = target_for(plain, x)
    for ours, theirs in zip(backward(layer, x, target), backward(plain, x, target), strict=True):
        assert torch.equal(ours, theirs)
    assert not layer.r.any()


@pytest.mark.parametrize("r_shape", ["position", "channel"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_every_convolution(options, r_shape):
    layer = VirtualConv2d(2, 4, 3, dtype=F64, r_shape=r_shape, **PLAIN, **options)
    plain = nn.Conv2d(2, 4, 3, dtype=F64, **options)
    virtual = copy.deepcopy(layer)
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    for shape in ((3, 2, 7, 6), (2, 7, 6)):
        x = torch.randn(shape, dtype=F64)
        assert torch.equal(layer(x), plain(x))
        for net in (layer, plain):
            net.zero_grad()
            net(x).pow(3).sum().backward()
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-13)
    assert virtual.r.shape == (0,)


@each_layer
def test_the_papers_and_the_codes_scaling(name):
    """code(s, eps) = paper(m s, m^2 eps), exactly where m is a power of two."""
    paper, plain, x = made(name)
    m = examples_of(name, x) if name != "linear, rows" else 16
    if name == "linear, rows":
        x = torch.randn(4, 4, 5, dtype=F64)
    code = copy.deepcopy(paper)
    virtualized = {"scale": 0.25, "eps": 2.0**-10}
    paper.settings = type(paper.settings)(
        scale=m * virtualized["scale"], eps=m * m * virtualized["eps"], r_shape=paper.settings.r_shape
    )
    code.settings = type(code.settings)(**virtualized, r_shape=code.settings.r_shape, official_scaling=True)
    for _ in range(3):
        target = target_for(plain, x)
        for ours, theirs in zip(
            backward(paper, x, target, examples=m), backward(code, x, target, examples=m), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert torch.equal(paper.r, code.r * m * m)


@each_layer
def test_a_batch_twice_over_is_the_batch(name):
    layer, plain, x = made(name)
    target = target_for(plain, x)
    twin = copy.deepcopy(layer)
    m = examples_of(name, x)
    once = backward(layer, x, target, examples=m)
    twice = backward(twin, torch.cat([x, x]), torch.cat([target, target]), examples=2 * m)
    torch.testing.assert_close(once[1:], twice[1:], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(layer.r, twin.r, rtol=1e-14, atol=0)


@each_layer
def test_a_sum_is_m_means(name):
    mean, plain, x = made(name)
    total, target, m = copy.deepcopy(mean), target_for(plain, x), examples_of(name, x)
    total.settings = type(total.settings)(0.3, loss_reduction="sum", r_shape=total.settings.r_shape)
    a, b = backward(mean, x, target, examples=m), backward(total, x, target, examples=1)
    torch.testing.assert_close([m * g for g in a], list(b), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mean.r, total.r, rtol=1e-14, atol=0)


@each_layer
def test_scale_is_a_factor(name):
    layer, plain, x = made(name)
    twin = copy.deepcopy(layer)
    twin.settings = type(twin.settings)(4 * 0.3, r_shape=twin.settings.r_shape)
    target = target_for(plain, x)
    assert torch.equal(4 * backward(layer, x, target)[1], backward(twin, x, target)[1])


@each_layer
def test_without_eps_the_size_of_the_loss_does_not_matter(name):
    layer, plain, x = made(name, eps=0.0)
    twin, target = copy.deepcopy(layer), target_for(plain, x)
    small, large = backward(layer, x, target), backward(twin, x, target, factor=100.0)
    torch.testing.assert_close(small[1], large[1], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(100 * small[2], large[2], rtol=1e-13, atol=0)


def test_without_eps_dead_units_have_no_gradient():
    layer = VirtualLinear(3, 2, scale=1.0, eps=0.0)
    layer(torch.randn(4, 3))[:, 0].sum().backward()
    assert layer.weight.grad[1].tolist() == [0.0] * 3


def test_linear_is_a_factor_for_each_row():
    layer, plain, x = made("linear")
    target = target_for(plain, x)
    dw, plain_dw = backward(layer, x, target)[1], backward(plain, x, target)[1]
    factor = 0.3 / (layer.r + 1e-6).sqrt()
    torch.testing.assert_close(dw, factor[:, None] * plain_dw, rtol=1e-15, atol=0)
    assert (dw * plain_dw).sum() > 0
    centred = factor[:, None] * reference.centralize(plain_dw)
    torch.testing.assert_close(reference.centralize(dw), centred, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_scaled_gradients_are_bounded(rho):
    """|s q / sqrt(r + eps)| <= s sqrt(m / (1 - rho)), for one that is all there is in its place too."""
    q, r = torch.zeros(8, 5, dtype=F64), torch.zeros(5, dtype=F64)
    bound = 0.3 * math.sqrt(8 / (1 - rho))
    for size in (1e-3, 1e6, 1.0):
        q[0] = size * torch.randn(5, dtype=F64)
        scaled, r = reference.virtual_gradient(q, r, 0.3, rho)
        assert scaled.abs().max() <= bound * (1 + 1e-12)
    layer = VirtualConv2d(1, 1, 1, dtype=F64, scale=0.3, rho=rho)
    x = torch.ones(8, 1, 1, 1, dtype=F64)
    layer(x)[:1].sum().mul(1e9).div(8).backward()
    assert abs(layer.weight.grad * 8) <= bound * (1 + 1e-12)
    assert abs(layer.weight.grad * 8) >= 0.99 * bound


@each_layer
def test_r_moves_in_training_only(name):
    layer, plain, x = made(name)
    with torch.no_grad():
        layer(x)
    assert not layer.r.numel()
    target = target_for(plain, x)
    backward(layer, x, target)
    r = layer.r.clone()
    assert r.min() > 0
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    layer.weight.requires_grad_(True)
    layer.eval()
    frozen = backward(layer, x, target)[1]
    assert torch.equal(layer.r, r)
    assert torch.isfinite(frozen).all()
    layer.train()
    backward(layer, x, target)
    assert not torch.equal(layer.r, r)


@each_layer
def test_virtual_bias(name):
    layer, plain, x = made(name, virtual_bias=True)
    target = target_for(plain, x)
    dx, dw, db = backward(layer, x, target)
    other = made(name)[0]
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "r"}, strict=False)
    assert torch.equal(backward(other, x, target)[1], dw)
    factor = 0.3 / (layer.r + 1e-6).sqrt()
    q = torch.autograd.grad((y := plain(x)).sub(target).pow(3).sum() / len(x), y)[0]
    if layer.r.ndim > 1:
        expected = (q * factor).sum([d for d in range(q.ndim) if d != (1 if "conv" in name else q.ndim - 1)])
    else:
        expected = factor * (q.sum((0, 2, 3)) if "conv" in name else q.flatten(0, -2).sum(0))
    torch.testing.assert_close(db, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(dx, backward(plain, x, target)[0])


def test_reference_by_hand():
    scaled, r = reference.virtual_gradient(
        torch.tensor([[3.0], [4.0]], dtype=F64), torch.ones(1), 2.0, 0.5, 0.5
    )
    assert r.item() == 0.5 + 0.5 * 12.5
    torch.testing.assert_close(scaled.flatten(), torch.tensor([6.0, 8.0], dtype=F64) / math.sqrt(7.25))
