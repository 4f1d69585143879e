"""Which executor runs a parameter: the first that has nothing against it, or the one that is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..layout.buckets import Executor
from ..options import BACKENDS

# In the order of preference. Each is a module here: `why_not` says, without loading anything heavy, what is
# against it; `load` gives what runs a bucket; `LAUNCHES` is there, and true, where it launches kernels.
NAMES = BACKENDS[1:]


@cache
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Executor:
    """The executor for a parameter.

    Raises:
        RuntimeError: the backend asked for cannot run there.
    """
    if backend == "auto":
        name = next(name for name in NAMES if _module(name).why_not(device, dtype, False) is None)
    elif reason := _module(backend).why_not(device, dtype, True):
        raise RuntimeError(f"backend={backend!r} {reason}")
    else:
        name = backend
    executor: Executor = _module(name).load()
    return executor


def may_launch(backend: str) -> bool:
    """Whether what a backend stands for may launch the kernels of kernels/, wherever parameters are."""
    return backend == "auto" or getattr(_module(backend), "LAUNCHES", False)


def _module(name: str) -> Any:
    return import_module(f".{name}", __package__)
