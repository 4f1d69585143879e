"""A published run: least squares on the Hilbert matrix, as the SVGD authors logged it.

|A x - b|^2 from x = 0, A_ij = 1 / (i + j + 1), b = 0.05, lr = 0.01.

Source: github.com/LizhengMathAi/svgd at 9606388, math_question/logs/csv/math_gd.csv and
math_adagrad.csv; TensorFlow 1.8 in float32, GradientDescentOptimizer and AdagradOptimizer (squares
summed from 0.1, no eps). Only the numbers are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The loss before steps 0, 5, ... 95, to eight digits: a float32 to the last bit.
GD = [0.025000002, 0.016487272, 0.011903034, 0.009405318, 0.008016497, 0.0072176727, 0.0067334166]
GD += [0.0064175115, 0.006192326, 0.0060166246, 0.005868493, 0.005736268, 0.0056137303, 0.005497552]
GD += [0.0053859344, 0.005277901, 0.0051729013, 0.0050706193, 0.0049708607, 0.0048734997]
ADAGRAD = [0.025000002, 0.010264884, 0.0069488124, 0.0058999537, 0.005446352, 0.00516227, 0.00493275]
ADAGRAD += [0.0047260616, 0.004533089, 0.004350891, 0.00417825, 0.00401445, 0.0038589358, 0.003711227]
ADAGRAD += [0.003570881, 0.0034374883, 0.0033106678, 0.0031900613, 0.0030753366, 0.0029661767]
RUNS: dict[str, tuple[list[float], dict[str, Any]]] = {
    "SGD": (GD, {"lr": 0.01}),
    "Adagrad": (ADAGRAD, {"lr": 0.01, "initial_accumulator_value": 0.1, "eps": 0.0}),
}
SIZE, EVERY = 10, 5
TOLERANCE = 1e-6  # of a loss itself


def losses(at: Callable[[], Tensor], step: Callable[[Tensor], object], dtype: torch.dtype) -> Tensor:
    """The loss before every fifth of the steps of a run that is at `at()` and is stepped by its gradient."""
    i = torch.arange(SIZE, dtype=dtype)
    a, b = 1 / (i[:, None] + i + 1), torch.full((SIZE,), 0.05, dtype=dtype)
    seen = []
    for _ in range(EVERY * len(GD)):
        residual = a @ at() - b
        seen.append(residual.square().sum())
        step(2 * (a.T @ residual))
    return torch.stack(seen[::EVERY]).double()
