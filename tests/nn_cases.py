"""What the tests of CSGD share: a small calibrated network, and how it is trained."""

import pytest
import torch
from cases import BACKENDS
from torch import nn
from torch.nn import functional

from fusedcalib.nn import CalibConv2d, calibrate

F64 = torch.float64
SIGNS = ("descent", "literal")
# Of most tests that need no others: the loops of a set of options are compiled once.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def network(branches=3, dtype=F64, mode="mixed"):
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).to(dtype)
    calibrate(model, branches, mode)
    return model


def weights_of(model):
    return [layer.R for layer in model.modules() if isinstance(layer, CalibConv2d)]


def batches(steps, dtype=F64):
    return [(torch.randn(6, 1, 7, 7, dtype=dtype), torch.randint(3, (6,))) for _ in range(steps)]


def train(model, optimizer, data, scheduler=None):
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def branches_of(optimizer):
    return next(group for group in optimizer.param_groups if group["branch"])
