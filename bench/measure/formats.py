"""What states in bytes are off by, by the definition of their formats: the gate allows it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """What states in bytes are off by: a share of themselves, and one of the largest of their block."""

    signed: tuple[float, float]
    nonnegative: tuple[float, float]

    def off(self, x: Tensor, name: str, sign: int) -> Tensor:
        """A state that is off by as much as it may be, in magnitude up or down."""
        share, of_largest = self.nonnegative if name in NONNEGATIVE else self.signed
        by = x.abs().mul_(share).add_(of_largest * x.abs().amax()).mul_(sign)
        return (x + by).clamp_min_(0) if name in NONNEGATIVE else x + by * torch.where(x < 0, -1.0, 1.0)


NONNEGATIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "exp_avg_var", "sum"}
FORMATS = {  # by definition of the formats
    "fusedcalib": Format((1 / 17, 2.0**-18), (0.04, 4.2e-7)),  # E4M3; twelve levels an octave, no zero
    "dynamic": Format((0.07, 7e-4), (0.035, 3.5e-4)),  # 64 levels in the top decade, half in each below
    "companded": Format((0.04, 2e-3), (0.04, 1e-4)),  # softsign in 127 levels; 255 of the square root
}
