"""The ranges of numbers that rules have as options, said as torch.optim's classes do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .hostmath import is_remote

# Numbers of rules that may not be negative.
SIZES = {"lr", "eps", "weight_decay", "clip_exponent", "alpha", "alpha_warmup", "beta3_warmup", "trust_coeff"}


def check_ranges(options: Mapping[str, Any], cls: type) -> None:
    """Raises ValueError for an option out of its range: averaging factors in [0, 1), others at least 0."""
    for key, value in options.items():
        if not is_remote(value):
            _check_range(key, value)
    signature: inspect.Signature = cls.__signature__  # type: ignore[attr-defined]
    betas = signature.parameters.get("betas")
    if betas and isinstance(betas.default, tuple) and len(options["betas"]) != len(betas.default):
        raise ValueError(f"Invalid betas: {options['betas']}, expected {len(betas.default)} numbers")


def _check_range(key: str, value: Any) -> None:
    """Says it as torch.optim's classes do."""
    if key == "momentum":
        if not 0 <= value < 1:
            raise ValueError(f"Invalid {key} value: {value}, expected a number in [0, 1)")
    elif key == "betas":
        for index, beta in enumerate(value):
            if not is_remote(beta) and not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    elif key in SIZES and value is not None and not value >= 0:
        raise ValueError(f"Invalid {'learning rate' if key == 'lr' else f'{key} value'}: {value}")
