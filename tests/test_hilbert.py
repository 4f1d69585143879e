"""The published run of examples/papers/hilbert.py, retraced by oracles and classes alike."""

from typing import Any

import hilbert
import pytest
import torch
from subjects import each_subject


@each_subject
@pytest.mark.parametrize("rule", hilbert.RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_logged_losses_of_the_hilbert_problem(subject: Any, rule: str, dtype: torch.dtype) -> None:
    """To a millionth.

    The log is a float32 run, so a float64 run is no nearer to it than a float32 one. The roundings of
    its weights alone, carried to the last loss, make 2.8e-6 (GD) or 3.6e-6 (Adagrad) if all pull one
    way and 6e-8 if they are independent. With those of gradient and loss it is 1.9e-7 and 2.8e-7
    from float64, and another float32 run may be as far off the other way: 6e-7. An lr off by 5e-6
    of itself, squares from 0.1 (1 + 1e-5) and an eps of 1e-6 are all beyond a millionth.
    """
    published, options = hilbert.RUNS[rule]
    run = subject(rule, [torch.zeros(hilbert.SIZE, dtype=dtype)], **options)
    seen = hilbert.losses(lambda: run.params[0], run.step, dtype)
    expected = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=hilbert.TOLERANCE, atol=0)
