"""PlanInputs shared out over threads: torch's own where they can be had, Python's elsewhere.

After each of its operations torch's OpenMP threads spin for a while, waiting for the next one. Threads of
another pool would compete with them for the cores (10 to 15 % of a step that follows a backward pass);
the same threads are already awake.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import torch

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
