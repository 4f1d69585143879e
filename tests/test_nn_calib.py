"""Calibrated convolutions against their formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fusedcalib import reference
from fusedcalib.nn import CSGD, BranchExpand, BranchReadout, CalibConv2d, branch_kernels, calibrate

MODES = ("mixed", "grouped")
F64 = torch.float64


def by_branch(layer, x):
    """The layer's output, one branch and one of torch's groups at a time."""
    K, groups = layer.branches, layer.groups
    planes = x.unflatten(1, (K, groups, -1))  # [N, K, groups, in / groups, H, W]
    w = layer.weight.unflatten(0, (groups, -1))
    bias = None if layer.bias is None else layer.bias.unflatten(0, (groups, -1))
    found = []
    for k in range(K):
        for i in range(groups):
            plain = nn.Conv2d(1, 1, layer.kernel_size, layer.stride, layer.padding, layer.dilation, dtype=F64)
            plain.padding_mode = layer.padding_mode
            plain._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
            inputs = planes[:, k, i] if layer.mode == "grouped" else planes[:, :, i].flatten(1, 2)
            found.append(plain._conv_forward(inputs, layer.R[k] * w[i], None if bias is None else bias[i]))
    return torch.cat(found, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2},
        {"padding": (2, 1), "dilation": (2, 1)},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect", "groups": 2},
        {"groups": 2},
        {"groups": 4, "bias": False},
        {"branches": 1, "groups": 2},
    ],
    ids=str,
)
def test_output_is_that_of_the_branches(mode, options):
    options = {"branches": 3, **options}
    layer = CalibConv2d(4, 8, (3, 2), mode=mode, dtype=F64, **options)
    x = torch.randn(2, 4 * options["branches"], 7, 6, dtype=F64)
    torch.testing.assert_close(layer(x), by_branch(layer, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode):
    layer = CalibConv2d(6, 8, (3, 1), groups=2, branches=4, mode=mode)
    planes = 12 if mode == "mixed" else 3
    assert layer.weight.shape == (8, planes, 3, 1)
    assert layer.R.shape == (4, 3, 1)
    assert layer.bias.shape == (8,)
    assert layer(torch.zeros(2, 24, 5, 5)).shape == (2, 32, 3, 5)
    assert f"branches=4, mode={mode}" in repr(layer)


def test_kernel_gradients():
    R = torch.rand(3, 2, 2, dtype=F64, requires_grad=True)
    w = torch.randn(4, 5, 2, 2, dtype=F64, requires_grad=True)
    H = branch_kernels(R, w)
    torch.testing.assert_close(H, reference.branch_kernels(R, w), rtol=0, atol=0)
    dH = torch.randn_like(H)
    H.backward(dH)
    dR, dw = reference.branch_kernel_gradients(R, w, dH)
    torch.testing.assert_close(R.grad, dR, rtol=0, atol=1e-13)
    torch.testing.assert_close(w.grad, dw, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(branch_kernels, (R, w))
    assert torch.autograd.gradgradcheck(branch_kernels, (R, w))


def test_literal_kernel_gradients():
    """Line 6 of Algorithm 1 read letter by letter: R once more than by the chain rule, in dw only."""
    R = torch.rand(3, 2, 2, dtype=F64, requires_grad=True)
    w = torch.randn(4, 5, 2, 2, dtype=F64, requires_grad=True)
    H = branch_kernels(R, w, "literal")
    assert torch.equal(H, branch_kernels(R, w))
    dH = torch.randn_like(H)
    H.backward(dH)
    torch.testing.assert_close(w.grad, (R[:, None, None] ** 2 * dH).sum(0).detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(R.grad, (w * dH).sum((1, 2)).detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_rules_of_layers(mode):
    """dw from the gradients of the kernels themselves; of R, bias and input as by the chain rule."""
    layer = CalibConv2d(2, 3, 3, branches=4, mode=mode, dtype=F64)
    twin = copy.deepcopy(layer)
    twin.grad_rule = "literal"
    x = torch.randn(2, 8, 5, 5, dtype=F64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for net, own in zip((layer, twin), inputs, strict=True):
        net(own).pow(3).sum().backward()
    dH = torch.zeros(4, *layer.weight.shape, dtype=F64)
    for k in range(4):
        H = (layer.R[k] * layer.weight).detach().requires_grad_()
        inp = x[:, 2 * k : 2 * k + 2] if mode == "grouped" else x
        functional.conv2d(inp, H, layer.bias.detach()).pow(3).sum().backward()
        dH[k] = H.grad
    R = layer.R.detach()[:, None, None]
    torch.testing.assert_close(layer.weight.grad, (R * dH).sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(twin.weight.grad, (R**2 * dH).sum(0), rtol=1e-10, atol=1e-10)
    for a, b in ((layer.R, twin.R), (layer.bias, twin.bias), inputs):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("frozen", ["R", "weight"])
def test_a_frozen_factor_has_no_gradient(frozen):
    layer = CalibConv2d(1, 2, 3)
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.randn(1, 4, 4, 4)).sum().backward()
    other = {"R": "weight", "weight": "R"}[frozen]
    assert getattr(layer, frozen).grad is None
    assert getattr(layer, other).grad is not None


def test_nothing_else_is_kept():
    R, w = torch.rand(4, 3, 3, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        branch_kernels(R, w)
    assert kept == [R.data_ptr(), w.data_ptr()]


def test_branch_weights_begin_normalised_and_different():
    R = CalibConv2d(1, 1, 3, branches=4, dtype=F64).R
    assert R.min() >= 0
    torch.testing.assert_close(R.sum(0), torch.ones(3, 3, dtype=F64), rtol=0, atol=1e-15)
    assert len(R.flatten().unique()) == R.numel()


def test_one_branch_is_conv2d():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    after = torch.rand(())
    torch.manual_seed(0)
    layer = CalibConv2d(3, 4, 3, padding=1, branches=1)
    assert torch.rand(()) == after
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.R, torch.ones(1, 3, 3))


@pytest.mark.parametrize("mode", MODES)
def test_branches_can_be_exchanged(mode):
    """The order of the branches is a name only: R and outputs move with it."""
    layer = CalibConv2d(2, 3, 3, branches=3, mode=mode, dtype=F64)
    x = BranchExpand(3)(torch.randn(2, 2, 6, 6, dtype=F64))
    order = torch.tensor([2, 0, 1])
    before = layer(x).unflatten(1, (3, -1))
    with torch.no_grad():
        layer.R.copy_(layer.R[order])
    torch.testing.assert_close(layer(x).unflatten(1, (3, -1)), before[:, order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_equal_branches_stay_equal(mode):
    """Why R begins at random."""
    model = nn.Sequential(
        *(BranchExpand(3), CalibConv2d(1, 4, 3, branches=3, mode=mode, dtype=F64)),
        *(nn.Tanh(), CalibConv2d(4, 2, 3, branches=3, mode=mode, dtype=F64)),
    )
    with torch.no_grad():
        for i in (1, 3):
            model[i].R.fill_(1 / 3)
            if mode == "mixed":  # the planes of all branches are the same
                own = model[i].weight.unflatten(1, (3, -1))
                own.copy_(own[:, :1].expand_as(own).clone())
    optimizer = CSGD(model, lr=0.1, branch_lr=0.1, noise=None, backend="eager")
    for _ in range(3):
        out = model(torch.randn(2, 1, 8, 8, dtype=F64)).unflatten(1, (3, -1))
        assert torch.allclose(out[:, :1].expand_as(out), out, rtol=0, atol=1e-15)
        optimizer.zero_grad()
        out.square().sum(1).mean().backward()
        optimizer.step()
        for i in (1, 3):
            torch.testing.assert_close(model[i].R, torch.full_like(model[i].R, 1 / 3), rtol=0, atol=1e-14)


def test_readout():
    x = torch.randn(2, 6, 3, 3)
    branches = x.view(2, 3, 2, 3, 3)
    assert torch.equal(BranchReadout(3)(x), x)
    assert torch.equal(BranchReadout(3, "max")(x), branches.max(1).values)
    assert torch.equal(BranchReadout(3, "mean")(x), branches.mean(1))
    with pytest.raises(ValueError, match="6 channels are not 4 branches"):
        BranchReadout(4)(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibConv2d(1, 1, 3, branches=0), "Invalid branches: 0"),
        (lambda: CalibConv2d(1, 1, 3, mode="both"), "Invalid mode: 'both'"),
        (lambda: CalibConv2d(1, 1, 3, grad_rule="x"), "Invalid grad_rule: 'x', expected one of bp, literal"),
        (lambda: branch_kernels(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), "x"), "Invalid grad_rule: 'x'"),
        (lambda: BranchExpand(1.5), "Invalid branches: 1.5"),
        (lambda: BranchReadout(2, "sum"), "Invalid readout: 'sum'"),
        (lambda: CalibConv2d(3, 1, 3)(torch.zeros(1, 3, 8, 8)), r"takes \[N, 12, H, W\]"),
        (lambda: calibrate(nn.Sequential(nn.Conv2d(1, 1, 1)), branches=-1), "Invalid branches: -1"),
        (lambda: calibrate(nn.Sequential(nn.Conv2d(1, 1, 1)), mode="x"), "Invalid mode: 'x'"),
        (lambda: calibrate(nn.Sequential(nn.Conv2d(1, 1, 1)), readout="x"), "Invalid readout: 'x'"),
        (lambda: calibrate(nn.Sequential(nn.Conv2d(1, 1, 1)), grad_rule="x"), "Invalid grad_rule: 'x'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compiled():
    layer = CalibConv2d(2, 3, 3, branches=2, groups=1, mode="grouped")
    x = torch.randn(2, 4, 6, 6)
    plain = layer(x)
    plain.sum().backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, plain)
    found.sum().backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_expanded_images_of_several_channels():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(BranchExpand(2)(x), torch.cat([x, x], 1))
