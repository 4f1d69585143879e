"""What the tests of the benchmark share."""

import torch

from fusedcalib.bench import load, shapes, timing

CPU = torch.device("cpu")
LITTLE = shapes.ParamList("little", ((8, 5), (7,), (4, 2, 3, 3), (8, 5)))


def sampler_of(values):
    return iter(values).__next__


def quiet_machine(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", lambda self: 0.0)
    monkeypatch.setattr(load, "GLANCE", 0.0)
