"""A published run: least squares on the Hilbert matrix, as the SVGD authors logged it.

Source: github.com/LizhengMathAi/svgd at 9606388, math_question/logs/csv/math_gd.csv and
math_adagrad.csv; TensorFlow 1.8 in float32, GradientDescentOptimizer and AdagradOptimizer (squares
summed from 0.1, no eps). Only the numbers are theirs.
"""

from typing import Any

import pytest
import torch
from subjects import each_subject

# The loss before steps 0, 5, ... 95, to eight digits: a float32 to the last bit.
GD = [0.025000002, 0.016487272, 0.011903034, 0.009405318, 0.008016497, 0.0072176727, 0.0067334166]
GD += [0.0064175115, 0.006192326, 0.0060166246, 0.005868493, 0.005736268, 0.0056137303, 0.005497552]
GD += [0.0053859344, 0.005277901, 0.0051729013, 0.0050706193, 0.0049708607, 0.0048734997]
ADAGRAD = [0.025000002, 0.010264884, 0.0069488124, 0.0058999537, 0.005446352, 0.00516227, 0.00493275]
ADAGRAD += [0.0047260616, 0.004533089, 0.004350891, 0.00417825, 0.00401445, 0.0038589358, 0.003711227]
ADAGRAD += [0.003570881, 0.0034374883, 0.0033106678, 0.0031900613, 0.0030753366, 0.0029661767]
RUNS = {"SGD": (GD, {}), "Adagrad": (ADAGRAD, {"initial_accumulator_value": 0.1, "eps": 0.0})}


@each_subject
@pytest.mark.parametrize("rule", RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_logged_losses_of_the_hilbert_problem(subject: Any, rule: str, dtype: torch.dtype) -> None:
    """|A x - b|^2 from x = 0, A_ij = 1 / (i + j + 1), b = 0.05, lr = 0.01, to a millionth.

    The log is a float32 run, so a float64 run is no nearer to it than a float32 one. The roundings of
    its weights alone, carried to the last loss, make 2.8e-6 (GD) or 3.6e-6 (Adagrad) if all pull one
    way and 6e-8 if they are independent. With those of gradient and loss it is 1.9e-7 and 2.8e-7
    from float64, and another float32 run may be as far off the other way: 6e-7. An lr off by 5e-6
    of itself, squares from 0.1 (1 + 1e-5) and an eps of 1e-6 are all beyond a millionth.
    """
    losses, options = RUNS[rule]
    i = torch.arange(10, dtype=dtype)
    a, b = 1 / (i[:, None] + i + 1), torch.full((10,), 0.05, dtype=dtype)
    run = subject(rule, [torch.zeros_like(b)], lr=0.01, **options)
    seen = []
    for _ in range(5 * len(losses)):
        residual = a @ run.params[0] - b
        seen.append(residual.square().sum())
        run.step(2 * (a.T @ residual))
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(seen[::5]).double(), expected, rtol=1e-6, atol=0)
