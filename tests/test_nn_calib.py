"""Calibrated convolutions against their formulas, and torch's networks made into such."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fusedcalib import reference
from fusedcalib.bench.models import CCNNS, WideResNet, ccnns
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


def test_gradient_rules_are_one_with_one_branch():
    model = Plain().double()
    twins = [copy.deepcopy(model) for _ in range(2)]
    x = torch.randn(3, 1, 8, 8, dtype=F64)
    for twin, rule in zip(twins, ("bp", "literal"), strict=True):
        calibrate(twin, branches=1, grad_rule=rule)
        assert "grad_rule=" + rule in repr(twin)
        twin.eval()(x).square().sum().backward()
    for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
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
    optimizer = CSGD(model, lr=0.1, branch_lr=0.1, noise=None)
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


# -- calibrate ----------------------------------------------------------------------------------


class Plain(nn.Module):
    """Layers as modules and as functions, two heads, a shape read."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", bias=False), nn.BatchNorm2d(6)),
        )
        self.hidden = nn.Linear(6 * 4 * 4, 16)
        self.out, self.other = nn.Linear(16, 10), nn.Linear(6, 10)

    def forward(self, x):
        x = functional.dropout(functional.relu(self.features(x)), 0.1, self.training)
        pooled = functional.adaptive_avg_pool2d(x, 1)
        side = self.other(pooled.view(pooled.size(0), -1))
        return self.out(functional.relu(self.hidden(torch.flatten(x, 1)))) + side


