"""The CPU executor: the rule's own source, compiled by numba inside a loop over rows, one pass over memory.

Three things keep the loop at the speed of memory: addresses are dereferenced directly (an array view would
bring index checks), division follows IEEE instead of raising, and no scalar is of another type than the
values. Without fast-math NaN and infinity keep their meaning and every element is rounded as on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import njit
from numba.extending import overload

from .cpu_memory import INNER as _INNER
from .cpu_memory import Memory, fetch_add, geometry_at, set_double, tile_at, words_at
from .cpu_noise import BLOCK, KEPT, bits_maker, noise_maker
from .cpu_threads import on_threads, threads_for
from .distributed import local_of
from .kernels import stages
from .layout import Layout
from .rebind import Function, folded
from .recipe import Recipe
from .tables import GEOMETRY, Bucket, Shape

TILE = 16384  # elements: few enough for the second pass over a row to find it in the cache
NEXT = 6  # word of a job: the next tile to take
CHUNKS = 8  # for each thread: one that is held up leaves its chunks to the others
_ADD_FREELY = {"reassoc", "nsz"}  # a sum may be vectorised; NaN and infinity keep their meaning


@njit(**_INNER)
def _divide(x, y):
    return x / y


@njit(**_INNER)
def _sqrt(x):
    return np.sqrt(x)


@njit(**_INNER)
def _negative(x):
    return -x


@njit(**_INNER)
def _absolute(x):
    return abs(x)


@njit(**_INNER)
def _minimum(x, y):
    return x if (x < y or x != x) else y


@njit(**_INNER)
def _maximum(x, y):
    return x if (x > y or x != x) else y


@njit(**_INNER)
def _where(condition, x, y):
    return x if condition else y


def _sign(x):
    """Stands for its overload: -1, 0 or 1 in the type of x."""


@overload(_sign, jit_options=cast(Any, _INNER))
def _sign_in(x):
    real = {32: np.float32, 64: np.float64}[x.bitwidth]
    minus, zero, one = real(-1), real(0), real(1)
    return lambda x: one if x > 0 else (minus if x < 0 else zero)


# The names of kernels/ops.py, for single elements.
NAMES = {
    "divide": _divide,
    "sqrt": _sqrt,
    "negative": _negative,
    "absolute": _absolute,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _where,
}


def supports(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype can be read on this CPU (fp16 needs conversion instructions)."""
    if dtype != torch.float16:
        return True
    return bool(binding.get_host_cpu_features().get("f16c")) or "x86" not in binding.get_process_triple()


def _stages(recipe: Recipe, memory: Memory) -> tuple[Function, ...]:
    """`measured`, `stepped`, `projected`, `rounded`, `averaged` of kernels/stages.py for single elements."""
    flags = {"FLAGS": recipe.flags, "VARIANT": recipe.flags.variant}

    def compiled(function: Any, **names: Any) -> Function:
        own = {"stored": memory.as_stored, "stochastic": memory.stochastic}
        function = njit(folded(function, {**NAMES, **own, **names}, flags), **_INNER)
        return cast(Function, function)

    rule = compiled(recipe.rule.update)
    prepared = compiled(stages.prepared)
    return (
        compiled(stages.measured, RULE=rule, prepared=prepared),
        compiled(stages.stepped, RULE=rule, prepared=prepared),
        compiled(stages.projected),
        compiled(stages.rounded),
        compiled(stages.averaged),
    )


