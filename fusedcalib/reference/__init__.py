"""The oracles: every rule and stage again, from the papers, in plain PyTorch.

Pure functions on tensors of any floating dtype, computed in the dtype they are given (use float64
to judge another implementation). Nothing is modified in place, nothing else of the package is
imported: a reference that shared a line with what it judges could not find a fault in it.

`ORACLES` maps the name of an optimizer class to the function that takes one step of it. A new rule
is one new file here that declares its own ``ORACLES``; it is found by itself, and its function is exported
from here.

>>> import torch
>>> from fusedcalib.reference import ORACLES
>>> w, g = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
>>> w, state = ORACLES["SGD"](w, g, {}, lr=0.5, centralize=True)
>>> w
tensor([[ 0.5000, -0.5000]])
"""

import importlib
import pkgutil

from .branches import branch_kernel_gradients, branch_kernels, branch_step
from .momentum import ema_momentum, heavy_ball, nag_c, nag_sc, nesterov, velocity_momentum
from .nadam import ruder_nadam
from .newton import newton
from .pipeline import oracle
from .stages import (
    Oracle,
    State,
    centralize,
    coupled_decay,
    decoupled_decay,
    l1_subgradient,
    project_rows,
    proximal_decay,
)
from .virtual import virtual_gradient, virtual_weight_gradient

__all__ = [
    "ORACLES",
    "Oracle",
    "State",
    "branch_kernel_gradients",
    "branch_kernels",
    "branch_step",
    "centralize",
    "coupled_decay",
    "decoupled_decay",
    "ema_momentum",
    "heavy_ball",
    "l1_subgradient",
    "nag_c",
    "nag_sc",
    "nesterov",
    "newton",
    "oracle",
    "project_rows",
    "proximal_decay",
    "ruder_nadam",
    "velocity_momentum",
    "virtual_gradient",
    "virtual_weight_gradient",
]


def _discover() -> dict[str, Oracle]:
    """Merge the ``ORACLES`` of every file of this package; two files may not claim one name."""
    found: dict[str, Oracle] = {}
    for info in pkgutil.iter_modules(__path__):
        declared = getattr(importlib.import_module(f"{__name__}.{info.name}"), "ORACLES", {})
        if clash := found.keys() & declared.keys():
            raise RuntimeError(f"{info.name}.py declares oracles that exist: {sorted(clash)}")
        found |= declared
    return found


ORACLES: dict[str, Oracle] = _discover()
globals().update({function.__name__: function for function in ORACLES.values()})
__all__ += sorted(function.__name__ for function in ORACLES.values())
