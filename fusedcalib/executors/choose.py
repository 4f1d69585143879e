"""Which executor runs a parameter: Triton on a GPU, numba on a CPU if installed, else plain torch."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from ..layout.buckets import Executor


@cache
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Executor:
    """The executor for a parameter.

    Raises:
        RuntimeError: the backend asked for cannot run there.
    """
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and _triton_runs(device)):
        return _triton(device)
    if backend == "numba" or (backend == "auto" and device.type == "cpu" and find_spec("numba")):
        return _numba(device, dtype, required=backend == "numba")
    return _eager()


def _triton_runs(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _triton(device: torch.device) -> Executor:
    if find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs Triton: pip install triton, or use another backend")
    from .triton import run as gpu

    if device.type != "cuda" and not gpu.interpreted():
        raise RuntimeError(
            f"backend='triton' needs parameters on a GPU, but one is on {device}; use backend='auto'"
        )
    return gpu.EXECUTOR


def _numba(device: torch.device, dtype: torch.dtype, required: bool) -> Executor:
    if find_spec("numba") is None:
        raise RuntimeError("backend='numba' needs numba: pip install numba, or use backend='auto'")
    if device.type != "cpu":
        raise RuntimeError(
            f"backend='numba' needs parameters on the CPU, but one is on {device}; use backend='auto'"
        )
    from .numba import run as cpu

    if cpu.supports(dtype):
        return cpu.EXECUTOR
    if required:
        raise RuntimeError(f"backend='numba' cannot convert {dtype} on this CPU; use backend='eager'")
    return _eager()


def _eager() -> Executor:
    from . import eager

    return eager.EXECUTOR