def _row_loop(recipe: Recipe, memory: Memory) -> Function:
    """`step_row(row, addresses, strides, runs, length, h, at, words)`: one row, centred and projected.

    Rows are walked in blocks: a block's elements are summed in their own type, blocks in double, fast and
    accurate; noise is made a block at a time. `at` is the index of the first element in its tensor.
    """
    measured, stepped, projected, rounded, averaged = _stages(recipe, memory)
    load, store, real, flags = memory.load, memory.store, memory.real, recipe.flags
    centred, project, ema = flags.centralize != "none", flags.project, flags.ema
    room, filled, noise = noise_maker(flags.noise, real)
    # What a row mean is taken of knows only noise on the gradient.
    sum_filled, sum_noise = noise_maker(flags.noise if flags.noise == "gradient" else "none", real)[1:]
    bit_room, bits_filled, bits = bits_maker(flags.rounding)
    size = BLOCK if flags.random else 1 << 62  # a step without chance needs no blocks
    twice = centred and flags.noise == "gradient"  # the sum wants the noise, and then the step
    start_of_run = _run_starter(memory)

    @njit(**_INNER, fastmath=_ADD_FREELY)
    def run_sum(addresses, strides, length, h, at, words, kept):
        total, space = 0.0, room()
        for first in range(0, length, BLOCK):
            part, last = real(0.0), min(first + BLOCK, length)
            place = kept + 4 * first
            if kept == 0:
                place = sum_filled(space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                part += measured(values[0], values[1], values[2:], h, sum_noise(place, i - first))
            total += part
        return total

    @njit(**_INNER, fastmath=_ADD_FREELY)
    def run_squares(addresses, strides, length):
        total = 0.0
        for first in range(0, length, BLOCK):
            part = real(0.0)
            for i in range(first, min(first + BLOCK, length)):
                p = load(addresses, strides, i)[0]
                part += p * p
            total += part
        return total

    @njit(**_INNER)
    def run_step(addresses, strides, length, h, mean, at, words, kept):
        space, bit_space = room(), bit_room()
        for first in range(0, length, size):
            last = min(first + size, length)
            place = kept + 4 * first
            if kept == 0:
                place = filled(space, at + first, last - first, h, words)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                p, state = stepped(values[0], values[1], values[2:], h, noise(place, i - first), mean)
                p = rounded(p, bits(bit_place, i - first))
                if not project:
                    state = averaged(p, state, h)
                store(addresses, strides, i, p, state)

    @njit(**_INNER)
    def run_project(addresses, strides, length, squares, h, at, words):
        bit_space = bit_room()
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            bit_place = bits_filled(bit_space, at + first, last - first, h, words)
            for i in range(first, last):
                values = load(addresses, strides, i)
                p = rounded(projected(values[0], squares, h), bits(bit_place, i - first))
                store(addresses, strides, i, p, averaged(p, values[2:], h))

    @njit(**_INNER)
    def step_row(row, addresses, strides, runs, length, h, at, words):
        mean, kept = real(0.0), 0
        if twice and runs == 1 and length <= KEPT:
            kept = filled(room(), at, length, h, words)
        if centred:
            total = 0.0
            for run in range(runs):
                start = start_of_run(row, addresses, run)
                total += run_sum(start, strides, length, h, at + run * length, words, kept)
            mean = real(total / (runs * length))
        for run in range(runs):
            start = start_of_run(row, addresses, run)
            run_step(start, strides, length, h, mean, at + run * length, words, kept)
        if project:
            squares = 0.0
            for run in range(runs):
                squares += run_squares(start_of_run(row, addresses, run), strides, length)
            if ema or np.sqrt(real(squares)) > h[3]:
                for run in range(runs):
                    start = start_of_run(row, addresses, run)
                    run_project(start, strides, length, real(squares), h, at + run * length, words)
        return 0.0

    return cast(Function, step_row)


def _run_starter(memory: Memory) -> Function:
    """`start_of_run(row, addresses, run)`: where a run of constant stride begins.

    `run` counts over all inner dimensions but the last.
    """
    shift, integers, inner = memory.shift, memory.integers, memory.inner
    geometry, strides_at = memory.geometry, memory.strides

    @njit(**_INNER)
    def start_of_run(row, addresses, run):
        for back in range(inner - 1):
            dimension = inner - 2 - back
            size = integers(row + geometry + 8 * (GEOMETRY + dimension))[0]
            along = integers(row + strides_at + (dimension + 1) * geometry)
            addresses = shift(addresses, along, run % size)
            run //= size
        return addresses

    return cast(Function, start_of_run)


def _row_squares(memory: Memory) -> Function:
    """`squares(row, addresses, strides, runs, length, ...)`: of the gradients of a row, in double."""
    load, start_of_run = memory.load, _run_starter(memory)

    @njit(**_INNER, fastmath=_ADD_FREELY)
    def run_squares(addresses, strides, length):
        total = 0.0
        for i in range(length):
            g = np.float64(load(addresses, strides, i)[1])
            total += g * g
        return total

    @njit(**_INNER)
    def squares(row, addresses, strides, runs, length, h, at, words):
        total = 0.0
        for run in range(runs):
            total += run_squares(start_of_run(row, addresses, run), strides, length)
        return total

    return cast(Function, squares)


@cache
def kernel_for(
    recipe: Recipe | None, dtypes: tuple[torch.dtype, ...], compute: torch.dtype, count: int, inner: int
) -> Function:
    """The compiled loop of a recipe, whatever the hyperparameters: a C function `void work(void *job)`.

    A job is eight int64: the addresses and sizes of the tables (laid out as kernels/table.py says), how
    many tiles there are, how many a thread takes at once, the next to take, and an address for a double of
    each tile: the squares of its gradients, where there is no recipe.
    """
    memory = Memory(dtypes, compute, count, inner)
    on_row = _row_loop(recipe, memory) if recipe else _row_squares(memory)
    shift, spread = memory.shift, memory.spread
    integers, scalars_at = memory.integers, memory.scalars_at
    geometry, strides_at = memory.geometry, memory.strides

    @njit(**_INNER)
    def run(table, fields, tiles, scalars, totals, first, last):
        for t in range(first, last):
            slot, row_block, column_block = tile_at(tiles, t)
            row = table + 8 * slot * fields
            addresses = integers(row)
            place = geometry_at(row + geometry)
            rows, columns, scalar_row, tall, wide, stream, key0, key1, origin, pitch = place
            words = (np.uint64(stream), np.uint64(key0), np.uint64(key1))
            h = scalars_at(scalars, scalar_row)
            strides, along = spread(1), spread(columns)
            runs, length = 1, min(wide, columns - column_block * wide)
            if inner > 0:
                length = integers(row + geometry + 8 * (GEOMETRY + inner - 1))[0]
                runs = columns // length
                along = integers(row + strides_at)
                strides = integers(row + strides_at + inner * geometry)
            addresses = shift(addresses, strides, column_block * wide)
            total = 0.0
            for r in range(row_block * tall, min((row_block + 1) * tall, rows)):
                at = origin + r * pitch + column_block * wide
                total += on_row(row, shift(addresses, along, r), strides, runs, length, h, at, words)
            if totals != 0:
                set_double(totals, t, total)

    @numba.cfunc(numba.void(numba.int64))
    def work(job):
        table, fields, tiles, scalars, count, chunk, _, totals = words_at(job)
        first = fetch_add(job + 8 * NEXT, chunk)
        while first < count:
            run(table, fields, tiles, scalars, totals, first, min(first + chunk, count))
            first = fetch_add(job + 8 * NEXT, chunk)

    return work


class NumbaExecutor:
    """Runs buckets in compiled loops, on as many threads as torch uses."""

    name = "numba"

    def shape(self, layout: Layout, by_rows: bool, tensors: int) -> Shape:
        """Tiles of about TILE elements: whole rows where rows matter, stretches elsewhere."""
        if layout.sizes or by_rows:
            return Shape(max(1, TILE // layout.columns), layout.columns, None)
        return Shape(1, TILE, None)

    def run(self, bucket: Bucket) -> int:
        """Steps every slot of the bucket."""
        _run(bucket, bucket.key.recipe, 0)
        return 1

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""
        totals = np.empty(len(bucket.tiles))
        _run(bucket, None, totals.ctypes.data)
        return float(totals.sum())


def _run(bucket: Bucket, recipe: Recipe | None, totals: int) -> None:
    """Runs the loop of a recipe, or that of the squares, over a bucket's tiles."""
    key, cache, scalars = bucket.key, bucket.cache, bucket.scalars
    if recipe not in cache:
        cache[recipe] = kernel_for(recipe, key.dtypes, bucket.compute, scalars.shape[1], key.inner)
        cache["elements"] = sum(local_of(slot.param).numel() for slot in bucket.slots)
    tables = (bucket.table.ctypes.data, bucket.table.shape[1], bucket.tiles.ctypes.data, scalars.ctypes.data)
    count = len(bucket.tiles)
    threads = threads_for(count, cache["elements"])
    chunk = max(1, count // (threads * CHUNKS))
    job = np.array([*tables, count, chunk, 0, totals])
    on_threads(cache[recipe].ctypes, job.ctypes.data, threads)


EXECUTOR = NumbaExecutor()
