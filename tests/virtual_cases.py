"""What the tests of SVGD share: layers beside plain ones, and their gradients."""

import pytest
import torch
from torch import nn

from fusedcalib.nn import VirtualConv2d, VirtualLinear

F64 = torch.float64
PLAIN = {"scale": 1.0, "rho": 1.0, "eps": 1.0}  # r stays 0, the factor is 1
LAYERS = {
    "linear": (lambda **o: VirtualLinear(5, 4, dtype=F64, **o), (8, 5)),
    "linear, rows": (lambda **o: VirtualLinear(5, 4, dtype=F64, **o), (4, 3, 5)),
    "linear, position": (lambda **o: VirtualLinear(5, 4, dtype=F64, r_shape="position", **o), (4, 3, 5)),
    "conv": (lambda **o: VirtualConv2d(2, 4, 3, dtype=F64, **o), (8, 2, 6, 6)),
    "conv, channel": (lambda **o: VirtualConv2d(2, 4, 3, dtype=F64, r_shape="channel", **o), (8, 2, 6, 6)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, **options):
    """A layer and the plain one with its parameters."""
    make, shape = LAYERS[name]
    layer = make(**{"scale": 0.3, **options})
    linear = isinstance(layer, nn.Linear)
    plain = nn.Linear(5, 4, dtype=F64) if linear else nn.Conv2d(2, 4, 3, dtype=F64)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "r"})
    return layer, plain, torch.randn(shape, dtype=F64)


def backward(layer, x, target, factor=1.0, examples=None):
    """Gradients of input, weight and bias for a mean loss of which `target` [m, ...] is a part."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (factor * (y - target).pow(3).sum() / (examples or len(target))).backward()
    return x.grad, layer.weight.grad, layer.bias.grad


def examples_of(name, x):
    """How many examples the layer sees."""
    return x.shape[0] * x.shape[1] if name == "linear, rows" else x.shape[0]


def target_for(layer, x):
    return torch.randn_like(layer(x).detach())
