"""The CPU executor: the rule's own source, compiled by numba in a loop over rows, one pass over memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import njit

from ...layout.buckets import GEOMETRY, Bucket, TileShape
from ...layout.geometry import Geometry
from ...layout.recipe import Recipe
from ...layout.shards import local_of
from ..source import Function
from .memory import INNER, Memory, fetch_add, geometry_at, set_double, tile_at, words_at
from .rows import gradients, row_loop, row_squares
from .threads import on_threads, threads_for

TILE = 16384  # elements: few enough for the second pass over a row to find it in the cache
NEXT = 6  # word of a job: the next tile to take
CHUNKS = 8  # for each thread: one that is held up leaves its chunks to the others


def supports(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype can be read on this CPU (fp16 needs conversion instructions)."""
    if dtype != torch.float16:
        return True
    return bool(binding.get_host_cpu_features().get("f16c")) or "x86" not in binding.get_process_triple()


@cache
def kernel_for(
    recipe: Recipe | None,
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    count: int,
    inner: int,
    factored: bool = False,
    part: str = "step",
) -> Function:
    """The compiled loop of a recipe, whatever the hyperparameters: a C function `void work(void *job)`.

    A job is eight int64: the addresses and sizes of the tables (laid out as kernels/table.py says), how
    many tiles there are, how many a thread takes at once, the next to take, and an address for a double of
    each tile: the squares of its gradients, where there is no recipe.
    """
    memory = Memory(dtypes, compute, count, inner)
    factor_of, scaled = gradients(memory, factored)
    on_row = row_loop(recipe, memory, scaled, part) if recipe else row_squares(memory, scaled)
    keeps = part in ("sums", "partial")  # what a row comes to, in its place
    shift, spread = memory.shift, memory.spread
    integers, scalars_at = memory.integers, memory.scalars_at
    geometry, strides_at = memory.geometry, memory.strides

    @njit(**INNER)
    def run(table, fields, tiles, scalars, totals, first, last):
        for t in range(first, last):
            slot, row_block, column_block = tile_at(tiles, t)
            row = table + 8 * slot * fields
            addresses = integers(row)
            place = geometry_at(row + geometry)
            rows, columns, scalar_row, tall, wide, stream, key0, key1, origin, pitch, kept, factors = place
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
                at, begin = origin + r * pitch + column_block * wide, shift(addresses, along, r)
                factor, about = factor_of(factors, r), (kept + 8 * r, pitch)
                found = on_row(row, begin, strides, runs, length, h, factor, at, words, about)
                total += found
                if keeps:
                    set_double(kept, r, found)
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

    def shape(self, layout: Geometry, by_rows: bool, tensors: int, split: bool) -> TileShape:
        """Tiles of about TILE elements: whole rows where rows matter, stretches elsewhere."""
        if layout.sizes or by_rows:
            return TileShape(max(1, TILE // layout.columns), layout.columns, None)
        return TileShape(1, TILE, None)

    def prepare(self, buckets: list[Bucket]) -> None:
        """Compiles their loops."""
        for bucket in buckets:
            flags = bucket.key.recipe.flags
            for part in ("sums", "step", "finish") if bucket.key.split else ("step",):
                if flags.needs(part):
                    _loop(bucket, bucket.key.recipe, _named(bucket, part))

    def run(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket."""
        recipe = bucket.key.recipe
        if not recipe.flags.needs(part):
            return 0
        _run(bucket, recipe, _named(bucket, part))
        return 1

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""
        totals = np.empty(len(bucket.tiles))
        _run(bucket, None, "step", totals.ctypes.data)
        return float(totals.sum())


def _run(bucket: Bucket, recipe: Recipe | None, part: str, totals: int = 0) -> None:
    """Runs the loop of a recipe, or that of the squares, over a bucket's tiles."""
    cache, scalars = bucket.cache, bucket.scalars
    if "job" not in cache:
        elements = sum(local_of(slot.param).numel() for slot in bucket.slots)
        tables = (bucket.table.ctypes.data, bucket.table.shape[1], bucket.tiles.ctypes.data)
        cache["job"] = np.array([*tables, 0, len(bucket.tiles), 0, 0, 0])
        cache["data"], cache["elements"] = cache["job"].ctypes.data, elements
    count = len(bucket.tiles)
    threads = threads_for(count, cache["elements"])
    cache["job"][3:] = scalars.ctypes.data, count, max(1, count // (threads * CHUNKS)), 0, totals
    on_threads(_loop(bucket, recipe, part), cache["data"], threads)


def _named(bucket: Bucket, part: str) -> str:
    """The loop for a part: where ranks share rows the step leaves something to be done."""
    return "partial" if bucket.key.split and part == "step" else part


def _loop(bucket: Bucket, recipe: Recipe | None, part: str) -> Any:
    """The compiled loop, looked up once for a bucket."""
    cache, key = bucket.cache, bucket.key
    if (recipe, part) not in cache:
        shape = (key.dtypes, bucket.compute, bucket.shared.count, key.inner)
        compiled: Any = kernel_for(recipe, *shape, key.factored, part)
        cache[recipe, part] = compiled.ctypes
    return cache[recipe, part]


EXECUTOR = NumbaExecutor()
