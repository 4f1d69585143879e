"""Tiles over threads. The loops release the GIL, so Python's own threads serve, also after a fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import torch

_WORTH_A_THREAD = 32768  # elements; waking a thread costs as much as stepping about this many
_SHARES = 4  # of the work for each thread: one that is held up leaves its share to the others

_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


def spread_over_threads(run: Callable[[int, int], object], tiles: int, elements: int) -> None:
    """Calls `run(first, last)` over all tiles, on as many threads as torch may use, this one included."""
    threads = min(torch.get_num_threads(), tiles, elements // _WORTH_A_THREAD)
    if threads <= 1:
        run(0, tiles)
        return
    shares = min(threads * _SHARES, tiles)
    bounds = [tiles * k // shares for k in range(shares + 1)]
    todo = iter(list(pairwise(bounds)))

    def work() -> None:
        for first, last in todo:  # each thread takes the next share; a list iterator is atomic
            run(first, last)

    run_beside = [_threads(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(run_beside)
    for future in run_beside:
        future.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_threads
    if _pool is None or _pool_threads < count:
        _pool, _pool_threads = ThreadPoolExecutor(count, "fusedcalib"), count
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a child has none of its parent's threads
