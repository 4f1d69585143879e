"""torch's networks made into calibrated ones."""

import copy

import pytest
import torch
from models import CCNNS, WideResNet, ccnns
from torch import nn
from torch.nn import functional

from fusedcalib.nn import CSGD, calibrate

MODES = ("mixed", "grouped")
F64 = torch.float64


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
    optimizer = CSGD(model, lr=0.05, momentum=0.9, backend="eager")
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
