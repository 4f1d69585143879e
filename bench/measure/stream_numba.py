"""The traffic of an optimizer without its arithmetic, on the CPU: reads arrays, writes all but the last."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


@cache
def _loop(count: int) -> Callable[..., None]:
    """The loop over so many arrays, written out: indexing a tuple of them would not be vectorized."""
    names = [f"a{k}" for k in range(count)]
    total = " + ".join(f"{name}[i]" for name in names)
    lines = [
        f"def loop({', '.join(names)}):",
        "    for i in prange(a0.size):",
        f"        mean = ({total}) * share",
        *(f"        {name}[i] = mean" for name in names[:-1]),
    ]
    space: dict[str, Any] = {"prange": numba.prange, "share": np.float32(1 / count)}
    exec("\n".join(lines), space)
    loop: Callable[..., None] = numba.njit(parallel=True, fastmath=True)(space["loop"])
    return loop


def stream(*arrays: Tensor) -> None:
    """Write the mean of flat float32 arrays to all but the last, on torch's threads."""
    limit: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch.get_num_threads(), limit))
    _loop(len(arrays))(*(array.numpy() for array in arrays))
