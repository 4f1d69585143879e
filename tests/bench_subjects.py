"""What the tests of the benchmark share."""

import os
import sys
import time
import types

import torch

from fusedcalib.bench.measure import load, timing
from fusedcalib.bench.models import shapes

CPU = torch.device("cpu")
LITTLE = shapes.ParamList("little", ((8, 5), (7,), (4, 2, 3, 3), (8, 5)))


def sampler_of(values):
    return iter(values).__next__


def quiet_machine(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", lambda self: 0.0)
    monkeypatch.setattr(load, "GLANCE", 0.0)


def hang(*_):
    time.sleep(60)


def crash(*_):
    os.abort()


class Fake(torch.optim.AdamW):
    """Another library's AdamW; `breaks` names what becomes of it in which step."""

    breaks: tuple[int, BaseException] | None = None
    scale = 1.0
    made: list["Fake"] = []  # noqa: RUF012

    def __init__(self, params, lr, betas, eps, weight_decay, triton=None):
        super().__init__(params, self.scale * lr, betas, eps, weight_decay)
        self.triton, self.steps = triton, 0
        Fake.made.append(self)

    def step(self, closure=None):
        self.steps += 1
        if self.breaks and self.steps >= self.breaks[0]:
            raise self.breaks[1]
        return super().step(closure)


def fake_library(monkeypatch):
    """optimi, as it were; its class, whose behaviour a test may change."""
    module = types.ModuleType("optimi")
    module.AdamW = type("AdamW", (Fake,), {"__module__": "optimi"})
    module.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "optimi", module)
    return module.AdamW
