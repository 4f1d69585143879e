"""The executor for GPUs: keeps tables on the device and calls the launches of `kernels/launch.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

LAUNCHES = True  # the kernels of kernels/


def why_not(device: torch.device, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why it cannot run a parameter; None if it can. `by_name`: whether it is asked for."""
    if find_spec("triton") is None:
        return "needs Triton: pip install triton, or use another backend"
    if device.type != "cuda" and not (by_name and _interpreted()):
        return f"needs parameters on a GPU, but one is on {device}; use backend='auto'"
    old = not by_name and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return "is slow on a GPU older than Ampere (sm_80)" if old else None


def _interpreted() -> bool:
    from .run import interpreted

    return interpreted()


def load() -> Any:
    """What runs a bucket."""
    from .executor import EXECUTOR

    return EXECUTOR