class Residual(nn.Module):
    """Basic blocks as in torchvision's ResNets, normalised input, `x.shape`."""

    class Block(nn.Module):
        def __init__(self, inp, out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out, affine=False)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, groups=2)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = None
            if stride != 1:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )

        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += identity
            return self.relu(out)

    def __init__(self):
        super().__init__()
        self.input = nn.BatchNorm2d(1)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(4, 4, 1), self.Block(4, 8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.blocks(functional.max_pool2d(self.stem(self.input(x)), 2))
        x = functional.avg_pool2d(x, (1, x.shape[3]))
        x = functional.avg_pool2d(x, x.size()[2:])
        return self.head(x.reshape(x.shape[0], -1))


MODELS = {"plain": Plain, "residual": Residual, "wrn": lambda: WideResNet(10, (4, 4, 8, 8))}


def expected_count(model, K, mode, concat):
    """Parameters of the calibrated model: those of kernels K times (mixed), of norms and the read-out too."""
    total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            kernels = layer.weight.numel() * (K if mode == "mixed" else 1)
            total += kernels + K * layer.kernel_size[0] * layer.kernel_size[1]
            total += 0 if layer.bias is None else layer.bias.numel()
        elif isinstance(layer, nn.BatchNorm2d):
            total += (1 if name == "input" else K) * sum(p.numel() for p in layer.parameters())
        elif isinstance(layer, nn.Linear):
            reads = concat and name in ("hidden", "other", "head")
            total += layer.weight.numel() * (K if reads else 1) + layer.bias.numel()
    return total


@pytest.mark.parametrize("readout", ["concat", "max", "mean"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_calibrated_models_train(name, mode, readout):
    model = MODELS[name]()
    channels = next(p for p in model.parameters() if p.ndim == 4).shape[1]
    count = expected_count(model, 3, mode, readout == "concat")
    convs = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    changed = calibrate(model, branches=3, mode=mode, readout=readout)
    assert set(convs) <= set(changed)
    assert sum(p.numel() for p in model.parameters()) == count
    assert "input" not in changed
    optimizer = CSGD(model, lr=0.05, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = torch.randn(4, channels, 8, 8), torch.tensor([0, 1, 2, 3])
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    stayed = [n for (n, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p, old)]
    assert [n for n in stayed if "bias" not in n and ".1.weight" not in n and "R" not in n] == []


def test_what_was_changed_is_told():
    changed = calibrate(Residual(), branches=2, mode="grouped", readout="max")
    assert changed["stem"] == "Conv2d(1, 4) -> BranchExpand, CalibConv2d(1, 4) of 2 branches"
    assert changed["blocks.1.bn1"] == "BatchNorm2d(8) -> BatchNorm2d(16)"
    assert changed["head"] == "Linear(8, 10) -> BranchReadout, Linear(8, 10)"


def test_one_branch_changes_no_number():
    model = Residual().double()
    twin = copy.deepcopy(model)
    calibrate(twin, branches=1)
    x = torch.randn(3, 1, 8, 8, dtype=F64)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_what_stays_is_kept():
    """Values whose shapes stay, statistics, frozen parameters, the mode of training, dtypes."""
    model = Residual().double().eval()
    model.stem.weight.requires_grad_(False)
    model.blocks[0].bn1.running_mean.normal_()
    weight, mean = model.stem.weight.clone(), model.blocks[0].bn1.running_mean.clone()
    calibrate(model, branches=2, mode="grouped")
    stem = model.stem[1]
    assert torch.equal(stem.weight, weight)
    assert not stem.weight.requires_grad
    assert stem.R.dtype == F64
    assert torch.equal(model.blocks[0].bn1.running_mean, mean.repeat(2))
    assert not any(layer.training for layer in model.modules())


def with_forward(forward, **layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc = nn.Linear(4, 2)
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, x):
            return forward(self, x)

    return Net()


def out_of(self, x):
    return self.fc(x.mean((2, 3)))


def tied():
    model = with_forward(lambda self, x: out_of(self, self.conv(self.first(x))), first=nn.Conv2d(1, 4, 3))
    model.first.weight = model.conv.weight
    return model


def hooked():
    model = with_forward(lambda self, x: out_of(self, self.conv(x)))
    model.conv.register_forward_hook(lambda *_: None)
    return model


class OwnConv(nn.Conv2d):
    pass


REFUSED = {
    "returns branches": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3)), "it returns branches"),
    "no convolution": (lambda: nn.Sequential(nn.Linear(2, 2)), "it has no Conv2d"),
    "a layer by itself": (lambda: nn.Conv2d(1, 2, 3), "single layer"),
    "another norm": (
        lambda: with_forward(lambda self, x: out_of(self, self.n(self.conv(x))), n=nn.GroupNorm(2, 4)),
        r"n \(GroupNorm\) reads maps of branches",
    ),
    "a subclass": (
        lambda: with_forward(lambda self, x: out_of(self, self.own(x)), own=OwnConv(1, 4, 3)),
        "own is a OwnConv",
    ),
    "channels put together": (
        lambda: with_forward(lambda self, x: self.fc(torch.cat([self.conv(x)] * 2, 1).mean((2, 3)))),
        "torch.cat",
    ),
    "a width by number": (
        lambda: with_forward(lambda self, x: self.fc(functional.avg_pool2d(self.conv(x), 6).view(-1, 4))),
        "view",
    ),
    "the number of channels": (
        lambda: with_forward(lambda self, x: out_of(self, self.conv(x)) * self.conv(x).size(1)),
        "size",
    ),
    "a slice": (lambda: with_forward(lambda self, x: out_of(self, self.conv(x)[:, :2])), "getitem"),
    "the image again": (lambda: with_forward(lambda self, x: out_of(self, self.conv(x) + x)), "mixes values"),
    "a Linear on maps": (lambda: with_forward(lambda self, x: self.fc(self.conv(x))), "reads maps"),
    "a choice by value": (
        lambda: with_forward(lambda self, x: out_of(self, self.conv(x)) if x.sum() > 0 else x),
        "cannot be traced",
    ),
    "a weight by itself": (
        lambda: with_forward(lambda self, x: out_of(self, self.conv(x)) + self.conv.weight.sum()),
        "uses conv.weight itself",
    ),
    "tied weights": (tied, "shares a parameter"),
    "hooks": (hooked, "conv has hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_calibrated_is_left_alone(name):
    make, message = REFUSED[name]
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"cannot calibrate .*{message}.*nothing was changed"):
        calibrate(model, branches=2)
    assert dict(model.named_modules()) == before


def test_once_only():
    model = Plain()
    calibrate(model, 2)
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(model, 2)


@pytest.mark.parametrize(("name", "millions"), [("CCNNs2-40", 17.9), ("CCNNs3-28", 17.6)])
def test_parameters_of_the_papers_networks(name, millions):
    """Table 2, R and a wider read-out not counted, as there; with them they round to the same."""
    depth, widths, K = CCNNS[name]
    with torch.device("meta"):
        model, lean = ccnns(name), ccnns(name, readout="mean")
        plain = WideResNet(depth, widths)
    counted = sum(p.numel() for n, p in lean.named_parameters() if not n.endswith("R"))
    convs = [layer.weight.numel() for layer in plain.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer.num_features for layer in plain.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert counted == K * sum(convs) + 2 * K * sum(norms) + sum(p.numel() for p in plain.head.parameters())
    assert counted == {"CCNNs2-40": 17_895_850, "CCNNs3-28": 17_626_058}[name]
    assert round(counted / 1e6, 1) == millions
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
