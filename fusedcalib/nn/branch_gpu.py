"""Branch weights stepped by kernels/branch.py: tables on the device, copied again where they changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..gpu import guarded
from ..gpu_control import source_of
from ..kernels.branch import launch_branches
from ..kernels.launch import dtype_of
from ..mirror import Mirror, capturing
from ..numbers import is_remote, number_of
from .branch_tables import Bucket, Given, Groups


def refresh(bucket: Bucket, groups: Groups) -> None:
    """Hands over addresses, and learning rates or where they lie."""
    device = bucket.key.device
    bucket.take_numbers(groups, lambda lr: 0.0 if is_remote(lr) else number_of(lr))
    rates = [group["lr"] for group in groups]
    sources = np.array([source_of(lr, device) if is_remote(lr) else 0 for lr in rates], dtype=np.int64)
    values = {"table": bucket.table, "numbers": bucket.numbers, "sources": sources}
    for name, array in values.items():
        if name not in bucket.cache:
            bucket.cache[name] = Mirror(device, array.copy())
        bucket.cache[name].update(array)
        if bucket.capturable and not capturing():
            bucket.cache[name].prepare_capture()


def run(bucket: Bucket, groups: Groups, given: Given) -> None:
    """One launch on the current stream of the device."""
    table, numbers, sources = (bucket.cache[name].tensor for name in ("table", "numbers", "sources"))
    scale, found_inf = (None if t is None else t.to(torch.float32) for t in given[:2])
    kinds = tuple(map(_named, bucket.key.dtypes)), _named(bucket.compute)
    with guarded(bucket.key.device):
        launch_branches(table, numbers, sources, scale, found_inf, given.norm, *kinds, given.check)


def _named(dtype: torch.dtype) -> Any:
    return dtype_of(str(dtype).removeprefix("torch."))
