"""Branch weights stepped by kernels/branch.py: tables on the device, copied again where they changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...hostmath import is_remote, number_of
from ...kernels import launch
from ...layout.branches import Bucket, Given, Groups
from .decide import source_of
from .resident import Array, DeviceArray, Streams, capturing
from .run import guarded


def refresh(bucket: Bucket, groups: Groups) -> None:
    """Hands over addresses, and learning rates or where they lie."""
    device, cache = bucket.key.device, bucket.cache
    bucket.take_numbers(groups, lambda lr: 0.0 if is_remote(lr) else number_of(lr))
    rates = [group["lr"] for group in groups]
    sources = np.array([source_of(lr, device) if is_remote(lr) else 0 for lr in rates], dtype=np.int64)
    values: dict[str, Array] = {"table": bucket.table, "numbers": bucket.numbers, "sources": sources}
    if "mirrors" not in cache:
        cache["mirrors"] = {name: DeviceArray(device, array) for name, array in values.items()}
        cache["streams"] = Streams(device)
    tensors = []
    for name, mirror in cache["mirrors"].items():
        if capturing():
            tensors.append(mirror.captured(values[name]))
            continue
        mirror.update(values[name])
        tensors.append(mirror.tensor)
        if bucket.capturable:
            mirror.prepare_capture()
    cache["tensors"] = tensors
    cache["streams"].note(lambda: tensors)


def prepare(bucket: Bucket, given: Given) -> None:
    """Compiles the launch for what will be given: only which of it there is matters."""
    cache, check = bucket.cache, given.check
    asked = (tuple(t is None for t in given[:3]), check)
    with guarded(bucket.key.device):
        if cache.get("asked") != asked:
            spec = launch.BranchSpec(tuple(map(_named, bucket.key.dtypes)), _named(bucket.compute), check)
            table, numbers, sources = cache["tensors"]
            cache["launch"] = launch.branch_launch(table, numbers, sources, _told(given), spec)
            cache["asked"] = asked
        for place, tensor in enumerate(cache["tensors"]):
            cache["launch"].set(place, tensor)
        cache["launch"].prepare()


def step(bucket: Bucket, groups: Groups, given: Given) -> None:
    """One launch on the current stream of the device."""
    branches = bucket.cache["launch"]
    branches.set(launch.TOLD, _told(given))
    with guarded(bucket.key.device):
        branches()


def _told(given: Given) -> launch.Told:
    """What is given, as the kernel reads it."""
    scale, found_inf = (None if t is None else t.to(torch.float32) for t in given[:2])
    return launch.Told(scale, found_inf, given.norm)


def _named(dtype: torch.dtype) -> Any:
    return launch.dtype_of(str(dtype).removeprefix("torch."))
