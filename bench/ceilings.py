"""The machine's own limit, in the same run: how fast memory moves when nothing else is done.

Two streams: a copy (1 read, 1 write) and one with AdamW's traffic (4 reads, 3 writes), in decimal
GB/s of all bytes moved. An optimizer step is judged as a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import timing
from .timing import Step, device_sampler, wall_sampler

GPU_ELEMENTS = 2**28  # 1 GiB of float32 each
CPU_ELEMENTS = 25 * 2**20  # 700 MiB of traffic: over the last-level caches that a task can use
CHECK = (1.0, 2.0, 3.0, 4.0)


def measure(device: torch.device, samples: int = 15) -> dict[str, Any]:
    """`copy_gbs` and `stream_4r3w_gbs` (None where no such stream runs) and how they were made."""
    count = GPU_ELEMENTS if timing.on_gpu(device) else CPU_ELEMENTS
    try:
        stream, how = adamw_stream(device, count), f"{device.type} 4-read-3-write stream"
    except ImportError as error:
        # A proxy with other traffic would be another ceiling: rather none.
        stream, how = None, f"no 4-read-3-write stream without {error.name}"
    source, target = (torch.ones(count, device=device) for _ in range(2))

    def bandwidth(step: Step, streams: int) -> float:
        for _ in range(3):
            step()
        sampler = wall_sampler(step, device)
        if timing.on_gpu(device):
            sampler = device_sampler(step, device, sleep_seconds=2e-3, repeat=5, flush=False)
        seconds = float(np.median([sampler() for _ in range(samples)]))
        return streams * 4 * count / seconds * 1e-9

    return {
        "copy_gbs": bandwidth(lambda: target.copy_(source), 2),
        "stream_4r3w_gbs": bandwidth(stream, 7) if stream is not None else None,
        "how": how,
    }


def adamw_stream(device: torch.device, count: int) -> Step:
    """A step with the traffic of fp32 AdamW on `count` parameters, checked once.

    Raises:
        ImportError: there is no Triton on a GPU, or no numba on a CPU.
    """
    run: Callable[..., None]
    if timing.on_gpu(device):
        from .stream_triton import BLOCK
        from .stream_triton import stream as run

        count = math.ceil(count / BLOCK) * BLOCK
    else:
        from .stream_numba import stream as run
    arrays = [torch.full((count,), value, device=device) for value in CHECK]
    run(*arrays)
    _check(arrays)
    return lambda: run(*arrays)


def _check(arrays: list[torch.Tensor]) -> None:
    """A stream that moved less than it says would set a false ceiling."""
    expected = (2.5, 2.5, 2.5, 4.0)  # three are written: a quarter of the sum of all, 10
    for array, value in zip(arrays, expected, strict=True):
        if not bool((array == value).all()):
            raise RuntimeError("the 4-read-3-write stream computed a wrong result")
