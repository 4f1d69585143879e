"""The executor for CPUs: the device functions of the rules, compiled by numba into one loop over memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch


def why_not(device: torch.device, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why it cannot run a parameter; None if it can. `by_name`: whether it is asked for."""
    if find_spec("numba") is None:
        return "needs numba: pip install numba, or use backend='auto'"
    if device.type != "cpu":
        return f"needs parameters on the CPU, but one is on {device}; use backend='auto'"
    from .run import supports

    return None if supports(dtype) else f"cannot convert {dtype} on this CPU; use backend='eager'"


def load() -> Any:
    """What runs a bucket."""
    from .run import EXECUTOR

    return EXECUTOR
