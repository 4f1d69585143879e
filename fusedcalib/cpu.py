"""The CPU executor: the rule's own source, compiled by numba inside a loop over rows, one pass over memory.

Three things keep the loop at the speed of memory: addresses are dereferenced directly (an array view would
bring index checks), division follows IEEE instead of raising, and no scalar is of another type than the
values. Without fast-math NaN and infinity keep their meaning and every element is rounded as on a GPU.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import njit, prange
from numba.np.unsafe.ndarray import to_fixed_tuple

from .cpu_memory import accessors, shift_of
from .eager import OPS
from .kernels import ops, stages
from .layout import Layout
from .plan import GEOMETRY, Bucket, Shape
from .rebind import Function, folded
from .recipe import Recipe

TILE = 16384  # elements: few enough for the second pass over a row to find it in the cache
_ADD_FREELY = {"reassoc", "nsz"}  # a sum may be vectorised; NaN and infinity keep their meaning


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _divide(x, y):  # type: ignore[no-untyped-def]
    return x / y


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _sqrt(x):  # type: ignore[no-untyped-def]
    return np.sqrt(x)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _maximum(x, y):  # type: ignore[no-untyped-def]
    return x if (x > y or x != x) else y


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _where(condition, x, y):  # type: ignore[no-untyped-def]
    return x if condition else y


NAMES = {"divide": _divide, "sqrt": _sqrt, "maximum": _maximum, "where": _where}
assert NAMES.keys() == {op.__name__ for op in OPS}
_LOCK = Lock()  # numba's simplest threading layer must not be entered twice at once


def supports(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype can be read on this CPU (fp16 needs conversion instructions)."""
    if dtype != torch.float16:
        return True
    return bool(binding.get_host_cpu_features().get("f16c")) or "x86" not in binding.get_process_triple()


def _stages(recipe: Recipe) -> tuple[Function, Function]:
    """`measured` and `stepped` of kernels/stages.py for a recipe, compiled for single elements."""
    flags = {
        "VARIANT": recipe.variant,
        "MAXIMIZE": recipe.maximize,
        "DECAY": recipe.decay,
        "CENTRALIZE": recipe.centralize,
    }

    def compiled(function: Any, **names: Any) -> Function:
        return njit(folded(function, {**NAMES, **names}, flags), error_model="numpy")  # type: ignore[no-any-return]

    rule = compiled(recipe.rule.update)
    prepared = compiled(stages.prepared)
    return (
        compiled(stages.measured, RULE=rule, prepared=prepared),
        compiled(stages.stepped, RULE=rule, prepared=prepared),
    )


@cache
def kernel_for(
    recipe: Recipe, dtypes: tuple[torch.dtype, ...], compute: torch.dtype, count: int, inner: int
) -> Function:
    """`run(table, tiles, scalars)` for a recipe: one compiled loop, whatever the hyperparameters."""
    measured, stepped = _stages(recipe)
    load, store = accessors(dtypes, compute, dense=inner == 0)
    shift = shift_of(dtypes)
    real = numba.float64 if compute == torch.float64 else numba.float32
    tensors = len(dtypes)
    centred = recipe.centralize != "none"
    start_of_strides = tensors + GEOMETRY + inner

    @njit(error_model="numpy", fastmath=_ADD_FREELY)  # type: ignore[untyped-decorator]
    def run_sum(addresses, strides, length, h):  # type: ignore[no-untyped-def]
        total = 0.0
        for i in range(length):
            values = load(addresses, strides, i)
            total += measured(values[0], values[1], values[2:], h)
        return total

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def run_step(addresses, strides, length, h, mean):  # type: ignore[no-untyped-def]
        for i in range(length):
            values = load(addresses, strides, i)
            p, state = stepped(values[0], values[1], values[2:], h, mean)
            store(addresses, strides, i, p, state)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def strides_along(row, dimension):  # type: ignore[no-untyped-def]
        first = start_of_strides + dimension * tensors
        return to_fixed_tuple(row[first : first + tensors], tensors)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def dense_row(row, addresses, length, h):  # type: ignore[no-untyped-def]
        mean = real(0.0)
        if centred:
            mean = real(run_sum(addresses, addresses, length, h) / length)
        run_step(addresses, addresses, length, h, mean)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def start_of_run(row, addresses, run):  # type: ignore[no-untyped-def]
        for back in range(inner - 1):
            dimension = inner - 2 - back
            size = row[tensors + GEOMETRY + dimension]
            addresses = shift(addresses, strides_along(row, dimension + 1), run % size)
            run //= size
        return addresses

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def strided_row(row, addresses, columns, h):  # type: ignore[no-untyped-def]
        length = row[tensors + GEOMETRY + inner - 1]
        strides = strides_along(row, inner)
        mean = real(0.0)
        if centred:
            total = 0.0
            for run in range(columns // length):
                total += run_sum(start_of_run(row, addresses, run), strides, length, h)
            mean = real(total / columns)
        for run in range(columns // length):
            run_step(start_of_run(row, addresses, run), strides, length, h, mean)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def step_tile(row, row_block, column_block, h):  # type: ignore[no-untyped-def]
        addresses = to_fixed_tuple(row[:tensors], tensors)
        rows, columns = row[tensors], row[tensors + 1]
        tall, wide = row[tensors + 3], row[tensors + 4]
        ones = to_fixed_tuple(np.ones(tensors, np.int64), tensors)
        for r in range(row_block * tall, min((row_block + 1) * tall, rows)):
            if inner == 0:
                first = column_block * wide
                length = min(wide, columns - first)
                dense_row(row, shift(addresses, ones, r * columns + first), length, h)
            else:
                strided_row(row, shift(addresses, strides_along(row, 0), r), columns, h)

    @njit(error_model="numpy", parallel=True, nogil=True)  # type: ignore[untyped-decorator]
    def run(table, tiles, scalars):  # type: ignore[no-untyped-def]
        for t in prange(tiles.shape[0]):
            row = table[tiles[t, 0]]
            h = to_fixed_tuple(scalars[row[tensors + 2]], count)
            step_tile(row, tiles[t, 1], tiles[t, 2], h)

    return run  # type: ignore[no-any-return]


class NumbaExecutor:
    """Runs buckets in compiled loops, on as many threads as torch uses."""

    name = "numba"

    def shape(self, layout: Layout, centred: bool) -> Shape:
        """Tiles of about TILE elements: whole rows where rows matter, stretches elsewhere."""
        if layout.sizes or centred:
            return Shape(max(1, TILE // layout.columns), layout.columns, None)
        return Shape(1, TILE, None)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket."""
        if "kernel" not in bucket.cache:
            key = bucket.key
            bucket.cache["kernel"] = kernel_for(
                key.recipe, key.dtypes, bucket.compute, bucket.scalars.shape[1], key.inner
            )
        with _LOCK:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
            bucket.cache["kernel"](bucket.table, bucket.tiles, bucket.scalars)
        return 1


EXECUTOR = NumbaExecutor()
