"""The CPU executor: the rule's own source, compiled by numba in a loop over rows, one pass over memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import njit

from ...kernels.storage import BLOCK, CODED
from ...layout.buckets import GEOMETRY, Bucket, TileShape
from ...layout.geometry import Geometry
from ...layout.recipe import Recipe
from ...layout.shards import local_of
from ..source import Function
from . import branches
from .cache import on_disk
from .elements import whole_at
from .memory import Memory, fetch_add, geometry_at, memory_of, set_double, tile_at, words_at
from .observed import SIZE, Partials, as_one
from .rows import gradients, row_loop, row_squares
from .values import INNER

TILE = 16384  # elements: few enough for the second pass over a row to find it in the cache
NEXT = 6  # word of a job: the next tile to take
CHUNKS = 8  # for each thread: one that is held up leaves its chunks to the others


def supports(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype can be read on this CPU (fp16 needs conversion instructions)."""
    if dtype != torch.float16:
        return True
    return bool(binding.get_host_cpu_features().get("f16c")) or "x86" not in binding.get_process_triple()


@cache
@on_disk
def kernel_for(
    recipe: Recipe | None,
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    count: int,
    inner: int,
    factored: bool = False,
    part: str = "step",
    kept: tuple[str, ...] = (),
    sums: int = 0,
) -> Function:
    """The compiled loop of a recipe, whatever the hyperparameters: a C function `void work(void *job)`.

    A job is eight int64: the addresses and sizes of the tables (laid out as kernels/table.py says), how
    many tiles there are, how many a thread takes at once, the next to take, and an address for a double of
    each tile: the squares of its gradients, where there is no recipe. Of a loop that measures norms each tile
    has so many doubles as the rule has `sums`.
    """
    memory = memory_of(dtypes, compute, count, inner, kept)
    places_of, walk = memory.storage.places, _walker(memory)
    factor_of, scaled = gradients(memory, factored)
    on_row = row_loop(recipe, memory, scaled, part) if recipe else row_squares(memory, scaled)
    keeps = part in ("sums", "partial")  # what a row comes to, in its place
    seen = SIZE if recipe and recipe.flags.statistics and part in ("step", "partial") else 0
    size = 8 * sums if "squares" in part and recipe else 0  # bytes that a tile leaves of norms
    trusts = recipe is not None and recipe.flags.trust != "none"
    coded = sum(kind in CODED for kind in kept)
    shift, spread = memory.shift, memory.spread
    integers, scalars_at, geometry = memory.integers, memory.scalars_at, memory.geometry

    @njit(**INNER)
    def run(table, fields, tiles, scalars, totals, first, last):
        for t in range(first, last):
            slot, row_block, column_block = tile_at(tiles, t)
            row = table + 8 * slot * fields
            addresses = integers(row)
            place = geometry_at(row + geometry)
            rows, columns, scalar_row, tall, wide, stream, key0, key1, origin, pitch = place[:10]
            total_at, factors, norms = place[10], place[11], totals + t * size
            if trusts and size == 0:
                norms = whole_at(row, fields - 1 - coded)
            words = (np.uint64(stream), np.uint64(key0), np.uint64(key1))
            h = scalars_at(scalars, scalar_row)
            begins = column_block * wide
            strides, along, runs, length = walk(row, columns, min(wide, columns - begins))
            addresses = shift(addresses, spread(1), begins)  # 0 where there are inner dimensions
            blocks = (columns + BLOCK - 1) // BLOCK
            total = 0.0
            for r in range(row_block * tall, min((row_block + 1) * tall, rows)):
                at, begin = origin + r * pitch + begins, shift(addresses, along, r)
                places = places_of(row, fields, r * blocks + begins // BLOCK)
                about = total_at + 8 * r, pitch, places, norms, factors, r, totals + t * seen
                factor = factor_of(factors, r)
                found = on_row(row, begin, strides, runs, length, h, factor, at, words, about)
                total += found
                if keeps:
                    set_double(total_at, r, found)
            if totals != 0 and size == 0 and seen == 0:
                set_double(totals, t, total)

    @numba.cfunc(numba.void(numba.int64))
    def work(job):
        table, fields, tiles, scalars, count, chunk, _, totals = words_at(job)
        first = fetch_add(job + 8 * NEXT, chunk)
        while first < count:
            run(table, fields, tiles, scalars, totals, first, min(first + chunk, count))
            first = fetch_add(job + 8 * NEXT, chunk)

    return work


@cache
def _walker(memory: Memory) -> Function:
    """`walk(row, columns, length)`: the strides of a run and of a row, the runs of a row, their length."""
    integers, spread, inner = memory.integers, memory.spread, memory.inner
    geometry, strides_at = memory.geometry, memory.strides

    @njit(**INNER)
    def dense(row, columns, length):
        return spread(1), spread(columns), 1, length

    @njit(**INNER)
    def strided(row, columns, length):
        length = integers(row + geometry + 8 * (GEOMETRY + inner - 1))[0]
        strides = integers(row + strides_at + inner * geometry)
        return strides, integers(row + strides_at), columns // length, length

    @njit(**INNER)
    def indexed(row, columns, length):
        return row, integers(row + strides_at), 1, columns

    return cast(Function, indexed if memory.indexed else strided if inner else dense)


class NumbaExecutor:
    """Runs buckets in compiled loops, on as many threads as torch uses."""

    name = "numba"
    decider = None
    launches = False

    branches = branches

    def shape(
        self, layout: Geometry, by_rows: bool, tensors: int, split: bool, whole: bool = False
    ) -> TileShape:
        """Tiles of about TILE elements: whole rows where rows matter, stretches elsewhere."""
        if layout.sizes or by_rows or layout.rows > 1:
            return TileShape(max(1, TILE // layout.columns), layout.columns, None)
        return TileShape(1, TILE, None)

    def prepare(self, buckets: list[Bucket]) -> None:
        """Compiles their loops, once for each bucket."""
        for bucket in buckets:
            if "loops" not in bucket.cache:
                split, recipe = bucket.key.split, bucket.key.recipe
                parts = ("sums", "squares", "step", "finish") if split else ("squares", "step")
                # Where ranks share rows means are known already, and the step leaves something to be done.
                named = {"step": "partial", "squares": "partial squares"} if split else {}
                bucket.cache["loops"] = {
                    part: _loop(bucket, recipe, named.get(part, part))
                    for part in parts
                    if recipe.flags.needs(part)
                }

    def step_bucket(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket."""
        loop = bucket.cache["loops"].get(part)
        if loop is None:
            return 0
        if part == "squares":
            _leave_norms(bucket, loop)
        elif part == "step" and bucket.statistics:
            if "statistics" not in bucket.cache:
                bucket.cache["statistics"] = Partials(bucket)
            partials = bucket.cache["statistics"]
            _run(bucket, loop, partials.cleared())
            partials.add_up()
        else:
            _run(bucket, loop)
        return 1

    def squares(self, bucket: Bucket) -> float:
        """Sum of the squares of all gradients of the bucket."""
        totals = np.empty(len(bucket.tiles))
        if "squares" not in bucket.cache:
            bucket.cache["squares"] = _loop(bucket, None, "step")
        _run(bucket, bucket.cache["squares"], totals.ctypes.data)
        return float(totals.sum())


def _leave_norms(bucket: Bucket, loop: Any) -> None:
    """Runs a loop that measures norms of whole tensors, and adds up what its tiles leave."""
    if "norms" not in bucket.cache:
        firsts = np.searchsorted(bucket.tiles[:, 0], np.arange(len(bucket.slots)))
        counts = [float(slot.tensors()[0].numel()) for slot in bucket.slots]
        bucket.cache["norms"] = firsts, np.array(counts)[:, None], *as_one(bucket.norms)
    firsts, counts, whole, places = bucket.cache["norms"]
    partials = np.zeros((len(bucket.tiles), places.shape[1] - 1))
    _run(bucket, loop, partials.ctypes.data)
    whole[places] = np.concatenate([np.add.reduceat(partials, firsts), counts], axis=1)


def _run(bucket: Bucket, loop: Any, totals: int = 0) -> None:
    """Runs a loop over a bucket's tiles."""
    cache, scalars = bucket.cache, bucket.scalars
    if "job" not in cache:
        elements = sum(local_of(slot.param).numel() for slot in bucket.slots)
        tables = (bucket.table.ctypes.data, bucket.table.shape[1], bucket.tiles.ctypes.data)
        cache["job"] = np.array([*tables, 0, len(bucket.tiles), 0, 0, 0])
        cache["data"], cache["elements"] = cache["job"].ctypes.data, elements
    count = len(bucket.tiles)
    threads = threads_for(count, cache["elements"])
    cache["job"][3:] = scalars.ctypes.data, count, max(1, count // (threads * CHUNKS)), 0, totals
    on_threads(loop, cache["data"], threads)


def _loop(bucket: Bucket, recipe: Recipe | None, part: str) -> Any:
    """The compiled loop of a recipe, or that of the squares, as ctypes has it."""
    key = bucket.key
    compiled: Any = kernel_for(
        recipe,
        key.dtypes,
        bucket.compute,
        bucket.shared.count,
        key.inner,
        key.factored,
        part,
        key.recipe.kept,
        len(bucket.norms[0]) - 1 if bucket.norms else 0,
    )
    return compiled.ctypes


EXECUTOR = NumbaExecutor()


# -- threads ------------------------------------------------------------------------------------
#
# After each of its operations torch's OpenMP threads spin for a while, waiting for the next one. Threads of
# another pool would compete with them for the cores (10 to 15 % of a step that follows a backward pass);
# the same threads are already awake.

WORTH_A_THREAD = 32768  # elements; waking a thread costs as much as stepping about this many


def threads_for(shares: int, elements: int) -> int:
    """How many threads the work is worth: at most as many as torch may use."""
    return max(1, min(torch.get_num_threads(), shares, elements // WORTH_A_THREAD))


def on_threads(work: Callable[[int], Any], data: int, threads: int) -> None:
    """Calls `work(data)` once on each of `threads` threads, this one included.

    Args:
        work: C function `void work(void *data)`, as ctypes has it; takes its share of the work itself.
        data: address that it is given.
        threads: at least 1.
    """
    if threads == 1:
        work(data)
    elif parallel := _openmp():
        parallel(work, data, threads, 0)
    else:
        beside = [_pool(threads - 1).submit(work, data) for _ in range(threads - 1)]
        work(data)
        wait(beside)


@cache
def _openmp() -> Callable[..., Any] | None:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded (GNU's, LLVM's and Intel's all have it)."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such runtime, or Windows
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fusedcalib")


def _after_fork() -> None:
    """A child has none of its parent's threads, and an OpenMP runtime that still counts on them."""
    _pool.cache_clear()
    globals()["_openmp"] = lambda: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
