"""Layers and the optimizer of two methods that change the gradient inside the network: CSGD and SVGD.

CSGD: `CalibConv2d`, `BranchExpand`, `BranchReadout`, `calibrate`, `csgd_groups`, `CSGD`, `branch_step`.
SVGD: `VirtualLinear`, `VirtualConv2d`, `virtualize`, `set_loss_scale`, `scale_in_step`.

>>> import torch, fusedcalib.nn
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
>>> for name, change in fusedcalib.nn.calibrate(model, branches=2).items():
...     print(name, change)
0 Conv2d(1, 4) -> BranchExpand, CalibConv2d(1, 4) of 2 branches
2 Linear(144, 10) -> Linear(288, 10)
>>> opt = fusedcalib.nn.CSGD(model, lr=0.1, momentum=0.9)
"""

from .branch import branch_step
from .calib import BranchExpand, BranchReadout, CalibConv2d, branch_kernels
from .convert import calibrate
from .csgd import CSGD, csgd_groups
from .virtual_layers import VirtualConv2d, VirtualLinear
from .virtualize import scale_in_step, set_loss_scale, virtualize

__all__ = [
    "CSGD",
    "BranchExpand",
    "BranchReadout",
    "CalibConv2d",
    "VirtualConv2d",
    "VirtualLinear",
    "branch_kernels",
    "branch_step",
    "calibrate",
    "csgd_groups",
    "scale_in_step",
    "set_loss_scale",
    "virtualize",
]
