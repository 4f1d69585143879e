"""Branch weights stepped on the CPU by one loop over the table of kernels/branch.py, compiled by numba."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit

from ...kernels.branch import FIELDS
from ...layout.branches import Bucket, Given, Groups
from .cache import on_disk
from .memory import Memory, double_at, words_at
from .values import INNER


def refresh(bucket: Bucket, groups: Groups) -> None:
    """Learning rates and signs."""
    bucket.take_numbers(groups)


def prepare(bucket: Bucket, given: Given) -> None:
    """Compiles the loop."""
    loop_for(bucket.key.dtypes, bucket.compute)


def step(bucket: Bucket, groups: Groups, given: Given) -> None:
    """Steps every branch weight of the bucket."""
    norm = 0.0 if given.norm is None else given.norm.item()
    if not math.isfinite(norm) or (given.found_inf is not None and given.found_inf.item()):
        return
    scale = np.array([1.0 if given.scale is None else given.scale.item()])
    table, numbers = bucket.table, bucket.numbers
    tables = (table.ctypes.data, len(table), numbers.ctypes.data, numbers.shape[1], scale.ctypes.data)
    job = np.array([*tables, given.check, 0, 0])
    loop_for(bucket.key.dtypes, bucket.compute).ctypes(job.ctypes.data)


@cache
@on_disk
def loop_for(dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> Any:
    """`void work(void *job)`: addresses and sizes of the tables, where the scale is, whether to check."""
    memory = Memory(dtypes, compute, 1, 0)
    load, store = memory.storage.load, memory.storage.store
    spread, integers = memory.spread, memory.integers
    real: Any = memory.real

    @njit(**INNER)
    def moved(addresses, at, rate, scale):
        R, g = load(addresses, spread(1), at, ())
        return abs(R + rate * (g / scale))

    @njit(**INNER)
    def total_of(addresses, K, positions, place, rate, scale):
        total = real(0)
        for k in range(K):
            total += moved(addresses, k * positions + place, rate, scale)
        return total

    @njit(**INNER)
    def step(addresses, K, positions, rate, scale, check):
        if check:
            for place in range(positions):
                if not np.isfinite(total_of(addresses, K, positions, place, rate, scale)):
                    return
        for place in range(positions):
            total = total_of(addresses, K, positions, place, rate, scale)
            for k in range(K):
                at = k * positions + place
                new = moved(addresses, at, rate, scale) / total if total != 0 else real(1) / real(K)
                store(addresses, spread(1), at, new, (), 0)

    @numba.cfunc(numba.void(numba.int64))
    def work(job):
        table, count, numbers, groups, scales, check, _, _ = words_at(job)
        scale = real(double_at(scales)[0])
        for i in range(count):
            row = table + 8 * FIELDS * i
            addresses, (K, positions), (_, group) = integers(row), integers(row + 16), integers(row + 24)
            lr = double_at(numbers + 8 * group)[0]
            if lr != 0:
                rate = real(lr * double_at(numbers + 8 * (groups + group))[0])
                step(addresses, K, positions, rate, scale, check)

    return work
